"""`shardlib-ops reshard`: rows move between shards while applications run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardlib_ops.cli import given, jobs, moving, reach, render, resharder
from shardlib_ops.cli.progress import lines, progress_content, tables

if TYPE_CHECKING:
    from shardlib_ops.manager.manager import Target

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Move rows between shards while applications run.")

_TARGET = "A shard that gets a part: its name or id, or NAME=DSN for one to be made"
_REFERENCE = given.REFERENCE
Target1 = Annotated[str, typer.Option("--target", metavar="SHARD | NAME=DSN", help=f"{_TARGET}. {_REFERENCE}")]
Targets = Annotated[
    list[str], typer.Option("--target", metavar="SHARD | NAME=DSN", help=f"{_TARGET}; once for each. {_REFERENCE}")
]


@app.command()
@moving.moves
def split(
    shard: given.ShardName,
    target: Targets,
    keep: Annotated[
        int | None,
        typer.Option(help="Weight of what stays; the shard's own virtual nodes if left out.", show_default=False),
    ] = None,
) -> Mapping[str, Any]:
    """Give a part of a shard to others, each by its weight."""
    return {"source": given.shard(shard), "targets": given.targets(target), "keep": keep}


@app.command()
@moving.moves
def merge(
    shards: Annotated[list[str], typer.Argument(metavar="SHARD...", help="Names or ids of the shards that give.")],
    target: Target1,
) -> Mapping[str, Any]:
    """Give everything that some shards own to one."""
    return {"sources": [given.shard(one) for one in shards], "target": _one(target)}


@app.command()
@moving.moves
def rebalance(target: Target1) -> Mapping[str, Any]:
    """Give a shard that owns nothing its fair part of everything."""
    return {"target": _one(target)}


moving.drain(app)


@app.command("move-keys")
@moving.moves
def move_keys(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Shard keys, as PostgreSQL prints them.")],
    target: Target1,
) -> Mapping[str, Any]:
    """Give some keys, such as one large tenant, to a shard. For keys of several columns use Manager.move_keys."""
    return {"keys": keys, "target": _one(target)}


@app.command("list")
@reach.reaches
def list_(way: reach.Way, as_json: given.AsJson = False) -> None:
    """Show every job, oldest first."""
    with way.asking() as ask:
        found = ask(ask.client.jobs())
    if as_json:
        render.document({"jobs": found})
    elif found:
        jobs.show_jobs(found)
    else:
        render.console().print("no jobs", markup=False)


@app.command()
@reach.reaches
def show(job: given.JobNumber, way: reach.Way, as_json: given.AsJson = False) -> None:
    """Show one job: how far it is, and what it waits for."""
    import msgspec

    with way.asking() as ask:
        found, progress = ask(ask.client.job(job)), ask(ask.client.progress(job))
    if as_json:
        render.document({**msgspec.to_builtins(found), "progress": progress_content(progress)})
        return
    jobs.show_job(found)
    if progress is not None:
        for drawn in tables(progress):
            render.console().print()
            render.console().print(drawn)
        for said in lines(progress):
            render.console().print(said, markup=False)


@app.command()
@reach.reaches
def watch(
    job: given.JobNumber,
    way: reach.Way,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document a line, the last when it rests.")
    ] = False,
) -> None:
    """Follow a job until it rests: it is over, or in `validation`. The exit code is 1 if it failed.

    On a terminal the picture is drawn anew each second; elsewhere a line is printed when there is news.
    """
    from shardlib_ops.cli import watch as following

    try:
        found = following.until_signal(following.followed(way.opened(), job, "json" if as_json else "people"))
    except KeyboardInterrupt:
        render.console(error=True).print(
            f"not watched any more; job {job} goes on wherever a resharder runs it. "
            f"To undo it: {render.program()} reshard cancel {job}",
            markup=False,
        )
        raise typer.Exit(following.INTERRUPTED) from None
    resharder.ended(found, as_json=as_json, told=as_json)


@app.command()
@reach.reaches
def pause(job: given.JobNumber, way: reach.Way, as_json: given.AsJson = False) -> None:
    """Let a job stand still between two pieces of its work; its streams go on."""
    _ask(way, job, "pause", as_json=as_json)


@app.command()
@reach.reaches
def resume(
    job: given.JobNumber,
    way: reach.Way,
    run: moving.Run = False,
    max_slot_wal: resharder.MaxSlotWal = None,
    as_json: given.AsJson = False,
) -> None:
    """Let a paused job go on."""
    _ask(way, job, "resume", run=run, max_slot_wal=max_slot_wal, as_json=as_json)


@app.command()
@reach.reaches
def cancel(
    job: given.JobNumber,
    way: reach.Way,
    yes: given.Yes = False,
    run: moving.Run = False,
    as_json: given.AsJson = False,
) -> None:
    """Undo a job that has not switched: what was copied is deleted from the targets."""
    _ask(way, job, "cancel", "and delete what it has copied", yes=yes, run=run, as_json=as_json)


@app.command()
@reach.reaches
def rollback(
    job: given.JobNumber,
    way: reach.Way,
    yes: given.Yes = False,
    run: moving.Run = False,
    as_json: given.AsJson = False,
) -> None:
    """Take a switched job back: the sources serve again, with all that was written since."""
    _ask(way, job, "rollback", "so that the sources serve again", yes=yes, run=run, as_json=as_json)


@app.command()
@reach.reaches
def complete(
    job: given.JobNumber,
    way: reach.Way,
    yes: given.Yes = False,
    run: moving.Run = False,
    as_json: given.AsJson = False,
) -> None:
    """Delete the old copies of a switched job; there is no rollback from then on."""
    _ask(way, job, "complete", "and delete the old copies for good", yes=yes, run=run, as_json=as_json)


def _one(target: str) -> Target:
    return given.targets([target])[0]


def _ask(
    way: reach.Way,
    job_id: int,
    verb: str,
    consequence: str = "",
    *,
    yes: bool = True,
    run: bool = False,
    max_slot_wal: str | None = None,
    as_json: bool,
) -> None:
    """Ask something of a job; it happens in the resharder that runs it, or here with `run`."""
    from shardlib.errors import InvalidArgument

    if max_slot_wal is not None and not run:
        raise InvalidArgument("max_slot_wal", max_slot_wal, "only with --run; else: resharder run")
    slot_wal = resharder.slot_wal(max_slot_wal)
    catalog = way.catalog_for("--run") if run else ""
    with way.asking() as ask:
        before = ask(ask.client.job(job_id))
        given.agreed(f"{verb.capitalize()} job {job_id} ({before.kind}, {before.status}) {consequence}?", yes=yes)
        job = ask(ask.client.steer(job_id, verb))
    if run:
        resharder.run_job(catalog, job_id, complete=False, as_json=as_json, **slot_wal)
        return
    if as_json:
        render.document(job)
        return
    said, does = _told(job_id, verb, before.asked), f"; the resharder that runs it does that, or: {render.program()} "
    render.console().print(said or f"asked job {job_id} to {verb}{does}resharder run {job_id}", markup=False)


def _told(job_id: int, verb: str, before: str | None) -> str:
    """What is to be said of a `resume` that ends no pause; empty for everything else."""
    from shardlib_ops.reshard.job import Wish

    if verb != "resume" or before in (None, Wish.PAUSE):
        return ""
    if before == Wish.RUN:
        return f"job {job_id} is not paused"
    return f"job {job_id} is not paused; it was asked to {before}, which is withdrawn unless it has begun"
