"""`shardlib-ops resharder`: the process that moves the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardlib_ops.cli import given, jobs, render

if TYPE_CHECKING:
    from shardlib_ops.reshard.job import Job

__all__ = ["app", "ended", "run_job"]

app = typer.Typer(no_args_is_help=True, help="The process that moves the rows.")


@app.callback()
def _group() -> None:
    """The process that moves the rows."""


@app.command()
def run(
    catalog: given.CatalogUrl,
    job: Annotated[
        int | None,
        typer.Argument(metavar="JOB", min=1, help="Number of a job; all of them if left out.", show_default=False),
    ] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Delete the old copies at once; there is no rollback then.")
    ] = False,
    as_json: given.AsJson = False,
) -> None:
    """Run a job until it rests; or, without JOB, every job that is open or comes, until Ctrl-C.

    Any number of them may run: each job has one runner at a time, and another takes over when that one is gone.
    The exit code is 1 if the job failed.
    """
    from shardlib.errors import InvalidArgument

    given.lasting(catalog)
    if job is not None:
        run_job(catalog, job, complete=complete, as_json=as_json)
        return
    if complete:
        raise InvalidArgument("complete", True, "only with a JOB")
    _serve(catalog, as_json=as_json)


def run_job(catalog: str, job_id: int, *, complete: bool, as_json: bool) -> None:
    """Run a job until it rests, show it, and exit with 1 if it failed, 130 if a signal came first."""
    from shardlib_ops.cli import watch

    try:
        job = watch.until_signal(watch.run(catalog, job_id, complete=complete, quiet=as_json))
    except KeyboardInterrupt:
        render.console(error=True).print(
            f"interrupted; job {job_id} stands where it was: {render.program()} resharder run {job_id}", markup=False
        )
        raise typer.Exit(watch.INTERRUPTED) from None
    ended(catalog, job, as_json=as_json)


def ended(catalog: str, job: Job, *, as_json: bool) -> None:
    """Show a job that rests, and exit with 1 if it failed."""
    from shardlib_ops.manager.manager import Manager
    from shardlib_ops.reshard.job import Status

    if as_json:
        with Manager.sync(catalog) as manager:
            names = jobs.names_of(manager.topology())
        render.document(jobs.job_content(job, names))
    else:
        render.console().print(f"rests: {jobs.line(job)}", markup=False)
    if job.status is Status.FAILED:
        raise typer.Exit(1)


def _serve(catalog: str, *, as_json: bool) -> None:
    import logging

    from shardlib_ops.cli.watch import until_signal
    from shardlib_ops.reshard.resharder import Resharder

    async def serve() -> None:
        async with Resharder(catalog) as resharder:
            render.console(error=True).print("serving; stop it with Ctrl-C", markup=False)
            await resharder.serve()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        until_signal(serve())
    except KeyboardInterrupt:
        pass  # how it is meant to end
    if as_json:
        render.document({"stopped": True})
    else:
        render.console(error=True).print("stopped; open jobs stand where they were", markup=False)
