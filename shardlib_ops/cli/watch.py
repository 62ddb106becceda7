"""A job followed until it rests: live on a terminal, one line for each change elsewhere."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shardlib_ops.cli import jobs, render

if TYPE_CHECKING:
    from shardlib_ops.reshard.job import Job, Wish

__all__ = ["INTERRUPTED", "follow", "run", "until_signal"]

T = TypeVar("T")

INTERRUPTED: Final = 130
"""The exit code of a command that a signal ended, as shells have it."""
_LOOK_S: Final = 0.5
_AWAY_S: Final = 60.0
"""For so long a catalog may be away before `follow` gives up."""


@contextmanager
def _display() -> Iterator[Callable[[Job, Wish], None]]:
    """What shows a job's state, each time it is called."""
    console = render.console()
    if console.is_terminal:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        # A console that wraps: a line that is drawn anew must not be longer than the terminal is wide.
        with Live(console=Console(highlight=False), refresh_per_second=4, transient=True) as live:
            yield lambda job, wish: live.update(Text(jobs.line(job, wish)))
        return
    last = ""

    def show(job: Job, wish: Wish) -> None:
        nonlocal last
        if (now := jobs.line(job, wish)) != last:
            last = now
            console.print(now, markup=False)
            sys.stdout.flush()

    yield show


async def follow(catalog: str, job_id: int, *, quiet: bool) -> Job:
    """Show a job until it rests: it is over, or in `validation` with nothing asked of it.

    Args:
        catalog: its URL.
        job_id: which job.
        quiet: show nothing.

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
        with _display() as show:
            while True:
                try:
                    job = await asyncio.to_thread(store.load, job_id)
                    wish = await asyncio.to_thread(store.wish, job_id)
                except CatalogUnavailable as error:
                    if error.final or clock() - heard > _AWAY_S:
                        raise
                else:
                    heard = clock()
                    if not quiet:
                        show(job, wish)
                    if _rests(job, wish):
                        return job
                await asyncio.sleep(_LOOK_S)
    finally:
        await asyncio.to_thread(opened.close)


def _rests(job: Job, wish: Wish) -> bool:
    from shardlib_ops.reshard.job import Status, Wish

    return job.status.over or (job.status is Status.VALIDATION and wish not in (Wish.ROLLBACK, Wish.COMPLETE))


async def run(catalog: str, job_id: int, *, complete: bool, quiet: bool) -> Job:
    """Run a job until it rests, and show it meanwhile.

    Args:
        catalog: its URL.
        job_id: which job.
        complete: do not rest in `validation`.
        quiet: show nothing.

    Raises:
        InvalidTopology: there is no such job.
    """
    from shardlib.errors import CatalogUnavailable
    from shardlib_ops.reshard.resharder import Resharder

    async with Resharder(catalog) as resharder:

        async def shown() -> None:
            try:
                await follow(catalog, job_id, quiet=quiet)
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
