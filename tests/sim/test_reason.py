"""Why a job failed stays in its record, whatever its undoing waits for; one that went well ends without an error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from shardlib_ops.reshard.job import Leg, Status
from shardlib_ops.reshard.world import Compared, Flow, Lost, Mismatch
from tests.sim.schedule import Faults, Simulation
from tests.sim.world import FakeWorld


class _Interrupted(FakeWorld):
    """A server goes away once while the rows are deleted."""

    interrupted = False

    async def purge(self, leg: Leg, shard_id: str, pause: Callable[[], Awaitable[None]]) -> None:
        if not self.interrupted:
            self.interrupted = True
            raise Lost("the server went away")
        await super().purge(leg, shard_id, pause)


class _Differing(_Interrupted):
    async def compare(self, leg: Leg, flow: Flow, *, since: str | None) -> Compared:
        raise Mismatch("a row differs")


def test_the_reason_of_a_failure_outlives_a_trouble_of_its_undoing() -> None:
    sim = Simulation(1, "split", Faults(), world_type=_Differing)
    assert sim.run().status is Status.FAILED
    assert sim.catalog.job.error == "a row differs"


def test_a_job_that_went_well_ends_without_an_error() -> None:
    sim = Simulation(1, "split", Faults(), world_type=_Interrupted)
    assert sim.run().status is Status.COMPLETED
    assert sim.catalog.job.error is None
