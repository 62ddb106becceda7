"""A job in the hands of its runner: its record, and what the operator wishes of it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from shardlib_ops.reshard.job import Job, Status, Wish
from shardlib_ops.reshard.world import Lost, World

__all__ = ["Cancelled", "Steered"]

T = TypeVar("T")

_LOOK_S: Final = 0.25
_UNDOING: Final = "; it is undone, which waits: "
_CANCELLABLE: Final = frozenset({Status.PENDING, Status.PRECOPY, Status.DELTASYNC, Status.CUTOVER})


class Cancelled(Exception):  # noqa: N818 - the operator's wish
    """The job is to be undone."""


class Steered:
    """The record of a job, written by one task at a time, and the operator's hand on it.

    Attributes:
        job: its record as it is stored.
        step: told the name of each step when it is done.
    """

    def __init__(self, world: World, job: Job, step: Callable[[str], Awaitable[None]]) -> None:
        self.job, self.step = job, step
        self._world = world
        self._saving = asyncio.Lock()

    async def change(self, **changes: Any) -> None:
        """Store the record with these fields replaced."""
        async with self._saving:
            await self._save(self.job.changed(**changes))

    async def to(self, status: Status, **changes: Any) -> None:
        """Store the record in its next state, with these fields replaced."""
        async with self._saving:
            await self._save(self.job.to(status, **changes))
        await self.step(f"status_{status.value}")

    async def _save(self, job: Job) -> None:
        await self._world.save(job)
        self.job = job

    async def note(self, error: str | None) -> None:
        """Write down what the job waits for, if that can be written down now; None: for nothing any more."""
        async with self._saving:
            if self.job.outcome is Status.FAILED:
                error = f"{self.reason}{_UNDOING}{error}" if error else self.reason
            if self.job.error == error or self.job.status.over:
                return
            job = self.job.changed(error=error)
            with suppress(Lost):
                await self._world.save(job)
            self.job = job

    @property
    def reason(self) -> str | None:
        """Why the job failed; None if it did not."""
        return (self.job.error or "").partition(_UNDOING)[0] if self.job.outcome is Status.FAILED else None

    async def heed(self) -> Wish:
        """What the operator wishes now. The record says so while that is a pause."""
        wish = await self._world.wish()
        if self.job.paused is not (wish is Wish.PAUSE) and not self.job.status.over:
            await self.change(paused=wish is Wish.PAUSE)
        return wish

    async def pause(self) -> None:
        """Awaited between two pieces of long work: stands still for as long as the operator wishes.

        Raises:
            Cancelled: the job is to be cancelled, and can be.
        """
        while (wish := await self.heed()) is Wish.PAUSE:
            await self._world.sleep(_LOOK_S)
        if self._cancels(wish):
            raise Cancelled

    def _cancels(self, wish: Wish) -> bool:
        return wish is Wish.CANCEL and self.job.status in _CANCELLABLE

    async def obeying(self, work: Callable[[], Coroutine[Any, Any, T]], *, stands_still: bool = False) -> T:
        """Do what takes long while somebody looks at the operator's wish beside it.

        When the job is cancelled, the work is ended, at the servers too, and has ended when this raises. When it is
        paused, likewise, and it is begun anew when the job is resumed: half a scan or half an index is worth nothing,
        and would hold its snapshot or its locks for as long as the pause lasts.

        Args:
            work: may be begun again after it was cancelled anywhere.
            stands_still: it awaits `pause` itself, so that it goes on from there instead.

        Raises:
            Cancelled: the job is to be cancelled.
        """
        while True:
            await self.pause()
            doing = asyncio.ensure_future(work())
            asked = asyncio.ensure_future(self._asked(pauses=not stands_still))
            try:
                await asyncio.wait([doing, asked], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _ended(doing, asked)
            if not doing.cancelled():
                return doing.result()
            asked.result()

    async def _asked(self, *, pauses: bool) -> None:
        """Until the operator wishes what ends the work."""
        while not self._cancels(wish := await self._world.wish()) and not (pauses and wish is Wish.PAUSE):
            await self._world.sleep(_LOOK_S)


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel those that are not done, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # who wants its result has it from the task
