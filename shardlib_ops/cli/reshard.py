"""`shardlib-ops reshard`: rows move between shards while applications run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardlib_ops.cli import given, jobs, render, resharder

if TYPE_CHECKING:
    from shardlib_ops.manager.manager import Target
    from shardlib_ops.reshard.job import Job, Wish

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Move rows between shards while applications run.")

_TARGET = "A shard that gets a part: its name or id, or NAME=DSN for one to be made"
Target1 = Annotated[str, typer.Option("--target", metavar="SHARD | NAME=DSN", help=f"{_TARGET}.")]
Targets = Annotated[list[str], typer.Option("--target", metavar="SHARD | NAME=DSN", help=f"{_TARGET}; once for each.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would move.")]
Run = Annotated[bool, typer.Option("--run", help="Run the job here until it rests.")]
Complete = Annotated[
    bool, typer.Option("--complete", help="With --run: delete the old copies at once; there is no rollback then.")
]
Retention = Annotated[
    float | None,
    typer.Option(help="Seconds after the switch until it completes by itself; never if left out.", show_default=False),
]


@app.command()
def split(
    shard: given.ShardName,
    target: Targets,
    catalog: given.CatalogUrl,
    keep: Annotated[
        int | None,
        typer.Option(help="Weight of what stays; the shard's own virtual nodes if left out.", show_default=False),
    ] = None,
    retention: Retention = None,
    dry_run: DryRun = False,
    run: Run = False,
    complete: Complete = False,
    as_json: given.AsJson = False,
) -> None:
    """Give a part of a shard to others, each by its weight."""
    arguments = {"source": given.shard(shard), "targets": given.targets(target), "keep": keep}
    _begin("split", arguments, catalog, retention, dry_run, run, complete, as_json)


@app.command()
def merge(
    shards: Annotated[list[str], typer.Argument(metavar="SHARD...", help="Names or ids of the shards that give.")],
    target: Target1,
    catalog: given.CatalogUrl,
    retention: Retention = None,
    dry_run: DryRun = False,
    run: Run = False,
    complete: Complete = False,
    as_json: given.AsJson = False,
) -> None:
    """Give everything that some shards own to one."""
    arguments = {"sources": [given.shard(one) for one in shards], "target": _one(target)}
    _begin("merge", arguments, catalog, retention, dry_run, run, complete, as_json)


@app.command()
def rebalance(
    target: Target1,
    catalog: given.CatalogUrl,
    retention: Retention = None,
    dry_run: DryRun = False,
    run: Run = False,
    complete: Complete = False,
    as_json: given.AsJson = False,
) -> None:
    """Give a shard that owns nothing its fair part of everything."""
    _begin("rebalance", {"target": _one(target)}, catalog, retention, dry_run, run, complete, as_json)


@app.command()
def drain(
    shard: given.ShardName,
    catalog: given.CatalogUrl,
    retention: Retention = None,
    dry_run: DryRun = False,
    run: Run = False,
    complete: Complete = False,
    as_json: given.AsJson = False,
) -> None:
    """Give everything that a shard owns to the others, evenly."""
    _begin("drain", {"shard": given.shard(shard)}, catalog, retention, dry_run, run, complete, as_json)


@app.command("move-keys")
def move_keys(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Shard keys, as PostgreSQL prints them.")],
    target: Target1,
    catalog: given.CatalogUrl,
    retention: Retention = None,
    dry_run: DryRun = False,
    run: Run = False,
    complete: Complete = False,
    as_json: given.AsJson = False,
) -> None:
    """Give some keys, such as one large tenant, to a shard. For keys of several columns use Manager.move_keys."""
    arguments = {"keys": keys, "target": _one(target)}
    _begin("move_keys", arguments, catalog, retention, dry_run, run, complete, as_json)


@app.command("list")
def list_(catalog: given.CatalogUrl, as_json: given.AsJson = False) -> None:
    """Show every job, oldest first."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        found, names = manager.list_jobs(), jobs.names_of(manager.topology())
    if as_json:
        render.document({"jobs": [jobs.job_content(job, names) for job in found]})
    elif found:
        jobs.show_jobs(found, names)
    else:
        render.console().print("no jobs", markup=False)


