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

    from shardlib_ops.reshard.job import Job, Wish
    from shardlib_ops.reshard.progress.model import JobProgress
    from shardlib_ops.reshard.resharder import Resharder

__all__ = ["INTERRUPTED", "follow", "run", "until_signal"]

T = TypeVar("T")

INTERRUPTED: Final = 130
"""The exit code of a command that a signal ended, as shells have it."""
_LOOK_S: Final = 0.5
_PLAIN_S: Final = 5.0
"""Between two lines that say only how far it is."""
_AWAY_S: Final = 60.0
"""For so long a catalog may be away before `follow` gives up."""


Show = Callable[["Job", "Wish", "JobProgress | None"], None]
"""Shows a job's state, each time it is called."""
Beside = Callable[["Resharder"], AbstractAsyncContextManager[None]]
To = Literal["people", "json", "nobody"]
"""Whom a job is shown to: people; programs, by lines of JSON; or nobody."""


@contextmanager
def _display(to: To, names: jobs.Names, screen: Console | None) -> Iterator[Show]:
    if to == "nobody":
        yield lambda job, wish, told: None
    elif to == "json":
        yield _lines_of_json(names)
    elif (screen or render.console()).is_terminal:
        from rich.console import Console
        from rich.live import Live

        # A console that wraps: a line that is drawn anew must not be longer than the terminal is wide.
        with Live(console=screen or Console(highlight=False), refresh_per_second=4, transient=True) as live:
            yield lambda job, wish, told: live.update(_picture(job, wish, told))
    else:
        yield _plain_lines(screen or render.console())


def _picture(job: Job, wish: Wish, told: JobProgress | None) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(jobs.line(job, wish), style="bold")]
    if told is not None:
        if told.status == job.status.value:  # else the bar is that of a state that is over
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

    def show(job: Job, wish: Wish, told: JobProgress | None) -> None:
        nonlocal seen, said_at
        news = [jobs.line(job, wish)]
        keyed = list(news)
        if told is not None and told.status == job.status.value:
            news += [f"  {said}" for said in progress.lines(told)]
            keyed += [*told.warnings, *(f"{one.kind} {one.pid} {one.gid} {one.shard}" for one in told.waiting)]
        if keyed != seen:
            seen = keyed
        elif told is not None and not job.status.over and time.monotonic() - said_at >= _PLAIN_S:
            news = [f"  {progress.summary(told)}"]
        else:
            return
        said_at = time.monotonic()
        for line in news:
            screen.print(line, markup=False)
        sys.stdout.flush()

    return show


def _lines_of_json(names: jobs.Names) -> Show:
    last = ""

    def show(job: Job, wish: Wish, told: JobProgress | None) -> None:
        nonlocal last
        content = {**jobs.job_content(job, names, wish), "progress": progress.progress_content(told)}
        if (line := json.dumps(content, default=str)) != last:
            last = line
            print(line, flush=True)

    return show


async def follow(catalog: str, job_id: int, to: To, screen: Console | None = None) -> Job:
    """Show a job until it rests: it is over, or in `validation` with nothing asked of it.

    Args:
        catalog: its URL.
        job_id: which job.
        to: whom it is shown to.
        screen: where people see it; None for standard output.

    Raises:
        InvalidTopology: there is no such job.
        CatalogUnavailable: no answer for a minute.
    """
    from shardlib.catalog import open_catalog
    from shardlib.errors import CatalogUnavailable
    from shardlib_ops.reshard.store import JobStore

    opened = await asyncio.to_thread(open_catalog, catalog)
    try:
        store = JobStore(opened)
        clock = asyncio.get_running_loop().time
        heard = clock()
        names: dict[str, str] = {}
        with _display(to, names, screen) as show:
            while True:
                try:
                    job = await asyncio.to_thread(store.load, job_id)
                    wish = await asyncio.to_thread(store.wish, job_id)
                    told = await asyncio.to_thread(store.progress, job_id)
                    if to == "json" and not names:
                        names.update(jobs.names_of(await asyncio.to_thread(opened.load)))
                except CatalogUnavailable as error:
                    if error.final or clock() - heard > _AWAY_S:
                        raise
                else:
                    heard = clock()
                    show(job, wish, told)
                    if _rests(job, wish):
                        return job
                await asyncio.sleep(_LOOK_S)
    finally:
        await asyncio.to_thread(opened.close)


def _rests(job: Job, wish: Wish) -> bool:
    from shardlib_ops.reshard.job import Status, Wish

    return job.status.over or (job.status is Status.VALIDATION and wish not in (Wish.ROLLBACK, Wish.COMPLETE))


async def run(catalog: str, job_id: int, *, complete: bool, quiet: bool, beside: Beside, **options: Any) -> Job:
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
    return job


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
