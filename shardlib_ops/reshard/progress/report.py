"""Writes a job's progress beside its record, once a second; in nobody's way, and no matter if the catalog is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from shardlib.catalog import Conflict
from shardlib.errors import CatalogUnavailable
from shardlib_ops.reshard.progress.look import Observer
from shardlib_ops.reshard.progress.model import JobProgress
from shardlib_ops.reshard.progress.tracker import Tracker

__all__ = ["reported"]

_log: Final = logging.getLogger("shardlib.reshard.progress")

_EVERY_S: Final = 1.0
_LAST_S: Final = 3.0


@asynccontextmanager
async def reported(
    tracker: Tracker,
    observer: Observer,
    save: Callable[[JobProgress], None],
    *,
    on_progress: Callable[[JobProgress], None],
) -> AsyncIterator[None]:
    """Report on a job while the body runs, and once more when it has ended.

    Args:
        tracker: knows how far the job is.
        observer: looks at the servers; closed at the end.
        save: writes it to the catalog; called in a thread. May raise `CatalogUnavailable` and `Conflict`.
        on_progress: told each progress too; must be quick.
    """
    reporting = asyncio.create_task(_report(tracker, observer, save, on_progress))
    try:
        yield
    finally:
        reporting.cancel()
        await asyncio.wait([reporting])
        if not reporting.cancelled() and (error := reporting.exception()) is not None:
            _log.error("job %d: its progress was not told any more", tracker.job.id, exc_info=error)
        await observer.close()
        tracker.waiting = ()  # whoever was seen last is not waited for any more
        last = tracker.progress()
        on_progress(last)
        await asyncio.wait([asyncio.create_task(_write(save, last))], timeout=_LAST_S)


async def _report(
    tracker: Tracker,
    observer: Observer,
    save: Callable[[JobProgress], None],
    on_progress: Callable[[JobProgress], None],
) -> None:
    writing: asyncio.Task[None] | None = None
    looking: asyncio.Task[None] | None = None
    try:
        while True:
            await asyncio.sleep(_EVERY_S)
            tracker.sample()
            # Neither a catalog nor a server that does not answer holds up the other figures.
            if looking is None or looking.done():
                if looking is not None:
                    looking.result()
                looking = asyncio.create_task(observer.look())
            progress = tracker.progress()
            on_progress(progress)
            if writing is None or writing.done():
                writing = asyncio.create_task(_write(save, progress))
    finally:
        left = [task for task in (looking, writing) if task is not None]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)


async def _write(save: Callable[[JobProgress], None], progress: JobProgress) -> None:
    try:
        await asyncio.to_thread(save, progress)
    except (CatalogUnavailable, Conflict) as error:
        _log.debug("job %d: its progress cannot be written now: %s", progress.job, error)