@app.command()
def show(job: given.JobNumber, catalog: given.CatalogUrl, as_json: given.AsJson = False) -> None:
    """Show one job: how far it is, and what it waits for."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        found, names = manager.get_job(job), jobs.names_of(manager.topology())
    wish = _wish(catalog, job)
    if as_json:
        render.document(jobs.job_content(found, names, wish))
    else:
        jobs.show_job(found, names, wish)


@app.command()
def watch(job: given.JobNumber, catalog: given.CatalogUrl, as_json: given.AsJson = False) -> None:
    """Follow a job until it rests: it is over, or in `validation`. The exit code is 1 if it failed."""
    from shardlib_ops.cli import watch as following

    given.lasting(catalog)
    try:
        found = following.until_signal(following.follow(catalog, job, quiet=as_json))
    except KeyboardInterrupt:
        raise typer.Exit(following.INTERRUPTED) from None
    resharder.ended(catalog, found, as_json=as_json)


@app.command()
def pause(job: given.JobNumber, catalog: given.CatalogUrl, as_json: given.AsJson = False) -> None:
    """Let a job stand still between two pieces of its work; its streams go on."""
    _ask(catalog, job, "pause", as_json=as_json)


@app.command()
def resume(job: given.JobNumber, catalog: given.CatalogUrl, run: Run = False, as_json: given.AsJson = False) -> None:
    """Let a paused job go on."""
    _ask(catalog, job, "resume", run=run, as_json=as_json)


@app.command()
def cancel(
    job: given.JobNumber,
    catalog: given.CatalogUrl,
    yes: given.Yes = False,
    run: Run = False,
    as_json: given.AsJson = False,
) -> None:
    """Undo a job that has not switched: what was copied is deleted from the targets."""
    _ask(catalog, job, "cancel", "and delete what it has copied", yes=yes, run=run, as_json=as_json)


@app.command()
def rollback(
    job: given.JobNumber,
    catalog: given.CatalogUrl,
    yes: given.Yes = False,
    run: Run = False,
    as_json: given.AsJson = False,
) -> None:
    """Take a switched job back: the sources serve again, with all that was written since."""
    _ask(catalog, job, "rollback", "so that the sources serve again", yes=yes, run=run, as_json=as_json)


@app.command()
def complete(
    job: given.JobNumber,
    catalog: given.CatalogUrl,
    yes: given.Yes = False,
    run: Run = False,
    as_json: given.AsJson = False,
) -> None:
    """Delete the old copies of a switched job; there is no rollback from then on."""
    _ask(catalog, job, "complete", "and delete the old copies for good", yes=yes, run=run, as_json=as_json)


def _one(target: str) -> Target:
    return given.targets([target])[0]


def _wish(catalog: str, job_id: int) -> Wish:
    from contextlib import closing

    from shardlib.catalog import open_catalog
    from shardlib_ops.reshard.store import JobStore

    with closing(open_catalog(catalog)) as opened:
        return JobStore(opened).wish(job_id)


def _begin(
    kind: str,
    arguments: dict[str, Any],
    catalog: str,
    retention: float | None,
    dry_run: bool,
    run: bool,
    complete: bool,
    as_json: bool,
) -> None:
    """Make a job, or only its plan."""
    from shardlib.errors import InvalidArgument
    from shardlib_ops.manager.manager import Manager

    given.lasting(catalog)
    if complete and not run:
        raise InvalidArgument("complete", True, "only with --run; later: reshard complete JOB")
    if run and dry_run:
        raise InvalidArgument("run", True, "either --run or --dry-run")
    arguments["retention_s"] = retention
    targets = arguments.get("targets") or [one for one in [arguments.get("target")] if one]
    with Manager.sync(catalog) as manager:
        if dry_run:
            names = jobs.names_of(manager.topology(), [one["name"] for one in targets if "name" in one])
            plan = manager.plan(kind, **arguments)
            if as_json:
                render.document(jobs.plan_content(plan, names))
            else:
                jobs.show_plan(plan, names)
            return
        job: Job = getattr(manager, kind)(**arguments)
        names = jobs.names_of(manager.topology())
    if not run:
        _show(job, names, as_json=as_json)
        return
    if not as_json:
        render.console().print(f"job {job.id} ({job.kind.value}) is made", markup=False)
    resharder.run_job(catalog, job.id, complete=complete, as_json=as_json)


def _show(job: Job, names: jobs.Names, wish: Wish | None = None, *, as_json: bool) -> None:
    if as_json:
        render.document(jobs.job_content(job, names, wish))
    else:
        jobs.show_job(job, names, wish)


def _ask(
    catalog: str,
    job_id: int,
    verb: str,
    consequence: str = "",
    *,
    yes: bool = True,
    run: bool = False,
    as_json: bool,
) -> None:
    """Ask something of a job; it happens in the resharder that runs it, or here with `run`."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        job = manager.get_job(job_id)
        given.agreed(f"{verb.capitalize()} job {job.id} ({job.kind.value}, {job.status.value}) {consequence}?", yes=yes)
        asking: Callable[[int], Job] = getattr(manager, verb)
        job, names = asking(job_id), jobs.names_of(manager.topology())
    if run:
        resharder.run_job(catalog, job_id, complete=False, as_json=as_json)
        return
    if as_json:
        render.document(jobs.job_content(job, names, _wish(catalog, job_id)))
        return
    render.console().print(
        f"asked job {job_id} to {verb}; the resharder that runs it does that, or: "
        f"{render.program()} resharder run {job_id}",
        markup=False,
    )
