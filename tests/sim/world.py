"""What a job's runner sees, over simulated servers: `Side` and `World`, as weak as the real ones may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from shardlib.fence.gate import Closing, Holder
from shardlib.topology import Topology
from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.job import Job, Leg, Wish
from shardlib_ops.reshard.together import first_of
from shardlib_ops.reshard.world import Blocked, Compared, Failure, Flow, Lost, Mismatch, Superseded
from tests.sim.flow import FakeFlow
from tests.sim.process import Killed, Process, ring
from tests.sim.shard import TABLES, Change, FakeShard, Rows, Transaction

if TYPE_CHECKING:
    from tests.sim.schedule import Simulation

__all__ = ["FakeSide", "FakeWorld", "Lease"]

T = TypeVar("T")

_ATTEMPT_S = 0.02
_ROUND_BITS = 20
_WISH_S = 0.2
_LEASE_LOOK_S = 0.5


class Lease:
    """The job's lease, as its holder believes it: counted from when the last renewal was sent."""

    def __init__(self, process: Process, sim: Simulation, token: int, sent_at: float) -> None:
        self.token, self._process, self._sim = token, process, sim
        self._until = sent_at + sim.ttl_s
        self.lost = False

    def alive(self) -> bool:
        """Whether it is held, by the holder's clock."""
        return not self.lost and self._sim.loop.time() < self._until

    async def keep(self) -> None:
        """Renew it until it is lost."""
        catalog = self._sim.catalog
        while True:
            await self._process.sleep(self._sim.ttl_s / 3 * self._sim.rng.uniform(0.8, 1.0))
            sent_at = self._sim.loop.time()
            try:
                kept = await self._process.call(lambda: catalog.renew(self.token, self._sim.ttl_s), away=catalog.away)
            except Lost:
                continue
            if not kept:
                self.lost = True
                return
            self._until = sent_at + self._sim.ttl_s


