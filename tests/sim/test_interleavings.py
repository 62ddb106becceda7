"""The most dangerous interleavings, each forced to happen at the worst moments rather than waited for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shardlib.topology import Topology
from shardlib.topology.moving import moving_gates
from shardlib_ops.reshard.job import Status, Wish
from shardlib_ops.reshard.world import Lost
from tests.sim.clients import Client
from tests.sim.flow import FakeFlow
from tests.sim.process import Process
from tests.sim.schedule import STEPS, Faults, Result, Simulation, Strike
from tests.sim.shard import Closed, Record
from tests.sim.world import FakeSide, FakeWorld

CUTOVER = (
    "status_cutover",
    "gates_closed",
    "guarded",
    "drained",
    "compared",
    "handed_over",
    "gates_opened",
    "switched",
)


def run(scenario: str = "split", seed: int = 1, types: dict[str, Any] | None = None, **faults: Any) -> Result:
    """A run that must keep every promise."""
    result = Simulation(seed, scenario, Faults(**faults), **(types or {})).run()
    assert result.violations == []
    return result


def at(step: str, strike: Strike, time: int = 1) -> dict[tuple[str, int], Strike]:
    """At the n-th time that a step is done."""
    return {(step, time): strike}


def hold(seconds: float) -> Strike:
    """A client writes a moving key, and stands still for so long before it commits."""

    def freeze(sim: Simulation, _: Process) -> None:
        client = Client(sim, "frozen", watches=False)
        key = next(iter(sim.leg_of))
        client._think = lambda: asyncio.sleep(seconds)  # type: ignore[method-assign]
        sim.loop.create_task(client.write([key], values=lambda _: None))

    return freeze


@pytest.mark.parametrize("final", [Wish.COMPLETE, Wish.ROLLBACK])
@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_slept_from_the_start_is_refused_and_goes_on(step: str, final: Wish) -> None:
    """Whatever has moved meanwhile, there and back: it reads, writes and scans as if nothing had."""
    acted: list[str] = []
    refused: list[str] = []

    class Sleeper(Client):
        async def _refresh(self) -> None:
            refused.append(step)
            await super()._refresh()

    def wake(sim: Simulation, _: Process) -> None:
        client = Sleeper(sim, f"sleeper-{step}", watches=False)
        client.topology = sim.catalog.history[0]
        key = next(iter(sim.leg_of))

        async def act() -> None:
            old = client.topology
            await client.scan()
            client.topology = old
            await client.read(key)
            client.topology = old
            await client.write([key], values=lambda _: None)
            acted.append(step)

        sim.loop.create_task(act())

    strikes = at(step, wake)
    if step == "given_way":
        strikes |= at("status_cutover", hold(4.0))
    run(at_step=strikes, final=final, heal_s=60.0)
    assert acted == [step]
    if step not in STEPS[:4]:
        # Each of the three began with what it knew when it fell asleep.
        assert len(refused) >= 3


@pytest.mark.parametrize("held_s", [0.5, 4.0, 15.0])
@pytest.mark.parametrize("scenario", ["split", "merge"])
def test_a_writer_that_stands_still_behind_the_gate_is_waited_for(scenario: str, held_s: float) -> None:
    """Frozen, or prepared and in doubt: attempts give way, and what it wrote is not lost."""
    result = run(scenario, at_step=at("status_cutover", hold(held_s)), heal_s=60.0)
    assert result.status is Status.COMPLETED
    if held_s > 2:
        assert result.facts["gave_way"] > 0


def test_a_transaction_that_spans_the_switch_is_refused_at_its_second_statement() -> None:
    seen: list[str] = []

    def begin(sim: Simulation, _: Process) -> None:
        topology = sim.catalog.topology
        staying = next(key for key in sim.token_of if key not in sim.leg_of)
        moving = next(iter(sim.leg_of))

        async def span() -> None:
            here = topology.place(sim.token_of[staying])
            there = topology.place(sim.token_of[moving])
            flight = sim.shards[here.shard.id].begin("spanning")
            await sim.shards[here.shard.id].enter(flight, here.gate)
            switched: asyncio.Future[None] = sim.loop.create_future()

            def hear(after: Topology) -> None:
                if after.ring is not topology.ring and not switched.done():
                    switched.set_result(None)

            sim.catalog.listeners.append(hear)
            await switched
            second = sim.shards[there.shard.id].begin("spanning")
            try:
                await sim.shards[there.shard.id].enter(second, there.gate)
            except Closed:
                seen.append("refused")
            for shard_id, one in ((here.shard.id, flight), (there.shard.id, second)):
                sim.shards[shard_id].end_flight(one)

        sim.loop.create_task(span())

    run(at_step=at("status_cutover", begin), heal_s=60.0)
    assert seen == ["refused"]


@pytest.mark.parametrize("nth", range(1, 7))
@pytest.mark.parametrize("scenario", ["split", "merge"])
def test_a_gate_number_is_not_used_again_when_others_are_faster(scenario: str, nth: int) -> None:
    """The runner sleeps before it opens a gate, while others give the shard new gates, twice."""
    renewed: list[bool] = []

    class Overtaken(FakeSide):
        opened = 0

        async def open_gate(self, number: int) -> None:
            Overtaken.opened += 1
            if Overtaken.opened == nth:
                renewed.extend([await self.world.sim.renew(self.shard.id) for _ in range(2)])
            await super().open_gate(number)

    world = type("World", (FakeWorld,), {"side_type": Overtaken})
    result = run(scenario, types={"world_type": world}, heal_s=60.0)
    assert result.status is Status.COMPLETED
    assert renewed == [True, True]


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("scenario", ["split", "split_two", "merge"])
def test_the_ranges_are_given_back_when_the_new_gates_cannot_be_opened(scenario: str, hangs: bool) -> None:
    """The target goes away, or does not answer, between the handing over and the swap: the source serves again."""
    failed: list[float] = []

    class Away(FakeSide):
        async def open_gate(self, number: int) -> None:
            sim = self.world.sim
            if not failed and sim.steps[-1] == "handed_over":
                failed.append(sim.loop.time())
                if not hangs:
                    raise Lost(f"shard {self.shard.id} went away")
                await asyncio.sleep(3600.0)
            await super().open_gate(number)

    given_way: list[float] = []

    def look(sim: Simulation, _: Process) -> None:
        given_way.append(sim.loop.time())
        for gate in moving_gates(sim.catalog.topology, sim.catalog.job.id):
            assert gate.number in sim.shards[gate.shard_id].open

    world = type("World", (FakeWorld,), {"side_type": Away})
    result = run(scenario, types={"world_type": world}, at_step=at("given_way", look), heal_s=60.0)
    assert result.status is Status.COMPLETED
    assert result.steps[result.steps.index("handed_over") + 1] == "given_way"
    assert given_way[0] - failed[0] < 10.0


def test_a_comparison_that_takes_long_holds_the_ranges_no_longer_than_an_attempt_may() -> None:
    """The keys that changed lately have very many rows: the ranges are open again within the budget."""
    began: list[float] = []
    given_way: list[float] = []

    class Slow(FakeWorld):
        async def compare_closed(self, leg: Any, *, since: str) -> int:
            if not began:
                began.append(self.sim.loop.time())
                await asyncio.sleep(3600.0)
            return await super().compare_closed(leg, since=since)

    def look(sim: Simulation, _: Process) -> None:
        given_way.append(sim.loop.time())

    result = run("split", types={"world_type": Slow}, at_step=at("given_way", look), heal_s=60.0)
    assert result.status is Status.COMPLETED
    assert given_way[0] - began[0] < 3.0


BEFORE_SWAP = {1: "gates_opened", 2: "handed_over"}
"""The last step before the swap: of the switch, and of the rollback, whose gates open after it."""


class _LosesASwap(FakeWorld):
    """The swap is not answered, and arrives late."""

    late_s = 0.0
    time = 1

    async def publish(self, after: Topology, *, expected: int) -> bool:
        sim = self.sim
        step = BEFORE_SWAP[self.time]
        if sim.steps and sim.steps[-1] == step and sim.steps.count(step) == self.time:
            sim.loop.call_later(self.late_s, sim.catalog.swap, after, expected, self.lease.token)
            raise Lost("the swap was not answered")
        return await super().publish(after, expected=expected)


@pytest.mark.parametrize("wish", [Wish.RUN, Wish.CANCEL, Wish.COMPLETE])
@pytest.mark.parametrize("time", [1, 2])
def test_a_swap_that_arrives_late_is_found_or_can_no_longer_happen(time: int, wish: Wish) -> None:
    ends = set()
    for late_ms in range(0, 500, 7):
        world = type("Late", (_LosesASwap,), {"late_s": late_ms / 1000, "time": time})

        def ask(sim: Simulation, _: Process) -> None:
            sim.catalog.ask(wish)

        final = Wish.COMPLETE if time == 1 else Wish.ROLLBACK
        ends.add(run(types={"world_type": world}, at_step=at(BEFORE_SWAP[time], ask, time), final=final).status)
    if time == 1:
        assert ends == ({Status.CANCELLED, Status.COMPLETED} if wish is Wish.CANCEL else {Status.COMPLETED})
    else:
        # Each of these wishes withdraws a rollback that has not happened, and the job is completed in the end.
        assert ends == {Status.ROLLED_BACK, Status.COMPLETED}


@pytest.mark.parametrize("final", [Wish.COMPLETE, Wish.ROLLBACK])
@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("strike", ["kill", 1.5, 16.0])
def test_a_runner_is_killed_or_sleeps_past_its_lease_at_each_step(strike: Strike, time: int, final: Wish) -> None:
    """The other takes over, and the one that wakes changes nothing any more; in the way back also."""
    wanted = Status.COMPLETED if final is Wish.COMPLETE else Status.ROLLED_BACK
    struck = 0
    for step in STEPS:
        for scenario in ("split", "merge"):
            result = run(scenario, at_step=at(step, strike, time), final=final, heal_s=30.0)
            assert result.status is wanted, step
            struck += result.facts["kills"] + result.facts["pauses"]
    assert struck >= 5


@pytest.mark.parametrize("strike", ["kill", 16.0])
@pytest.mark.parametrize("after", [1, 2, 5, 9])
def test_a_runner_stops_between_applying_and_confirming(after: int, strike: Strike) -> None:
    """Another applies the same changes again: each counts once."""
    applied: list[int] = []

    class Stopping(FakeFlow):
        async def apply(self, batch: list[Record], read: int) -> list[str]:
            fresh = await super().apply(batch, read)
            applied.append(read)
            if len(applied) == after:
                self.world.sim._strike(self.world.process, strike)
            return fresh

    world = type("World", (FakeWorld,), {"flow_type": Stopping})
    for seed in range(10):
        applied.clear()
        result = run("merge", seed, {"world_type": world}, final=Wish.ROLLBACK, heal_s=30.0)
        assert result.facts["kills"] + result.facts["pauses"] == 1


@pytest.mark.parametrize("wish", [Wish.ROLLBACK, Wish.CANCEL])
@pytest.mark.parametrize("step", ["status_cleanup", "slots_dropped", "shard_purged", "finished", "retired"])
def test_there_is_no_way_back_from_the_cleanup(step: str, wish: Wish) -> None:
    def too_late(sim: Simulation, process: Process) -> None:
        sim.catalog.ask(wish)
        sim._strike(process, "kill")

    assert run("merge", at_step=at(step, too_late), heal_s=30.0).status is Status.COMPLETED


@pytest.mark.parametrize("step", CUTOVER)
def test_cancelling_at_each_step_of_the_cutover(step: str) -> None:
    """It is cancelled, or it was switched: never something between."""

    def cancel(sim: Simulation, process: Process) -> None:
        sim.catalog.ask(Wish.CANCEL)
        sim._strike(process, "kill")

    status = run("split_two", at_step=at(step, cancel), heal_s=30.0).status
    assert status is (Status.COMPLETED if step == "switched" else Status.CANCELLED)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("wish", [Wish.RUN, Wish.CANCEL, Wish.COMPLETE])
@pytest.mark.parametrize("step", ["gates_closed", "guarded", "drained", "compared", "handed_over", "switched"])
def test_withdrawing_a_rollback_at_each_step_of_its_cutover(step: str, wish: Wish, killed: bool) -> None:
    """It is withdrawn, or the sources serve again: never something between. An attempt under way is not broken off."""
    asked: list[str] = []

    def withdraw(sim: Simulation, process: Process) -> None:
        asked.append(step)
        sim.catalog.ask(wish)
        if killed:
            sim._strike(process, "kill")

    result = run("split_two", at_step=at(step, withdraw, 2), final=Wish.ROLLBACK, heal_s=30.0)
    assert asked == [step]
    withdrawn = killed and step != "switched"
    assert result.status is (Status.COMPLETED if withdrawn else Status.ROLLED_BACK)
    assert result.steps.count("switched") == (1 if withdrawn else 2)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("step", ["claimed", "announced", "status_precopy", "status_deltasync", "reverse_slots"])
def test_a_transaction_of_minutes_only_delays_the_job(step: str, foreign: bool) -> None:
    """It keeps slots and snapshots from being made, and gates from closing, for longer than any of them waits."""

    def linger(sim: Simulation, _: Process) -> None:
        client = Client(sim, "lingering", watches=False)
        key = next(iter(sim.leg_of))
        client._think = lambda: asyncio.sleep(130.0)  # type: ignore[method-assign]
        act = client.write_without_gate(key) if foreign else client.write([key], values=lambda _: None)
        sim.loop.create_task(act)

    assert run(at_step=at(step, linger), heal_s=200.0).status is Status.COMPLETED
