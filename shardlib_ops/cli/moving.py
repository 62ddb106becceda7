"""What every command that makes a job takes, said once: `moves` gives these options to a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from shardlib_ops.cli import given, jobs, reach, render, resharder

__all__ = ["Run", "drain", "moves"]

Run = Annotated[bool, typer.Option("--run", help="Run the job here until it rests.")]


@dataclass(frozen=True)
class _Options:
    """What is asked of a job besides what it moves."""

    way: reach.Way
    retention: float | None
    dry_run: bool
    run: bool
    complete: bool
    max_slot_wal: str | None
    as_json: bool


def _options(
    *,
    way: reach.Way,
    retention: Annotated[
        float | None,
        typer.Option(
            help="Seconds after the switch until it completes by itself; never if left out.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would move.")] = False,
    run: Run = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="With --run: delete the old copies at once; there is no rollback then.")
    ] = False,
    max_slot_wal: resharder.MaxSlotWal = None,
    as_json: given.AsJson = False,
) -> _Options:
    return _Options(way, retention, dry_run, run, complete, max_slot_wal, as_json)


def moves(command: Callable[..., Mapping[str, Any]]) -> Callable[..., None]:
    """A command that makes a job, or shows its plan.

    Args:
        command: turns what it takes itself into the arguments of the manager's method of its name.
    """
    own = inspect.signature(command, eval_str=True).parameters
    common = inspect.signature(_options, eval_str=True).parameters

    @wraps(command)
    def make(**taken: Any) -> None:
        options = _options(**{name: taken.pop(name) for name in common})
        _begin(command.__name__, dict(command(**taken)), options)

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own.values(), *common.values())]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by typer
    make.__annotations__ = {one.name: one.annotation for one in parameters}
    return reach.reaches(make)


def drain(app: typer.Typer) -> None:
    """Give a group of commands `drain`: it is one of a shard's, and one that moves rows."""

    @app.command()
    @moves
    def drain(shard: given.ShardName) -> Mapping[str, Any]:
        """Give everything that a shard owns to the others, evenly."""
        return {"shard": given.shard(shard)}


def _begin(kind: str, arguments: dict[str, Any], options: _Options) -> None:
    from shardlib.errors import InvalidArgument

    way = options.way
    if options.complete and not options.run:
        raise InvalidArgument("complete", True, "only with --run; later: reshard complete JOB")
    if options.max_slot_wal is not None and not options.run:
        raise InvalidArgument("max_slot_wal", options.max_slot_wal, "only with --run; else: resharder run")
    slot_wal = resharder.slot_wal(options.max_slot_wal)  # wrong ones are refused before a job is made
    if options.run and options.dry_run:
        raise InvalidArgument("run", True, "either --run or --dry-run")
    catalog = way.catalog_for("--run") if options.run else ""
    arguments["retention_s"] = options.retention
    with way.asking() as ask:
        if options.dry_run:
            plan = ask(ask.client.plan(kind, arguments))
            if options.as_json:
                render.document(plan)
            else:
                jobs.show_plan(plan)
            return
        job, notes = ask(ask.client.begin(kind, arguments))
    for note in notes:
        render.console(error=True).print(f"warning: {note}", markup=False)
    if options.run:
        if not options.as_json:
            render.console().print(f"job {job.id} ({job.kind}) is made", markup=False)
        resharder.run_job(catalog, job.id, complete=options.complete, as_json=options.as_json, **slot_wal)
    elif options.as_json:
        render.document(job)
    else:
        jobs.show_job(job)