class FakeSide:
    """One shard of a job."""

    def __init__(self, world: FakeWorld, shard: FakeShard) -> None:
        self.world, self.shard = world, shard
        self._before_guard: list[Transaction] | None = None

    async def _do(self, effect: Callable[[], None]) -> None:
        def checked() -> None:
            effect()
            self.shard.tell()

        await self.world.process.call(_with(self.world.token, self.shard, checked), late=True)

    async def identity(self) -> str:
        """See `Side.identity`. Servers do not fail over here."""
        return self.shard.id

    async def claim(self) -> None:
        """See `Side.claim`."""
        token = self.world.token
        await self.world.process.call(lambda: self.shard.claim(token), late=True)

    async def prepare(self) -> None:
        """See `Side.prepare`."""

        def make() -> None:
            if self.shard.keys is None:
                self.shard.keys = {}
            if self.shard.guard is None:
                self.shard.guard = False

        await self._do(make)

    async def retire(self) -> None:
        """See `Side.retire`."""
        legs = self.world.sim.catalog.job.legs
        names = [f"{leg.number}_f" for leg in legs if leg.source == self.shard.id]
        names += [f"{leg.number}_r" for leg in legs if leg.target == self.shard.id]
        await self._do(lambda: self.shard.retire(names))

    async def gates(self) -> tuple[int, ...]:
        """See `Side.gates`."""
        return await self.world.process.call(lambda: tuple(sorted(self.shard.open)))

    async def open_gate(self, number: int) -> None:
        """See `Side.open_gate`."""
        await self._do(lambda: self.shard.open_gate(number))

    async def close_gate(self, number: int, *, budget_s: float) -> Closing:
        """See `Side.close_gate`. It ends before this does, also when this is cancelled."""
        done = asyncio.ensure_future(self._close(number, budget_s))
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            await asyncio.wait([done])
            done.exception()
            raise

    async def _close(self, number: int, budget_s: float) -> Closing:
        process, shard, loop = self.world.process, self.shard, self.world.sim.loop
        began, attempts, drop = loop.time(), 0, _with(self.world.token, shard, lambda: shard.drop_gate(number))
        while True:
            attempts += 1
            if await process.call(drop, late=True):
                return Closing(True, attempts, loop.time() - began, lsn=str(shard.end))
            if await self._attempt(number):
                return Closing(True, attempts, loop.time() - began, lsn=str(shard.end))
            pause_s = _ATTEMPT_S * (0.5 + self.world.sim.rng.random())
            if loop.time() - began + pause_s >= budget_s:
                names = [flight.name for flight in shard.holders(number)]
                held = tuple(Holder(None, name, "app", name, "active", 0.0) for name in names)
                return Closing(False, attempts, loop.time() - began, held)
            await process.sleep(pause_s)

    async def _attempt(self, number: int) -> bool:
        """Wait for the holders a moment, while newcomers wait behind. The server goes on when the caller dies."""
        shard, token = self.shard, self.world.token
        until = self.world.sim.loop.time() + _ATTEMPT_S
        shard.closing[number] = shard.closing.get(number, 0) + 1

        def end(*, drop: bool) -> bool:
            shard.closing[number] -= 1
            if not shard.closing[number]:
                del shard.closing[number]
            dropped = drop and shard.token == token and shard.drop_gate(number)
            shard.tell()
            return dropped

        try:
            while shard.holders(number) and (left_s := until - self.world.sim.loop.time()) > 1e-6:
                waiting = shard.changes()
                handle = self.world.sim.loop.call_later(left_s, ring, waiting)
                try:
                    await self.world.process.wait(waiting)
                finally:
                    handle.cancel()
        except Killed:
            self.world.sim.loop.call_later(_ATTEMPT_S, lambda: end(drop=True))
            raise
        except BaseException:
            end(drop=False)
            raise
        return end(drop=True)

    async def replayed(self, lsn: str, *, timeout_s: float) -> None:
        """See `Side.replayed`."""
        await self.world.process.call(lambda: None)
        if self.world.sim.faulty and self.world.sim.rng.random() < 0.02:
            await self.world.process.sleep(timeout_s)
            raise Blocked(f"a replica of {self.shard.id} has not replayed {lsn}")
        try:
            async with asyncio.timeout(timeout_s):
                while not self.shard.replayed(int(lsn)):
                    await self.world.process.wait(self.shard.changes())
        except TimeoutError:
            raise Blocked(f"a replica of {self.shard.id} has not replayed {lsn}") from None

    async def replicated(self, *, timeout_s: float) -> None:
        """See `Side.replicated`. Who lags is found by `replayed`."""

    async def guard(self, *, active: bool) -> None:
        """See `Side.guard`."""

        self._before_guard = None

        def turn() -> None:
            if active or self.shard.guard is not None:
                self.shard.guard = active

        await self._do(turn)

    async def foreign_writers(self) -> tuple[str, ...]:
        """See `Side.foreign_writers`."""
        found = await self.world.process.call(self.shard.unfinished)
        if self._before_guard is None:
            self._before_guard = found
        return tuple(flight.name for flight in found if flight in self._before_guard)

    async def old_writers(self, *, older_s: float) -> tuple[str, ...]:
        """See `Side.old_writers`."""
        found = await self.world.process.call(self.shard.unfinished)
        return tuple(flight.name for flight in found if flight.began + older_s <= self.world.sim.loop.time())

    async def barrier(self, message: str) -> None:
        """See `Side.barrier`."""
        await self._do(lambda: self.shard.message(message))

    async def wal_position(self) -> str:
        """See `Side.wal_position`."""
        return await self.world.process.call(lambda: str(self.shard.end))


