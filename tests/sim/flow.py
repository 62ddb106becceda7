"""A leg's stream over simulated shards: the same promises as `stream.Stream`, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.job import Leg
from shardlib_ops.reshard.world import Blocked, Failure, Lost
from tests.sim.shard import Change, FakeShard, Record, Rows

if TYPE_CHECKING:
    from tests.sim.world import FakeWorld

__all__ = ["FakeFlow"]

RECORD_BYTES = 1_000
_EVERYTHING = 1 << 60


class FakeFlow:
    """One direction of one leg. `limit`: nothing past this LSN is applied."""

    def __init__(self, world: FakeWorld, leg: Leg, direction: Direction) -> None:
        self.world, self.leg, self.direction = world, leg, direction
        ends = (leg.source, leg.target) if direction == "forward" else (leg.target, leg.source)
        self.origin: FakeShard = world.sim.shards[ends[0]]
        self.sink: FakeShard = world.sim.shards[ends[1]]
        self.slot = f"{leg.number}_{direction[0]}"
        self.at = (leg.number, direction)
        self.moves = world.mover(leg)
        self.running = self.busy = False
        self.applied = 0
        self.limit = _EVERYTHING
        self._heard: dict[str, None] = {}

    async def settled(self, *, timeout_s: float) -> None:
        """Wait until those who write at the origin now have ended, as a new slot does.

        Raises:
            TimeoutError: they have not.
        """
        flights = self.origin.unfinished()
        await self.until(lambda: all(flight.over for flight in flights), self.origin, timeout_s)

    async def until(self, true: Callable[[], bool], shard: FakeShard, timeout_s: float) -> None:
        """Wait for a condition that changes of a shard may make true."""
        async with asyncio.timeout(timeout_s):
            while not true():
                await self.world.process.wait(shard.changes())

    async def create_slot(self) -> None:
        """See `Flow.create_slot`."""
        try:
            await self.settled(timeout_s=10.0)
        except TimeoutError:
            raise Blocked("a transaction keeps a slot from being made") from None

        await self.world.at(self.origin, lambda: self.origin.make_slot(self.slot))

    async def drop_slot(self) -> None:
        """See `Flow.drop_slot`."""
        await self.world.at(self.origin, lambda: self.origin.slots.pop(self.slot, None))

    async def usable(self) -> bool:
        """See `Flow.usable`."""
        call, slots = self.world.process.call, self.origin.slots
        confirmed = await call(lambda: slots[self.slot].confirmed if self.origin.usable(self.slot) else None)
        if confirmed is None:
            return False
        at = await call(lambda: self.sink.position.get(self.at))
        return at is not None and at >= confirmed

    @property
    def lag_bytes(self) -> int | None:
        """See `Flow.lag_bytes`."""
        return (self.origin.end - self.applied) * RECORD_BYTES if self.running else None

    async def heard(self, message: str, *, timeout_s: float) -> None:
        """See `Flow.heard`."""
        await self.until(lambda: message in self._heard, self.sink, timeout_s)

    async def run(self) -> None:
        """See `Flow.run`."""
        try:
            read = await self._start()
            while True:
                self._check_slot()
                end = min(self.origin.end, self.limit)
                if read >= end:
                    await self.world.process.wait(self.origin.changes())
                    continue
                self.busy = True
                batch = self.origin.wal[read : min(end, read + self.world.sim.rng.randint(1, 8))]
                fresh = await self.apply(batch, read)
                read = batch[-1].lsn
                if fresh:
                    await self.world.at(self.origin, partial(self.hand_over, tuple(fresh)))
                self.applied = read
                self._heard.update(dict.fromkeys(record.message for record in batch if record.message is not None))
                self._confirm(read)
                self.busy = False
                self.sink.tell()
                self.origin.tell()
        finally:
            self.running = self.busy = False

    def _check_slot(self) -> None:
        if not self.origin.usable(self.slot):
            lost = f"slot {self.slot} is lost"
            raise Failure(lost) if self.world.sim.strict_slots else Lost(lost)

    async def _start(self) -> int:
        call = self.world.process.call
        self._check_slot()
        read = await call(lambda: self.sink.position.get(self.at))
        if read is None:
            raise Failure(f"no start of {self.slot} is written down")
        self._check_slot()
        slot = self.origin.slots[self.slot]
        if read < slot.confirmed:
            raise Lost("the sink has lost transactions")
        known = self.sink.keys or {}
        again = tuple(key for key, lsn in known.items() if lsn > slot.confirmed and self.moves(key))
        if again:
            await self.world.at(self.origin, partial(self.hand_over, again))
        self.applied, self.running = read, True
        self.sink.tell()
        return max(read, slot.point)

    def _confirm(self, lsn: int) -> None:
        slot = self.origin.slots.get(self.slot)
        if slot is not None:
            slot.confirmed = max(slot.confirmed, lsn)

    async def apply(self, batch: list[Record], read: int) -> list[str]:
        """One transaction at the sink; the keys that it did not know."""
        return await self.world.at(self.sink, lambda: self.apply_now(batch))

    def apply_now(self, batch: list[Record]) -> list[str]:
        """Rows, keys and position, all of them or nothing. What is below the position was applied before."""
        sink = self.sink
        position = sink.position.get(self.at)
        if position is None or sink.keys is None:
            raise Lost("the sink does not know of the stream any more")
        changes: list[Change] = []
        fresh: list[str] = []
        for record in batch:
            if record.lsn <= position:
                continue
            for change in record.changes:
                if self.moves(change.key) and record.lsn > sink.copied.get((self.leg.number, change.table), -1):
                    changes.append(change)
                    if change.key not in sink.keys:
                        fresh.append(change.key)
                    sink.keys[change.key] = record.lsn
        sink.write_now(changes)
        sink.position[self.at] = max(position, batch[-1].lsn)
        return fresh

    def hand_over(self, keys: tuple[str, ...]) -> None:
        """Let the origin's key table know keys that appeared at the sink."""
        if self.origin.keys is None:
            raise Lost("the origin has no key table")
        for key in keys:
            self.origin.keys.setdefault(key, 0)

    def chosen(self, rows: Rows, keys: list[str] | None) -> Rows:
        """The leg's part of rows: of some keys, or of all."""
        return {
            table: {key: what for key, what in found.items() if self.moves(key) and (keys is None or key in keys)}
            for table, found in rows.items()
        }
