"""Jobs are looked at and steered. Whoever runs them reads what was asked."""

from __future__ import annotations

import asyncio
from typing import Final

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib_ops.manager.base import Base
from shardlib_ops.reshard.job import WAY_BACK_LOST, Job, Status, Wish

__all__ = ["Steering"]

_BEFORE: Final = frozenset({Status.PENDING, Status.PRECOPY, Status.DELTASYNC, Status.CUTOVER})
_VERBS: Final = {
    Wish.RUN: "be resumed",
    Wish.PAUSE: "be paused",
    Wish.CANCEL: "be cancelled",
    Wish.ROLLBACK: "be rolled back",
    Wish.COMPLETE: "be completed",
}


class Steering(Base):
    """The calls of the manager that concern a job there is."""

    async def list_jobs(self) -> list[Job]:
        """Every job, oldest first."""
        return await asyncio.to_thread(self._jobs.all)

    async def get_job(self, job_id: int) -> Job:
        """One job.

        Raises:
            InvalidTopology: there is none with this id.
        """
        return await asyncio.to_thread(self._jobs.load, _job_id(job_id))

    async def pause(self, job_id: int) -> Job:
        """Let a job stand still; streams go on, so that nothing piles up. Its record says `paused` when it does.

        Copying rows and deleting old ones stand still where they are. A comparison, the building of indexes and the
        check of foreign keys end, at the servers too, and begin anew when the job is resumed.

        Raises:
            InvalidTopology: no such job, or it is over.
        """
        return await self._ask(job_id, Wish.PAUSE, {status for status in Status if not status.over}, "it is over")

    async def resume(self, job_id: int) -> Job:
        """Let a paused job go on, with what was asked of it before the pause.

        Of a job that is not paused it withdraws what was asked and has not happened: a rollback that is waiting for
        its moment is tried no more, and both sides stay in step.

        Raises:
            InvalidTopology: no such job, or it is over.
        """
        return await self._ask(job_id, Wish.RUN, {status for status in Status if not status.over}, "it is over")

    async def cancel(self, job_id: int) -> Job:
        """Undo a job that has not switched: what was copied is deleted from the targets, whose tables stay.

        Whatever is under way ends within seconds, at the servers too. If the switch is faster, the job says so in
        `validation`, where it waits for `rollback` or `complete`, and is not completed by its retention.

        Raises:
            InvalidTopology: no such job, it is over, or it has switched.
        """
        way_out = "it has switched already: in `validation` `rollback` takes it back and `complete` ends it"
        return await self._ask(job_id, Wish.CANCEL, _BEFORE, way_out)

    async def rollback(self, job_id: int) -> Job:
        """Take a switched job back: the sources serve the ranges again, with all that was written since.

        Raises:
            InvalidTopology: no such job, it has not switched, or its old copies are being deleted.
        """
        way_out = "only a job in `validation` can: before it, `cancel`; after it, the old copies are being deleted"
        return await self._ask(job_id, Wish.ROLLBACK, {Status.VALIDATION}, way_out)

    async def complete(self, job_id: int) -> Job:
        """End the window in which a switched job can be rolled back: the old copies are deleted.

        Raises:
            InvalidTopology: no such job, it has not switched, or it was asked to roll back and can.
        """
        job = await self.get_job(job_id)
        asked = await asyncio.to_thread(self._jobs.wish, job.id)
        possible = job.status is Status.VALIDATION and WAY_BACK_LOST not in (job.error or "")
        if possible and asked is Wish.ROLLBACK:
            raise InvalidTopology(
                f"job {job.id} was asked to roll back, and completing it would delete what it would go back to",
                "`resume` withdraws the rollback; then complete it",
            )
        return await self._ask(
            job_id, Wish.COMPLETE, {Status.VALIDATION}, "only a job in `validation` can be completed"
        )

    async def _ask(self, job_id: int, wish: Wish, allowed: set[Status] | frozenset[Status], way_out: str) -> Job:
        job = await self.get_job(job_id)
        if job.status not in allowed:
            raise InvalidTopology(f"job {job.id} is {job.status.value!r}, so it cannot {_VERBS[wish]}", way_out)
        await asyncio.to_thread(self._jobs.ask, job.id, wish)
        return job


def _job_id(given: int | str) -> int:
    try:
        return int(given)
    except (TypeError, ValueError):
        raise InvalidArgument("job_id", given, "a job's number") from None