class FakeWorld:
    """The world of the job in one process, under one lease."""

    side_type: type[FakeSide] = FakeSide
    flow_type: type[FakeFlow] = FakeFlow

    def __init__(self, sim: Simulation, process: Process, lease: Lease) -> None:
        self.sim, self.process, self.lease = sim, process, lease
        self.token = lease.token << _ROUND_BITS
        self.now: Callable[[], float] = sim.loop.time
        self.sleep: Callable[[float], Awaitable[None]] = process.sleep
        self.jitter: Callable[[], float] = sim.rng.random
        self.stamp: Callable[[], str] = lambda: datetime.fromtimestamp(sim.loop.time(), UTC).isoformat()
        self.nonce: Callable[[], str] = sim.nonce
        self.waits: Callable[[str | None], Awaitable[None]]
        self._sides = {shard_id: self.side_type(self, shard) for shard_id, shard in sim.shards.items()}
        self._flows: dict[tuple[int, Direction], FakeFlow] = {}
        self._wish: tuple[float, Wish] | None = None
        self._revision = sim.catalog.revision
        self._tables = sim.catalog.topology.tables

    def mover(self, leg: Leg) -> Callable[[str], bool]:
        """Whether a key is of a leg."""
        return lambda key: self.sim.leg_of.get(key) == leg.number

    def _held(self) -> None:
        if not self.lease.alive():
            raise Superseded("the lease is lost")

    async def anew(self) -> None:
        """See `World.anew`."""
        self._held()
        self.token += 1

    async def topology(self) -> Topology:
        """See `World.topology`."""
        catalog = self.sim.catalog
        return await self.process.call(lambda: catalog.topology, away=catalog.away)

    def check_tables(self, found: Topology) -> None:
        """See `World.check_tables`."""
        if found.tables != self._tables:
            raise Failure("the tables changed")

    async def publish(self, after: Topology, *, expected: int) -> bool:
        """See `World.publish`."""
        self._held()
        catalog = self.sim.catalog
        swapped = await self.process.call(
            lambda: catalog.swap(after, expected, self.lease.token), late=True, away=catalog.away
        )
        if not swapped:
            self._held()
        return swapped

    async def save(self, job: Job) -> None:
        """See `World.save`."""
        self._held()
        catalog, expected = self.sim.catalog, self._revision
        sent: list[bool] = []

        def store() -> int | None:
            return catalog.save(job, expected, self.lease.token, late=bool(sent))

        try:
            revision = await self.process.call(store, late=True, away=catalog.away)
        except BaseException:
            sent.append(True)
            raise
        if revision is None:
            raise Superseded("the record was changed by another runner")
        self._revision = revision

    async def wish(self) -> Wish:
        """See `World.wish`."""
        self._held()
        now, catalog = self.now(), self.sim.catalog
        if self._wish is None or now - self._wish[0] > _WISH_S:
            try:
                self._wish = now, await self.process.call(lambda: catalog.wish, away=catalog.away)
            except Lost:
                if self._wish is None:
                    raise
                self._wish = now, self._wish[1]
        return self._wish[1]

    def side(self, shard_id: str) -> FakeSide:
        """See `World.side`."""
        return self._sides[shard_id]

    def flow(self, leg: Leg, direction: Direction) -> FakeFlow:
        """See `World.flow`."""
        key = (leg.number, direction)
        if key not in self._flows:
            self._flows[key] = self.flow_type(self, leg, direction)
        return self._flows[key]

    def _ends(self, leg: Leg) -> tuple[FakeShard, FakeShard]:
        return self.sim.shards[leg.source], self.sim.shards[leg.target]

    async def schema_before_rows(self, leg: Leg) -> None:
        """See `World.schema_before_rows`."""
        target, moves = self._ends(leg)[1], self.mover(leg)

        def look() -> None:
            ours = target.keys or {}
            if found := [key for key in target.seen["register"] if moves(key) and key not in ours]:
                raise Failure(f"{target.id} holds rows of {found[0]} already")

        await self.process.call(look)

    async def schema_after_rows(self, leg: Leg) -> None:
        """See `World.schema_after_rows`."""
        await self.process.call(lambda: None)

    async def validate_foreign_keys(self, leg: Leg) -> tuple[str, ...]:
        """See `World.validate_foreign_keys`."""
        await self.process.call(lambda: None)
        return ()

    async def copied(self, leg: Leg) -> bool:
        """See `World.copied`."""
        target = self._ends(leg)[1]
        whole = await self.process.call(lambda: all((leg.number, table) in target.copied for table in TABLES))
        return whole and await self.flow(leg, "forward").usable()

    async def copy(self, leg: Leg, pause: Callable[[], Awaitable[None]]) -> None:
        """See `World.copy`: the first slot stays while it is usable; tables that are whole are kept."""
        source, target = self._ends(leg)
        flow = self.flow(leg, "forward")
        usable = await flow.usable()
        if not usable:
            await flow.drop_slot()
            await self.at(target, lambda: [target.copied.pop((leg.number, table), None) for table in TABLES])
        await self.at(target, lambda: self._empty_half_copied(leg, target))
        lsn, rows = await self._snapshot(leg, flow, make=not usable)
        if not usable:
            await self.at(target, lambda: target.position.update({flow.at: lsn}))
        rows = flow.chosen(rows, None)
        keys = tuple(dict.fromkeys(key for table in TABLES for key in rows[table]))
        for shard in (target, source):
            await self.at(shard, partial(_remember, shard, keys))
        await pause()
        for table in TABLES:
            if (leg.number, table) not in target.copied:
                await self._copy_table(leg, table, rows, lsn, pause)

    async def _copy_table(
        self, leg: Leg, table: str, rows: Rows, lsn: int, pause: Callable[[], Awaitable[None]]
    ) -> None:
        target = self._ends(leg)[1]
        found = list(rows[table].items())
        size = self.sim.rng.randint(2, 6)
        for at in range(0, len(found), size):
            chunk = [Change(table, key, what) for key, what in found[at : at + size]]
            await self.at(target, partial(target.write_now, chunk))
            await pause()
        await self.at(target, lambda: target.copied.update({(leg.number, table): lsn}))

    async def at(self, shard: FakeShard, effect: Callable[[], T]) -> T:
        """Have a runner's transaction done at a shard; one whose answer is lost may happen later."""
        return await self.process.call(_with(self.token, shard, effect), late=True)

    def _empty_half_copied(self, leg: Leg, target: FakeShard) -> None:
        moves = self.mover(leg)
        half = [table for table in TABLES if (leg.number, table) not in target.copied]
        target.write_now(
            [
                Change(table, key, None)
                for table in half
                for key in _keys(target)
                if moves(key) and key in target.seen[table]
            ]
        )

    async def _snapshot(self, leg: Leg, flow: FakeFlow, *, make: bool) -> tuple[int, Rows]:
        source = self._ends(leg)[0]
        await flow.settled(timeout_s=30.0)

        def export() -> tuple[int, Rows]:
            if make:
                source.make_slot(flow.slot)
            return source.snapshot()

        return await self.process.call(_with(self.token, source, export), late=True)

    async def compare(self, leg: Leg, flow: Flow, *, since: str | None) -> Compared:
        """See `World.compare`: under a slot's snapshot, with the applier stopped at its point."""
        assert isinstance(flow, FakeFlow)
        flow.limit = 0
        try:
            await flow.until(lambda: flow.running and not flow.busy, flow.sink, 30.0)
            lsn, rows = await self._snapshot(leg, flow, make=False)
            flow.limit = lsn
            flow.origin.tell()
            await flow.until(lambda: flow.applied >= lsn and not flow.busy, flow.sink, 30.0)
            copies = {table: dict(found) for table, found in flow.sink.seen.items()}
            known = dict(_keys(flow.sink))
        finally:
            flow.limit = 1 << 60
            flow.origin.tell()
        await self.process.call(lambda: None)
        keys = None if since is None else [key for key, at in known.items() if at > int(since)]
        if flow.chosen(rows, keys) != flow.chosen(copies, keys):
            raise Mismatch(f"leg {leg.number} differs: {_difference(flow, rows, copies, keys)}")
        return Compared(str(lsn), len(known) if keys is None else len(keys))

    async def compare_closed(self, leg: Leg, *, since: str) -> int:
        """See `World.compare_closed`."""
        flow = self.flow(leg, "forward")
        keys = await self.process.call(
            lambda: [key for key, at in _keys(flow.sink).items() if at > int(since) and flow.moves(key)]
        )
        here = await self.process.call(lambda: flow.chosen(flow.origin.seen, keys))
        there = await self.process.call(lambda: flow.chosen(flow.sink.seen, keys))
        if here != there:
            raise Mismatch(f"leg {leg.number} differs while closed: {_difference(flow, here, there, keys)}")
        return len(keys)

    async def advance_sequences(self, leg: Leg, direction: Direction, *, ahead: int) -> None:
        """See `World.advance_sequences`."""
        await self.at(self._ends(leg)[1 if direction == "forward" else 0], lambda: None)

    async def start_reverse(self, leg: Leg, lsn: str) -> None:
        """See `World.start_reverse`."""
        source = self._ends(leg)[0]
        await self.at(source, lambda: source.position.update({(leg.number, "reverse"): int(lsn)}))

    async def purge(self, leg: Leg, shard_id: str, pause: Callable[[], Awaitable[None]]) -> None:
        """See `World.purge`."""
        shard = self.sim.shards[shard_id]
        numbers = [one.number for one in self.sim.catalog.job.legs if shard_id in (one.source, one.target)]
        while True:
            left = await self.process.call(
                lambda: [key for key in shard.keys or () if any(key in shard.seen[table] for table in TABLES)]
            )
            if any(self.sim.leg_of.get(key) not in numbers for key in left):
                raise Failure(f"{shard_id}: a key of the key table is of no range of the job")
            if not left:
                return
            size = self.sim.rng.randint(1, 6)
            batch = [Change(table, key, None) for key in left[:size] for table in TABLES]
            await self.at(shard, partial(shard.write_now, batch))
            await pause()

    @asynccontextmanager
    async def running(self, flows: Sequence[Flow]) -> AsyncIterator[None]:
        """See `World.running`."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(flow.run()) for flow in flows]
                tasks.append(group.create_task(self._watch_lease()))
                try:
                    yield
                finally:
                    for task in tasks:
                        task.cancel()
        except BaseExceptionGroup as errors:
            raise first_of(errors) from None

    async def _watch_lease(self) -> None:
        while True:
            self._held()
            await self.process.sleep(_LEASE_LOOK_S)


def _with(token: int, shard: FakeShard, effect: Callable[[], T]) -> Callable[[], T]:
    """What a runner sends: it bears the token of when it was sent, whenever it arrives."""

    def checked() -> T:
        shard.claimed(token)
        return effect()

    return checked


def _keys(shard: FakeShard) -> dict[str, int]:
    if shard.keys is None:
        raise Lost(f"{shard.id} has no key table")
    return shard.keys


def _remember(shard: FakeShard, keys: Sequence[str]) -> None:
    known = _keys(shard)
    for key in keys:
        known.setdefault(key, 0)


def _difference(flow: FakeFlow, rows: Rows, copies: Rows, keys: list[str] | None) -> str:
    ours, theirs = flow.chosen(rows, keys), flow.chosen(copies, keys)
    for table in TABLES:
        for key in dict.fromkeys((*ours[table], *theirs[table])):
            if ours[table].get(key) != theirs[table].get(key):
                return f"{table} of {key}: {ours[table].get(key)} and {theirs[table].get(key)}"
    return "nothing"
