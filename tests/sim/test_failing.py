"""A job whose undoing fails, too, is tried again, and its runner does not break."""

from __future__ import annotations

from shardlib_ops.reshard.job import Leg, Status
from shardlib_ops.reshard.world import Failure
from tests.sim.schedule import Faults, Simulation
from tests.sim.world import FakeSide, FakeWorld


class _RefusedSide(FakeSide):
    """Nobody may do anything here in the first twenty seconds; the clock begins at 1,000."""

    async def claim(self) -> None:
        if self.world.now() < 1_020.0:
            raise Failure("permission denied")
        await super().claim()


class _RefusedWorld(FakeWorld):
    side_type = _RefusedSide


class _ImpossibleWorld(FakeWorld):
    """The job fails, and its side refuses to be taken over when it is to be undone."""

    side_type = _RefusedSide

    async def schema_before_rows(self, leg: Leg) -> None:
        raise Failure("the tables differ")


def test_a_shard_that_refuses_everything_for_a_while_is_waited_for() -> None:
    result = (sim := Simulation(1, "split", Faults(), world_type=_RefusedWorld)).run()
    assert result.violations == []
    assert result.status is Status.COMPLETED
    assert sim.catalog.job.error is None


def test_a_job_that_fails_is_undone_when_that_is_possible_again() -> None:
    result = (sim := Simulation(1, "split", Faults(), world_type=_ImpossibleWorld)).run()
    assert result.violations == []
    assert result.status is Status.FAILED
    assert sim.catalog.job.error == "the tables differ"
