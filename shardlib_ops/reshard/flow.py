"""A job's stream on real servers: its slot is made, looked at and dropped here; each run has a stream of its own."""

from __future__ import annotations

from typing import Any, Final, Protocol

from psycopg import AsyncConnection

from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import Direction, position
from shardlib_ops.reshard.job import Leg
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.progress import Tracker
from shardlib_ops.reshard.side import ShardSide, translated
from shardlib_ops.reshard.stream import (
    Stream,
    create_slot,
    drop_slot,
    lsn_number,
    slot_state,
    who_blocks_a_slot,
)
from shardlib_ops.reshard.world import Blocked

__all__ = ["StreamFlow", "who_blocks"]

_SLOT_S: Final = 10.0


class Ends(Protocol):
    """What a flow needs of its world: `servers.Servers`."""

    runner: Runner
    progress: Tracker

    def side(self, shard_id: str) -> ShardSide:
        """One shard of the job."""
        ...

    def link(self, leg: Leg, direction: Direction = "forward") -> Link:
        """One leg in one direction."""
        ...


async def who_blocks(conn: AsyncConnection[Any]) -> str:
    """Whom the making of a slot waits for; empty for nobody."""
    return await who_blocks_a_slot(conn, older_than_s=1.0, nobody="")


class StreamFlow:
    """A `Stream` as a `Flow`: made anew for each run, since a broken one does not go on."""

    def __init__(self, servers: Ends, leg: Leg, direction: Direction) -> None:
        self._servers, self.leg, self.direction = servers, leg, direction
        self._stream: Stream | None = None

    @property
    def stream(self) -> Stream:
        """The running stream.

        Raises:
            Blocked: it has not started yet.
        """
        if self._stream is None:
            raise Blocked("the stream has not started yet")
        return self._stream

    def _ends(self) -> tuple[ShardSide, ShardSide]:
        forward = self.direction == "forward"
        leg = self.leg
        origin, sink = (leg.source, leg.target) if forward else (leg.target, leg.source)
        return self._servers.side(origin), self._servers.side(sink)

    @property
    def _link(self) -> Link:
        return self._servers.link(self.leg, self.direction)

    @translated
    async def create_slot(self) -> None:
        """See `Flow.create_slot`."""
        try:
            async with self._ends()[0].naming(f"slot {self._link.slot!r}", who_blocks):
                await create_slot(self._link, timeout_s=_SLOT_S)
        except TimeoutError as error:
            raise Blocked(str(error)) from error

    @translated
    async def drop_slot(self) -> None:
        """See `Flow.drop_slot`."""
        origin, _ = self._ends()
        async with origin.using() as conn:
            await drop_slot(conn, self._link.slot, runner=self._servers.runner)

    @translated
    async def usable(self) -> bool:
        """See `Flow.usable`."""
        origin, sink = self._ends()
        async with origin.using() as conn:
            state = await slot_state(conn, self._link.slot)
        async with sink.using() as conn:
            at = await position(conn, self._servers.runner.job, self.leg.number, self.direction)
        # A slot that is ahead of the sink shows that the sink has lost transactions, as in a failover.
        return state is not None and not state.lost and at is not None and lsn_number(at) >= state.confirmed

    @translated
    async def open(self) -> None:
        """Make the stream, so that it can be asked and waited for from the moment on that it is to run."""
        origin, sink = self._ends()
        # Both ways: after a rollback the keys that were born on a target are hidden and deleted there.
        self._stream = Stream(self._link, await sink.shapes(), on_new_keys=origin.add_keys)
        self._servers.progress.opened(self.leg.number, self.direction, self._stream)

    @translated
    async def run(self) -> None:
        """See `Flow.run`."""
        try:
            await self.stream.run()
        finally:
            self._stream = None
            self._servers.progress.opened(self.leg.number, self.direction, None)

    @property
    def lag_bytes(self) -> int | None:
        """See `Flow.lag_bytes`."""
        return None if self._stream is None else self._stream.lag_bytes

    async def heard(self, message: str, *, timeout_s: float) -> None:
        """See `Flow.heard`."""
        await self.stream.heard(message, timeout_s=timeout_s)
