"""A job followed until it rests: drawn live on a terminal, told line by line elsewhere."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from shardlib_ops.cli import jobs, progress, render

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from shardlib_ops.client import Client
    from shardlib_ops.client.views import JobView
    from shardlib_ops.reshard.progress.model import JobProgress
    from shardlib_ops.reshard.resharder import Resharder

__all__ = ["INTERRUPTED", "follow", "followed", "run", "until_signal"]

T = TypeVar("T")

INTERRUPTED: Final = 130
"""The exit code of a command that a signal ended, as shells have it."""
_PLAIN_S: Final = 5.0
"""Between two lines that say only how far it is."""
_AWAY_S: Final = 60.0
"""For so long a catalog or manager may be away before `follow` gives up."""


Show = Callable[["JobView", "JobProgress | None"], None]
"""Shows a job's state, each time it is called."""
Beside = Callable[["Resharder"], AbstractAsyncContextManager[None]]
To = Literal["people", "json", "nobody"]
"""Whom a job is shown to: people; programs, by lines of JSON; or nobody."""


@contextmanager
def _display(to: To, screen: Console | None) -> Iterator[Show]:
    if to == "nobody":
        yield lambda job, told: None
    elif to == "json":
        yield _lines_of_json()
    elif (screen or render.console()).is_terminal:
        from rich.console import Console
        from rich.live import Live

        # A console that wraps: a line that is drawn anew must not be longer than the terminal is wide.
        with Live(console=screen or Console(highlight=False), refresh_per_second=4, transient=True) as live:
            yield lambda job, told: live.update(_picture(job, told))
    else:
        yield _plain_lines(screen or render.console())


def _picture(job: JobView, told: JobProgress | None) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(jobs.line(job), style="bold")]
    if told is not None:
        if told.status == job.status:  # else the bar is that of a state that is over
            bar = Table.grid(padding=(0, 1))
            bar.add_row(
                ProgressBar(total=1.0, completed=told.fraction, width=40), Text(progress.summary(told, brief=True))
            )
            parts.append(bar)
        parts += progress.tables(told)
        parts += [Text(said, style="yellow") for said in progress.lines(told)]
        parts.append(Text(f"told at {told.at}", style="dim"))
    return Group(*parts)


def _plain_lines(screen: Console) -> Show:
    """A line when the job's state changes, or who stands in its way; and now and then how far it is."""
    seen: list[str] = []
    said_at = float("-inf")

    def show(job: JobView, told: JobProgress | None) -> None:
        nonlocal seen, said_at
        news = [jobs.line(job)]
        keyed = list(news)
        if told is not None and told.status == job.status:
            news += [f"  {said}" for said in progress.lines(told)]
            keyed += [*told.warnings, *(f"{one.kind} {one.pid} {one.gid} {one.shard}" for one in told.waiting)]
        if keyed != seen:
            seen = keyed
        elif told is not None and not _over(job) and time.monotonic() - said_at >= _PLAIN_S:
            news = [f"  {progress.summary(told)}"]
        else:
            return
        said_at = time.monotonic()
        for line in news:
            screen.print(line, markup=False)
        sys.stdout.flush()

    return show


def _lines_of_json() -> Show:
    import msgspec

    last = ""

    def show(job: JobView, told: JobProgress | None) -> None:
        nonlocal last
        content = {**msgspec.to_builtins(job), "progress": progress.progress_content(told)}
        if (line := json.dumps(content)) != last:
            last = line
            print(line, flush=True)

    return show


async def follow(catalog: str, job_id: int, to: To, screen: Console | None = None) -> JobView:
    """`followed`, by the catalog of this URL."""
    from shardlib_ops.client import DirectClient

    return await followed(DirectClient(catalog), job_id, to, screen)


async def followed(client: Client, job_id: int, to: To, screen: Console | None = None) -> JobView:
    """Show a job until it rests: it is over, or in `validation` with nothing asked of it.

    Args:
        client: of its cluster; it is closed at the end.
        job_id: which job.
        to: whom it is shown to.
        screen: where people see it; None for standard output.

    Raises:
        InvalidTopology: there is no such job.
        CatalogUnavailable, ManagerUnavailable: no answer for a minute.
    """
    from shardlib.errors import RetryableError

    clock = asyncio.get_running_loop().time
    heard = clock()
    try:
        with _display(to, screen) as show:
            while True:
                try:
                    job, told = await client.job(job_id), await client.progress(job_id)
                except RetryableError as error:
                    if getattr(error, "final", False) or clock() - heard > _AWAY_S:
                        raise
                else:
                    heard = clock()
                    show(job, told)
                    if _rests(job):
                        return job
                await asyncio.sleep(client.look_s)
    finally:
        await client.close()


def _rests(job: JobView) -> bool:
    from shardlib_ops.reshard.job import Status, Wish

    return _over(job) or (job.status == Status.VALIDATION and job.asked not in (Wish.ROLLBACK, Wish.COMPLETE))


def _over(job: JobView) -> bool:
    from shardlib_ops.reshard.job import Status

    return Status(job.status).over


async def run(catalog: str, job_id: int, *, complete: bool, quiet: bool, beside: Beside, **options: Any) -> JobView:
    """Run a job until it rests, and show it meanwhile.

    Args:
        catalog: its URL.
        job_id: which job.
        complete: do not rest in `validation`.
        quiet: show nothing.
        beside: entered with the resharder, for as long as it runs.
        options: of the `Resharder`.

    Raises:
        InvalidTopology: there is no such job.
    """
    from shardlib.errors import CatalogUnavailable
    from shardlib_ops.client.views import job_view
    from shardlib_ops.reshard.resharder import Resharder

    async with Resharder(catalog, **options) as resharder, beside(resharder):

        async def shown() -> None:
            try:
                await follow(catalog, job_id, "people")
            except CatalogUnavailable as error:
                # The job itself waits for the catalog; only its picture ends here.
                render.failure(error, as_json=False)

        watching = None if quiet else asyncio.create_task(shown())
        try:
            job = await resharder.run(job_id, complete=complete)
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])
    return job_view(job, await _names(catalog) if quiet else {})


async def _names(catalog: str) -> dict[str, str]:
    from shardlib_ops.client import DirectClient

    client = DirectClient(catalog)
    try:
        return {shard.id: shard.name for shard in (await client.shards()).shards}
    finally:
        await client.close()


def until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, or cancel it at SIGINT or SIGTERM so that it gives up what it holds.

    Raises:
        KeyboardInterrupt: a signal ended it.
    """

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        asked = False

        def stop() -> None:
            nonlocal asked
            asked = True
            task.cancel()

        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        for number in numbers:
            loop.add_signal_handler(number, stop)
        try:
            return await task
        except asyncio.CancelledError:
            if asked:
                raise KeyboardInterrupt from None
            raise
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    return asyncio.run(main())
