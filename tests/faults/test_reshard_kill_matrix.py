"""P4: the runner is killed at each of its steps, and another one finishes, cancels or takes back what it began."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from shardlib.catalog import open_catalog
from shardlib.errors import InvalidTopology
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder
from tests.support.eventually import eventually
from tests.support.hammer import Hammer
from tests.support.job_runner import run_and_die

pytestmark = [pytest.mark.promise("P4"), pytest.mark.fault, pytest.mark.timeout(420)]

BEFORE = [
    "claimed", "schema_copied", "sides_prepared", "announced", "status_precopy", "leg_copied", "schema_finished",
    "status_deltasync", "leg_compared", "reverse_slots", "status_cutover", "gates_closed", "guarded", "drained",
    "compared", "handed_over", "gates_opened",
]  # fmt: skip
AFTER = ["switched", "status_validation", "forward_stopped"]
CLEANING = ["status_cleanup", "slots_dropped", "shard_purged", "finished", "retired"]
MATRIX = [
    *((step, what) for step in BEFORE for what in ("resume", "cancel")),
    *((step, what) for step in AFTER for what in ("resume", "rollback")),
    *((step, "resume") for step in CLEANING),
]
BACK = "back/"
"""Before the name of a step: that of the rollback."""
BACK_BEFORE = ["gates_closed", "guarded", "drained", "compared", "handed_over"]
BACK_AFTER = ["switched", "gates_opened"]
MATRIX_BACK = [
    *((BACK + step, what) for step in (*BACK_BEFORE, *BACK_AFTER) for what in ("resume", "cancel", "rollback")),
    *((BACK + step, "rollback") for step in CLEANING),
]
EVERY = os.environ.get("SHARDLIB_KILL_MATRIX") == "all"
IN_CI = 3
BACK_IN_CI = 2


def chosen() -> list[tuple[str, str]]:
    """All of it when asked for, else some by the seed of the run."""
    from tests.conftest import SEED

    if EVERY:
        return [*MATRIX, *MATRIX_BACK]
    rng = random.Random(SEED)
    return [*rng.sample(MATRIX, IN_CI), *rng.sample(MATRIX_BACK, BACK_IN_CI)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made:
        yield made


async def run(url: str, job: Job, *, complete: bool = False) -> Job:
    async with Resharder(url, lease_ttl_s=2.0) as resharder, asyncio.timeout(120):
        return await resharder.run(job.id, complete=complete)


async def one(cluster: LocalCluster, step: str, what: str) -> None:
    """Shard 1 gives a half to shard 2, its runner dies, and the operator does `what`."""
    url = cluster.url
    async with Manager(url) as manager:
        job = await manager.split("shard-01", targets=[{"shard_id": "shard-02"}])
        if step.startswith(BACK):
            ended = await dies_on_its_way_back(manager, url, job, step.removeprefix(BACK), what)
        else:
            ended = await dies_on_its_way(manager, url, job, step, what)
        if ended is Status.COMPLETED:  # back, so that the next one finds the cluster as this one did
            back = await manager.split("shard-02", targets=[{"shard_id": "shard-01"}], keep=256)
            assert (await run(url, back, complete=True)).status is Status.COMPLETED


async def dies_on_its_way(manager: Manager, url: str, job: Job, step: str, what: str) -> Status:
    await asyncio.to_thread(run_and_die, url, job.id, step, complete=step in CLEANING)
    if what == "cancel":
        await manager.cancel(job.id)
    elif what == "rollback":
        if (await manager.get_job(job.id)).status is not Status.VALIDATION:
            await run(url, job)  # the record lags behind the topology by this step
        await manager.rollback(job.id)
    ended = await run(url, job, complete=what == "resume")
    wanted = {"resume": Status.COMPLETED, "cancel": Status.CANCELLED, "rollback": Status.ROLLED_BACK}
    assert ended.status is wanted[what], ended.error
    return ended.status


async def dies_on_its_way_back(manager: Manager, url: str, job: Job, step: str, what: str) -> Status:
    """A rollback that has not happened is withdrawn by `resume` alone."""
    rested = await run(url, job)
    assert rested.status is Status.VALIDATION, rested.error
    await manager.rollback(job.id)
    await asyncio.to_thread(run_and_die, url, job.id, step)
    if what == "resume":
        await manager.resume(job.id)
    elif what == "cancel":
        for refused in (manager.cancel, manager.complete):
            with pytest.raises(InvalidTopology, match=f"job {job.id}"):
                await refused(job.id)
    ended = await run(url, job, complete=what == "resume")
    withdrawn = what == "resume" and step in BACK_BEFORE
    assert ended.status is (Status.COMPLETED if withdrawn else Status.ROLLED_BACK), ended.error
    return ended.status


@contextmanager
def unhurt(cluster: LocalCluster, folder: Path, rng: random.Random) -> Iterator[None]:
    """Clients work meanwhile, and find nothing lost, doubled or stale; nothing of a job is left."""
    keys = [f"key-{number}" for number in range(30)]
    hammer = Hammer(folder, [cluster.url], keys, rng)
    for server in cluster.servers:
        with psycopg.connect(server.dsn) as conn:
            conn.execute("DROP TABLE IF EXISTS bag, counter, register")
    hammer.prepare(cluster.url)
    for server in cluster.servers:
        with psycopg.connect(server.dsn) as conn:
            conn.execute("ALTER TABLE bag REPLICA IDENTITY FULL")
    with hammer.clients(2, 360.0):
        eventually(lambda: hammer.working, 60, "the clients work")
        yield
        hammer.end()
    catalog = open_catalog(cluster.url)
    topology = catalog.load()
    catalog.close()
    verdict = hammer.verdict(topology)
    print(verdict)
    assert verdict.violations == []
    assert verdict.outcomes["ok"] > 50
    assert topology.moves == ()
    for shard in topology.shards:
        with psycopg.connect(shard.primary.conninfo()) as conn:
            assert conn.execute("SELECT slot_name FROM pg_replication_slots").fetchall() == []
            left = (
                "SELECT relname FROM pg_class WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^job_[0-9]'"
            )
            assert conn.execute(left).fetchall() == []
            open_gates = conn.execute(
                "SELECT substring(relname FROM 6)::int FROM pg_class"
                " WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^gate_[0-9]+$'"
            ).fetchall()
            assert {number for (number,) in open_gates} == set(topology.gates_of(shard.id))


@pytest.mark.parametrize(("step", "what"), chosen())
def test_p4_a_killed_runner_is_followed_by_another(
    cluster: LocalCluster, tmp_path: Path, rng: random.Random, step: str, what: str
) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(one(cluster, step, what))
        except BaseException as error:
            failed.append(error)
            raise

    with unhurt(cluster, tmp_path, rng):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(timeout=360)
        assert not thread.is_alive(), "the job does not rest"
        assert not failed, failed
