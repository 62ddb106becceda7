"""A job that is cancelled while nobody knows whether its moves were announced."""

from __future__ import annotations

from shardlib.topology import Topology
from shardlib_ops.reshard.job import Status, Wish
from shardlib_ops.reshard.world import Lost
from tests.sim.process import Process
from tests.sim.schedule import Faults, Simulation
from tests.sim.world import FakeWorld


def test_moves_that_are_announced_late_are_taken_away_again_or_never_arrive() -> None:
    arrived = set()
    for late_ms in range(0, 1_500, 3):

        class Late(FakeWorld):
            late_s = late_ms / 1000

            async def publish(self, after: Topology, *, expected: int) -> bool:
                sim = self.sim
                if after.moves and sim.steps and sim.steps[-1] == "sides_prepared":
                    sim.loop.call_later(self.late_s, sim.catalog.swap, after, expected, self.lease.token)
                    raise Lost("the swap was not answered")
                return await super().publish(after, expected=expected)

        def cancel(sim: Simulation, _: Process) -> None:
            sim.catalog.ask(Wish.CANCEL)

        sim = Simulation(1, "split", Faults(at_step={("sides_prepared", 1): cancel}, heal_s=30.0), world_type=Late)
        result = sim.run()
        assert result.violations == [], late_ms
        assert result.status is Status.CANCELLED, late_ms
        assert sim.catalog.topology.moves == (), late_ms
        arrived.add(any(topology.moves for topology in sim.catalog.history))
    assert arrived == {True, False}
