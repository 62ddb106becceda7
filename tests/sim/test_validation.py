"""The window after the switch: what ends it, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from shardlib_ops.reshard.job import Status, Wish
from shardlib_ops.reshard.world import Blocked, Failure, Lost
from tests.sim.flow import FakeFlow
from tests.sim.process import Process
from tests.sim.schedule import Faults, Simulation, Strike
from tests.sim.world import FakeSide, FakeWorld


class _Refused(FakeFlow):
    """The old side refuses what the stream back brings."""

    async def run(self) -> None:
        if self.direction == "reverse":
            raise Failure("the old side refuses a row")
        await super().run()


class _Broken(FakeFlow):
    """The stream back breaks every two seconds."""

    async def run(self) -> None:
        if self.direction == "reverse":
            await self.world.process.sleep(2.0)
            raise Lost("the stream broke")
        await super().run()


class _RefusedWorld(FakeWorld):
    flow_type = _Refused


class _BrokenWorld(FakeWorld):
    flow_type = _Broken


class _Lagging(FakeSide):
    """A replica that lags keeps the ranges from being given back."""

    async def replicated(self, *, timeout_s: float) -> None:
        if self.world.sim.catalog.job.status is Status.VALIDATION:
            raise Blocked("a replica lags")


class _LaggingWorld(FakeWorld):
    side_type = _Lagging


def _asks(wish: Wish) -> Callable[[Simulation, Process], None]:
    def ask(sim: Simulation, _: Process) -> None:
        sim.catalog.ask(wish)

    return ask


def _loses_the_way_back(sim: Simulation, _: Process) -> None:
    for shard in sim.shards.values():
        for name, slot in shard.slots.items():
            slot.lost = slot.lost or name.endswith("_r")
        shard.tell()


def _simulation(faults: Faults, retention_s: float | None, **types: Any) -> Simulation:
    sim = Simulation(1, "split", faults, **types)
    sim.catalog.job = sim.catalog.job.changed(retention_s=retention_s)
    return sim


def _window_s(sim: Simulation) -> float:
    job = sim.catalog.job
    assert job.switched_at is not None
    assert job.completed_at is not None
    return (datetime.fromisoformat(job.completed_at) - datetime.fromisoformat(job.switched_at)).total_seconds()


def test_a_job_completes_though_its_way_back_breaks_at_once() -> None:
    sim = _simulation(Faults(wishes=[(15.0, Wish.COMPLETE)]), None, world_type=_RefusedWorld)
    result = sim.run()
    assert result.violations == []
    assert result.status is Status.COMPLETED


def test_the_retention_ends_though_the_way_back_breaks_at_once() -> None:
    sim = _simulation(Faults(stay=True), 30.0, world_type=_RefusedWorld)
    result = sim.run()
    assert result.violations == []
    assert result.status is Status.COMPLETED
    assert 30.0 <= _window_s(sim) < 60.0


def test_the_retention_counts_from_the_switch_whatever_breaks_meanwhile() -> None:
    sim = _simulation(Faults(stay=True), 10.0, world_type=_BrokenWorld)
    result = sim.run()
    assert result.violations == []
    assert result.status is Status.COMPLETED
    assert 10.0 <= _window_s(sim) < 20.0


def test_a_lost_way_back_leaves_the_old_copies_until_the_retention_is_over() -> None:
    faults = Faults(stay=True, at_step={("status_validation", 1): _loses_the_way_back})
    sim = _simulation(faults, 60.0)
    result = sim.run()
    assert result.violations == []
    assert result.status is Status.COMPLETED
    assert 60.0 <= _window_s(sim) < 80.0


def test_a_pause_keeps_the_old_copies_past_the_retention() -> None:
    paused: list[float] = []
    at_step: dict[tuple[str, int], Strike] = {
        ("status_validation", 1): _asks(Wish.PAUSE),
        ("status_cleanup", 1): lambda sim, _: paused.append(sim.loop.time()),  # heard only until it is resumed
    }
    result = _simulation(Faults(stay=True, at_step=at_step, heal_s=60.0), 5.0).run()
    assert result.violations == []
    assert result.status is Status.COMPLETED
    assert paused == []


@pytest.mark.parametrize("instead", [Wish.COMPLETE, Wish.RUN, Wish.CANCEL])
def test_a_rollback_that_has_not_happened_can_be_withdrawn(instead: Wish) -> None:
    faults = Faults(at_step={("status_validation", 1): _asks(Wish.ROLLBACK)}, wishes=[(15.0, instead)])
    result = (sim := _simulation(faults, None, world_type=_LaggingWorld)).run()
    assert result.violations == []
    assert result.status is Status.COMPLETED
    assert sim.catalog.job.attempts > 2
    assert sim.catalog.job.error is None


@pytest.mark.parametrize("then", [Wish.ROLLBACK, Wish.COMPLETE, Wish.RUN])
def test_a_job_that_was_cancelled_too_late_keeps_the_old_copies_and_says_so(then: Wish) -> None:
    """The operator was told that it is cancelled: it does not delete what there is to go back to by itself."""
    told: list[str | None] = []

    def later(sim: Simulation, _: Process) -> None:
        def decide() -> None:
            told.append(sim.catalog.job.error)
            sim.catalog.ask(then)

        sim.loop.call_later(10.0, decide)

    at_step: dict[tuple[str, int], Strike] = {("drained", 1): _asks(Wish.CANCEL), ("status_validation", 1): later}
    result = (sim := _simulation(Faults(stay=True, at_step=at_step, heal_s=60.0), 0.0)).run()
    assert result.violations == []
    assert result.status is (Status.ROLLED_BACK if then is Wish.ROLLBACK else Status.COMPLETED)
    assert _window_s(sim) >= 10.0 or then is Wish.ROLLBACK
    assert told == ["it had switched before it could be cancelled: `rollback` takes it back, `complete` ends it"]
    assert sim.catalog.job.error is None
