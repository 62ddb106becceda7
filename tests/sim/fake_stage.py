"""The simulated world as a `Stage`: the pieces of `Simulation`, with no schedule and no weather."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal, TypeVar

from shardlib_ops.reshard.job import Job, Leg
from shardlib_ops.reshard.world import Lost, World
from tests.sim.process import Process
from tests.sim.schedule import Faults, Simulation
from tests.sim.shard import Closed, FakeShard, Guarded, Transaction
from tests.sim.stage import Client, Fact, Held, Rows, play
from tests.sim.world import FakeWorld, Lease

__all__ = ["FakeStage", "play_fake"]

T = TypeVar("T")


def play_fake(fact: Fact, seed: int = 1) -> None:
    """Play a fact on a simulated world of its own, in virtual time."""
    sim = Simulation(seed, "split", Faults())

    async def main() -> None:
        await play(FakeStage(sim), fact)

    sim.loop.run(main)
    assert sim.loop.surprises == []


class _Wire(Process):
    """A process whose next call that changes something may lose its question, or its answer."""

    lost: Literal["question", "answer"] | None = None
    late: Callable[[], object] = staticmethod(lambda: None)

    async def call(self, effect: Callable[[], T], *, late: bool = False, away: bool = False) -> T:
        """See `Process.call`."""
        lost = self.lost if late else None
        if lost is None:
            return await super().call(effect, late=late, away=away)
        self.lost = None
        if lost == "question":
            self.late = effect
        else:
            effect()
        await self.sleep(0.5)
        raise Lost("no answer")


class _Held:
    """A lease and the task that keeps it."""

    def __init__(self, sim: Simulation, token: int) -> None:
        self.process = _Wire(sim, "holder")
        self.token, self._sim = token, sim
        self.lease = Lease(self.process, sim, token, sim.loop.time())
        self._keeping = sim.loop.create_task(self.lease.keep())

    def alive(self) -> bool:
        return self.lease.alive()

    async def release(self) -> None:
        self.cut()
        self.lease.lost = True
        self._sim.catalog.release(self.token)

    def cut(self) -> None:
        self._keeping.cancel()


class _Client:
    """A transaction at a simulated shard."""

    def __init__(self, shard: FakeShard, flight: Transaction) -> None:
        self._shard, self._flight = shard, flight

    async def enter(self, gate: int) -> None:
        try:
            await self._shard.enter(self._flight, gate)
        except Closed:
            await self.rollback()
            raise

    async def write(self, key: str, uid: str) -> None:
        await self._shard.lock(self._flight, key)
        try:
            self._shard.write(self._flight, key, None, uid)
        except Guarded:
            await self.rollback()
            raise

    async def commit(self) -> None:
        await self._shard.commit(self._flight)

    async def rollback(self) -> None:
        self._shard.end_flight(self._flight)


class FakeStage:
    """See `Stage`."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self.job: Job = sim.catalog.job
        self.leg: Leg = self.job.legs[0]
        topology = sim.catalog.topology
        self.moving = [key for key in sim.token_of if key in sim.leg_of]
        self.staying = [
            key
            for key, token in sim.token_of.items()
            if key not in sim.leg_of and topology.shard_of(token).id == self.leg.source
        ]
        self._number = 1_000

    async def lease(self, ttl_s: float) -> Held | None:
        self._sim.ttl_s = ttl_s
        token = self._sim.catalog.grant(ttl_s)
        return None if token is None else _Held(self._sim, token)

    def world(self, lease: Held) -> World:
        assert isinstance(lease, _Held)
        return FakeWorld(self._sim, lease.process, lease.lease)

    async def stored(self) -> Job:
        return self._sim.catalog.job

    async def begin(self, shard_id: str, name: str) -> Client:
        shard = self._sim.shards[shard_id]
        return _Client(shard, shard.begin(name))

    async def rows(self, shard_id: str) -> Rows:
        seen = self._sim.shards[shard_id].seen
        return {key: (count, tuple(sorted(seen["bag"][key]))) for key, (_, count) in seen["register"].items() if count}

    async def keys(self, shard_id: str) -> set[str]:
        return set(self._sim.shards[shard_id].keys or ())

    def new_gate(self) -> int:
        self._number += 1
        return self._number

    def sent_open(self, world: World, shard_id: str, number: int) -> Callable[[], Awaitable[None]]:
        assert isinstance(world, FakeWorld)
        wire = world.process
        assert isinstance(wire, _Wire)
        wire.lost = "question"
        sending = world.side(shard_id).open_gate(number).__await__()
        sending.send(None)  # up to where it waits for the answer
        sending.close()
        late = wire.late

        async def arrives() -> None:
            late()

        return arrives

    @asynccontextmanager
    async def losing(
        self, world: World, what: Literal["question", "answer"]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        assert isinstance(world, FakeWorld)
        wire = world.process
        assert isinstance(wire, _Wire)

        async def arrives() -> None:
            wire.late()

        wire.lost = what
        yield arrives
        assert wire.lost is None, "nothing was sent"

    @asynccontextmanager
    async def stalled(self, shard_id: str) -> AsyncIterator[None]:
        shard, over = self._sim.shards[shard_id], asyncio.Event()
        wait = shard._wait

        async def until_over(_: float) -> None:
            await over.wait()

        shard._wait = until_over
        try:
            yield
        finally:
            shard._wait = wait
            over.set()

    @asynccontextmanager
    async def lagging(self, shard_id: str) -> AsyncIterator[None]:
        shard = self._sim.shards[shard_id]
        shard.replay_until(shard.end)
        try:
            yield
        finally:
            shard.replay_until(None)

    async def replica_gates(self, shard_id: str) -> tuple[int, ...]:
        return self._sim.shards[shard_id].replica_gates()

    async def lose_slot(self, leg: Leg) -> None:
        shard = self._sim.shards[leg.source]
        shard.slots[f"{leg.number}_f"].lost = True
        shard.tell()

    async def set_back(self, leg: Leg) -> None:
        self._sim.shards[leg.target].position[leg.number, "forward"] -= 1
