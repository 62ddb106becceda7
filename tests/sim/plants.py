"""Faults put in on purpose. Each swaps one function; the checks have to see each of them, or the checks are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from shardlib.topology import Topology
from shardlib.topology.moving import moving_gates
from shardlib_ops.reshard import attempts, runner, validation
from shardlib_ops.reshard.cutover import Cutover, attempt
from shardlib_ops.reshard.gates import sweep
from shardlib_ops.reshard.job import Job
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.world import Blocked, Lost, World
from tests.sim.clients import Client
from tests.sim.flow import FakeFlow
from tests.sim.shard import FakeShard, Record
from tests.sim.world import FakeSide, FakeWorld

__all__ = ["PLANTS", "planted"]


async def _no_drain(self: Cutover, number: int, until: float) -> None:
    sides = [self.world.side(shard_id) for shard_id in self.serving]
    await together(side.guard(active=True) for side in sides)
    for side in sides:
        while await side.foreign_writers():
            if self.world.now() > until:
                raise Blocked("foreign writers")
            await self.world.sleep(0.005)


async def _barrier_first(self: Cutover, topology: Topology, until: float) -> None:
    message = f"early/{self.nonce()}"
    await together(self.world.side(shard_id).barrier(message) for shard_id in self.serving)
    left_s = max(0.05, until - self.world.now())
    await together(flow.heard(message, timeout_s=left_s) for flow in self.flows.values())
    await _CLOSE(self, topology, until)


async def _close_without_stale(self: Cutover, topology: Topology, until: float) -> None:
    gates = moving_gates(topology, self.job.id)
    closings = await together(self.world.side(gate.shard_id).close_gate(gate.number, budget_s=1.0) for gate in gates)
    if not all(closing.closed for closing in closings):
        raise Blocked("held")
    self._closed_at = {}


async def _no_sweep(world: World, shard_ids: Any, *, budget_s: float) -> None:
    """While something moves, whoever came through an older gate stays."""
    if not (await world.topology()).moves:
        await sweep(world, shard_ids, budget_s=budget_s)


async def _reopen_the_same(
    world: World, job: Job, serving: Sequence[str], nonce: Callable[[], str], *, certain: bool = False
) -> None:
    topology = await world.topology()
    for shard_id in serving:
        await world.side(shard_id).guard(active=False)
    for gate in moving_gates(topology, job.id):
        if gate.shard_id in serving:
            await world.side(gate.shard_id).open_gate(gate.number)


async def _nobody_foreign(self: FakeSide) -> tuple[str, ...]:
    await self.world.process.call(lambda: None)
    return ()


async def _without_a_gate_alone(self: FakeSide) -> tuple[str, ...]:
    """Who came through a gate that stays open is not waited for."""
    found = await self.world.process.call(self.shard.unfinished)
    return tuple(flight.name for flight in found if flight.gates is None)


async def _position_apart(self: FakeFlow, batch: list[Record], read: int) -> list[str]:
    before = self.sink.position.get(self.at)

    def rows_alone() -> list[str]:
        fresh = self.apply_now(batch)
        assert before is not None
        self.sink.position[self.at] = before
        return fresh

    def position_alone() -> None:
        self.sink.position[self.at] = max(before or 0, batch[-1].lsn)

    fresh = await self.world.at(self.sink, rows_alone)
    await self.world.at(self.sink, position_alone)
    return fresh


async def _publish_again(self: FakeWorld, after: Topology, *, expected: int) -> bool:
    """What was perhaps not heard is said again, over whatever is there by now."""
    self._held()
    catalog = self.sim.catalog
    try:
        if await self.process.call(
            lambda: catalog.swap(after, expected, self.lease.token), away=catalog.away, late=True
        ):
            return True
    except Lost:
        pass
    found = catalog.topology.version
    again = replace(after, version=found + 1, nonce=self.nonce())
    return await self.process.call(lambda: catalog.swap(again, found, self.lease.token), away=catalog.away)


async def _same_round(self: FakeWorld) -> None:
    """What was sent before, and not answered, may still happen."""
    self._held()


def _everything(self: Client, topology: Topology, shard: FakeShard) -> dict[str, tuple[int, int]]:
    return shard.seen["register"]


_CLOSE = Cutover._close

PLANTS: dict[str, list[tuple[Any, str, Any]]] = {
    "no drain": [(Cutover, "_drain", _no_drain), (Cutover, "_compare", lambda self, compared: _nothing())],
    "barrier before the gate is closed": [
        (Cutover, "_close", _barrier_first),
        (Cutover, "_drain", _no_drain),
        (Cutover, "_compare", lambda self, compared: _nothing()),
    ],
    "no wait for foreign writers": [(FakeSide, "foreign_writers", _nobody_foreign)],
    "no wait for writers behind other gates": [(FakeSide, "foreign_writers", _without_a_gate_alone)],
    "reopen without publishing": [(where, "reopen", _reopen_the_same) for where in (attempt, runner, validation)],
    "stale gates not swept": [
        *((where, "sweep", _no_sweep) for where in (runner, attempts, validation)),
        (Cutover, "_close", _close_without_stale),
    ],
    "position apart from the rows": [(FakeFlow, "apply", _position_apart)],
    "keys not handed to the origin": [(FakeFlow, "hand_over", lambda self, keys: None)],
    "a lost publish said again": [(FakeWorld, "publish", _publish_again)],
    "statements of an earlier round": [(FakeWorld, "anew", _same_round)],
    "unowned copies visible": [(Client, "rows", _everything)],
}


async def _nothing() -> None:
    """Nothing is compared."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Inside, this fault is there."""
    patches = [patch.object(where, what, new) for where, what, new in PLANTS[name]]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
