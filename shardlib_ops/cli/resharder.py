"""`shardlib-ops resharder`: the process that moves the rows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shardlib_ops.cli import given, jobs, render

if TYPE_CHECKING:
    from shardlib_ops.client.views import JobView
    from shardlib_ops.reshard.resharder import Resharder

__all__ = ["MaxSlotWal", "app", "ended", "run_job", "slot_wal"]

_METRICS_S: Final = 1.0

MaxSlotWal = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="WAL that a server may keep for a slot, such as 16GiB (the default), or `any`: past it a job is undone, "
        "or gives up its way back once it has switched.",
        show_default=False,
    ),
]

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
    max_slot_wal: MaxSlotWal = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option(help="Write Prometheus metrics into this file each second, as for node_exporter's textfile."),
    ] = None,
    as_json: given.AsJson = False,
) -> None:
    """Run a job until it rests; or, without JOB, every job that is open or comes, until Ctrl-C.

    Any number of them may run: each job has one runner at a time, and another takes over when that one is gone.
    The exit code is 1 if the job failed.
    """
    from shardlib.errors import InvalidArgument

    given.lasting(catalog)
    options = slot_wal(max_slot_wal)
    if job is not None:
        run_job(catalog, job, complete=complete, as_json=as_json, metrics_file=metrics_file, **options)
        return
    if complete:
        raise InvalidArgument("complete", True, "only with a JOB")
    _serve(catalog, as_json=as_json, metrics_file=metrics_file, **options)


def slot_wal(max_slot_wal: str | None) -> dict[str, Any]:
    """The option as an argument of `Resharder`; empty if it was left out.

    Raises:
        InvalidArgument: it is no size.
    """
    from shardlib_ops.reshard.units import parse_size

    if max_slot_wal is None:
        return {}
    return {"max_slot_wal": None if max_slot_wal == "any" else parse_size("max_slot_wal", max_slot_wal)}


@asynccontextmanager
async def _written(resharder: Resharder, path: Path | None) -> AsyncIterator[None]:
    """While the body runs, a resharder's metrics are in this file, whole at each moment."""

    def write() -> None:
        assert path is not None  # noqa: S101 - nothing is written without one
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(resharder.metrics(), encoding="utf-8")
        fresh.replace(path)

    async def again_and_again() -> None:
        while True:
            await asyncio.sleep(_METRICS_S)
            try:
                await asyncio.to_thread(write)
            except OSError as error:
                # The jobs are worth more than their metrics.
                logging.getLogger("shardlib.reshard").warning("the metrics cannot be written: %s", error)

    if path is None:
        yield
        return
    write()  # a path that cannot be written to is told at once
    writing = asyncio.create_task(again_and_again())
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.wait([writing])
        with suppress(OSError):
            write()


def run_job(
    catalog: str, job_id: int, *, complete: bool, as_json: bool, metrics_file: Path | None = None, **options: Any
) -> None:
    """Run a job until it rests, show it, and exit with 1 if it failed, 130 if a signal came first."""
    from shardlib_ops.cli import watch

    try:
        beside = partial(_written, path=metrics_file)
        running = watch.run(catalog, job_id, complete=complete, quiet=as_json, beside=beside, **options)
        job = watch.until_signal(running)
    except KeyboardInterrupt:
        render.console(error=True).print(
            f"interrupted; job {job_id} stands where it was. To go on: {render.program()} resharder run {job_id}. "
            f"To undo it: {render.program()} reshard cancel {job_id} --run",
            markup=False,
        )
        raise typer.Exit(watch.INTERRUPTED) from None
    if not as_json:
        _tell_unattended(job)
    ended(job, as_json=as_json)


def _tell_unattended(job: JobView) -> None:
    """A job in `validation` still needs a resharder when this command ends."""
    from shardlib_ops.reshard.job import WAY_BACK_LOST, Status

    if job.status != Status.VALIDATION or WAY_BACK_LOST in (job.error or ""):
        return
    by_itself = "" if job.retention_s is None else ", and its retention does not end it"
    render.console(error=True).print(
        f"job {job.id} is not run here any more. Until a resharder does, the new side's server keeps all WAL since the "
        f"switch{by_itself}. "
        f"Keep one running: {render.program()} resharder run. Or decide: {render.program()} reshard complete {job.id} "
        f"--run, or rollback {job.id} --run",
        markup=False,
        soft_wrap=True,
    )


def ended(job: JobView, *, as_json: bool, told: bool = False) -> None:
    """Show a job that rests, unless that was told already, and exit with 1 if it failed."""
    from shardlib_ops.reshard.job import Status

    if told:
        pass
    elif as_json:
        render.document(job)
    else:
        render.console().print(f"rests: {jobs.line(job)}", markup=False)
    if job.status == Status.FAILED:
        raise typer.Exit(1)


def _serve(catalog: str, *, as_json: bool, metrics_file: Path | None, **options: Any) -> None:
    from shardlib_ops.cli.watch import until_signal
    from shardlib_ops.reshard.resharder import Resharder

    async def serve() -> None:
        async with Resharder(catalog, **options) as resharder, _written(resharder, metrics_file):
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
