"""One change of the tables at a time, and none while a job moves rows; both sides look for the other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from os import getpid
from typing import Any, Final

from shardlib.catalog import Catalog, Lease
from shardlib.errors import InvalidTopology
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.schema.change import CHANGE, Change, decode_change, encode_change
from shardlib_ops.reshard.store import JobStore

__all__ = ["Turn", "change_of", "taken"]

_LEASE: Final = "schema"
_LEASE_S: Final = 15.0
_LOOK_S: Final = 0.5
_MOVING: Final = frozenset({Status.PRECOPY, Status.DELTASYNC, Status.CUTOVER, Status.VALIDATION})


def change_of(catalog: Catalog) -> Change | None:
    """The last change, None if there was none. Blocking."""
    found = catalog.read_document(CHANGE)
    return None if found is None else decode_change(found.data)


class Turn:
    """The right to change the tables, while the lease is held.

    Attributes:
        change: the record as it is stored.
    """

    def __init__(self, catalog: Catalog, jobs: JobStore, lease: Lease) -> None:
        self._catalog, self._jobs, self._lease = catalog, jobs, lease
        self._revision: int | None = None
        self._writing = asyncio.Lock()
        self.change = Change()

    async def begin(self, target: tuple[str, ...]) -> None:
        """Write down what is to be done, then see that no job is at work: one that begins later sees the record.

        Raises:
            InvalidTopology: a job moves rows.
        """
        before, alone = await self._before()
        await self.write(Change(target=target, began_at=_stamp(), alone=alone, done=before.done if alone else ()))
        try:
            await self.look_at_jobs()
        except InvalidTopology:
            if not alone:  # nothing has happened
                await self.write(self.change.changed(ended_at=_stamp(), error="refused: a job was at work"))
            raise
        await self.write(self.change.changed(alone=True))

    async def look_first(self) -> None:
        """No job is at work, before anything else is looked at; `begin` looks again.

        Raises:
            InvalidTopology: one is.
        """
        _, alone = await self._before()
        refuse_moving(await asyncio.to_thread(self._jobs.all), starting=not alone)

    async def _before(self) -> tuple[Change, bool]:
        """The record that was left, and whether every job that has begun since has seen it."""
        found = await asyncio.to_thread(self._catalog.read_document, CHANGE)
        before = Change() if found is None else decode_change(found.data)
        self._revision = None if found is None else found.revision
        return before, found is not None and before.open and before.alone

    async def look_at_jobs(self) -> None:
        """No job is at work.

        Raises:
            InvalidTopology: one is.
        """
        refuse_moving(await asyncio.to_thread(self._jobs.all), starting=not self.change.alone)

    async def write(self, change: Change) -> None:
        """Store the record while the lease is held.

        Raises:
            Conflict: the lease is lost.
            CatalogUnavailable: no answer.
        """
        async with self._writing:
            self._revision = await asyncio.to_thread(
                self._catalog.write_document, CHANGE, encode_change(change), expected=self._revision, lease=self._lease
            )
            self.change = change

    async def at(self, **changes: Any) -> None:
        """Store the record with these fields replaced."""
        await self.write(self.change.changed(**changes))

    async def end(self, **changes: Any) -> None:
        """Write down that every shard is alike again."""
        await self.write(self.change.changed(ended_at=_stamp(), **changes))

    async def kept(self) -> None:
        """Return when the lease is lost; to be awaited beside the work."""
        while self._lease.alive():  # noqa: ASYNC110 - a lease tells nobody of its end
            await asyncio.sleep(_LOOK_S)


def refuse_moving(jobs: Iterable[Job], *, starting: bool = True) -> None:
    """No job moves rows; nor, with `starting`, is about to.

    Raises:
        InvalidTopology: one does.
    """
    for job in jobs:
        if job.status in _MOVING or (starting and job.status is Status.PENDING and job.started_at is not None):
            way_out = (
                "`reshard complete` or `reshard rollback` ends it; then run this again"
                if job.status is Status.VALIDATION
                else f"wait until it has switched and complete it, or `reshard cancel {job.id}`; then run this again"
            )
            raise InvalidTopology(
                f"job {job.id} is {job.status.value!r}, and a change of the tables would break its streams", way_out
            )


@asynccontextmanager
async def taken(catalog: Catalog, jobs: JobStore, *, wait_s: float) -> AsyncIterator[Turn]:
    """The turn, for the body.

    Raises:
        InvalidTopology: another holds it for the whole of `wait_s`, or it was lost in the middle.
        CatalogUnavailable: no answer.
    """
    holder = f"{socket.gethostname()} {getpid()}"
    lease = await asyncio.to_thread(catalog.acquire, _LEASE, ttl_s=_LEASE_S, holder=holder, wait_s=wait_s)
    if lease is None:
        raise InvalidTopology(
            "another process changes the tables of this cluster now",
            f"wait for it (`--wait SECONDS`); if it is gone, its lease ends within {_LEASE_S:g} s",
        )
    try:
        yield Turn(catalog, jobs, lease)
    finally:
        await asyncio.to_thread(lease.release)


def _stamp() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
