"""P3 and P4: a server of a job fails over while its rows move, and nothing that was acknowledged is lost or doubled.

Nothing that only the dead server had is believed afterwards: before the switch the copy is made anew, after it the way
back is given up.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import insert, select

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.errors import ShardUnavailable
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from shardlib_ops.local.postgres import LocalServer
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.cleanup.retire import leftovers
from shardlib_ops.reshard.job import WAY_BACK_LOST, Job, Status
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.reshard.runner import JobRunner
from tests.support.eventually import eventually, eventually_async
from tests.support.failover import cut, fail_over, lead_to_either, mend, promote
from tests.support.hammer import Hammer
from tests.support.writers import metadata, note

pytestmark = [pytest.mark.promise("P3"), pytest.mark.promise("P4"), pytest.mark.fault, pytest.mark.timeout(420)]

SOURCE, TARGET = "shard-01", "shard-02"
COPYING = "copying"
"""After the keys were collected, before the first row is read."""
BEFORE = ["sides_prepared", "announced", COPYING, "leg_copied", "schema_finished", "leg_compared", "status_cutover"]
CLOSED = ["gates_closed", "guarded", "drained", "compared", "handed_over", "gates_opened"]
AFTER = ["switched", "forward_stopped"]
CLEANING = ["slots_dropped", "shard_purged", "finished", "retired"]
MATRIX = [(step, shard) for step in (*BEFORE, *CLOSED, *AFTER, *CLEANING) for shard in (SOURCE, TARGET)]
EVERY = os.environ.get("SHARDLIB_KILL_MATRIX") == "all"
IN_CI = 3


def chosen() -> list[tuple[str, str]]:
    """All of it when asked for, else some by the seed of the run."""
    from tests.conftest import SEED

    return MATRIX if EVERY else random.Random(SEED).sample(MATRIX, IN_CI)


class Strike:
    """Does something once, when a job reaches a step for the first time; the job waits for it."""

    def __init__(self, step: str, act: Callable[[], object]) -> None:
        self.step, self._act, self.struck = step, act, False
        self.steps: list[str] = []

    async def __call__(self, name: str) -> None:
        """The callback of a resharder."""
        self.steps.append(name)
        if name == self.step and not self.struck:
            self.struck = True
            await asyncio.to_thread(self._act)

    def watch_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the first pause of a copy for a step."""
        pause = JobRunner._pause

        async def first(runner: JobRunner) -> None:
            if runner.job.status is Status.PRECOPY:
                await self(COPYING)
            await pause(runner)

        monkeypatch.setattr(JobRunner, "_pause", first)


async def run(cluster: LocalCluster, job: Job, on_step: Callable[[str], Awaitable[None]] | None = None) -> Job:
    async with Resharder(cluster.url, lease_ttl_s=3.0, on_step=on_step) as resharder, asyncio.timeout(150):
        return await resharder.run(job.id)


def stored(cluster: LocalCluster) -> Topology:
    catalog = open_catalog(cluster.url)
    try:
        return catalog.load()
    finally:
        catalog.close()


async def nothing_left(cluster: LocalCluster, job: Job) -> None:
    """No live server of the cluster holds anything of the job, and only named gates are open."""
    topology = stored(cluster)
    assert topology.moves == ()
    for shard in topology.shards:
        async with await psycopg.AsyncConnection.connect(shard.primary.conninfo(), autocommit=True) as conn:
            assert await leftovers(conn, job.id) == []
            found = await conn.execute(
                "SELECT substring(relname FROM 6)::int FROM pg_class"
                " WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^gate_[0-9]+$'"
            )
            assert {number for (number,) in await found.fetchall()} == set(topology.gates_of(shard.id))


# Under load, with synchronous replicas: what was acknowledged is on the replica that is promoted.


@contextmanager
def unhurt(cluster: LocalCluster, folder: Path, rng: random.Random) -> Iterator[None]:
    """Clients work meanwhile, and find nothing lost, doubled or stale."""
    hammer = Hammer(folder, [cluster.url], [f"key-{number}" for number in range(30)], rng)
    hammer.prepare(cluster.url)
    for server in cluster.servers:
        if server.role == "primary":
            with server.connect() as conn:
                conn.execute("ALTER TABLE bag REPLICA IDENTITY FULL")
    with hammer.clients(2, 300.0):
        eventually(lambda: hammer.working, 60, "the clients work")
        yield
        hammer.end()
    verdict = hammer.verdict(stored(cluster))
    print(verdict)
    assert verdict.violations == []
    assert verdict.outcomes["ok"] > 50


async def through(cluster: LocalCluster, strike: Strike) -> None:
    """A shard gives a half to another, one of them fails over meanwhile, and the job ends as it should."""
    async with Manager(cluster.url) as manager:
        job = await manager.split(SOURCE, targets=[{"shard_id": TARGET}])
        rested = await run(cluster, job, strike)
        assert rested.status is Status.VALIDATION, rested.error
        if strike.step in (*BEFORE, *CLOSED):
            assert strike.struck
            assert rested.error is None
            await manager.rollback(job.id)  # the way back is that of the servers of now
            ended = await run(cluster, job)
            assert ended.status is Status.ROLLED_BACK, ended.error
        else:
            if strike.struck:
                assert WAY_BACK_LOST in (rested.error or "")
            await manager.complete(job.id)
            ended = await run(cluster, job, strike)
            assert ended.status is Status.COMPLETED, ended.error
            assert strike.struck
    await nothing_left(cluster, job)


@pytest.mark.parametrize(("step", "shard"), chosen())
def test_a_server_of_a_job_fails_over_under_load(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, step: str, shard: str
) -> None:
    failed: list[BaseException] = []
    with LocalCluster(shards=2, replicas=1, synchronous=True) as cluster:
        strike = Strike(step, lambda: fail_over(cluster, shard))
        strike.watch_copy(monkeypatch)

        def work() -> None:
            try:
                asyncio.run(through(cluster, strike))
            except BaseException as error:
                failed.append(error)
                raise

        with unhurt(cluster, tmp_path, rng):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(timeout=300)
            print(strike.steps)
            assert not thread.is_alive(), "the job does not rest"
            assert not failed, failed


# With asynchronous replicas that lag: what only the dead server had is gone, and nothing of it may come back.


class Cluster:
    """Two shards, each with a replica that lags when it is told to, and a table of which one key moves."""

    def __init__(self, cluster: LocalCluster, engine: ShardedEngine) -> None:
        self.cluster, self.engine = cluster, engine
        engine.create_all(metadata)
        self.moving = next(key for n in range(100) if engine.shard_for(key := f"key-{n}").name == SOURCE)
        self.write("first")
        for shard in (SOURCE, TARGET):
            self.caught_up(shard)

    def write(self, uid: str) -> None:
        with self.engine.session(self.moving) as session:
            session.execute(insert(note).values(key=self.moving, uid=uid))
            session.commit()

    def scanned(self) -> list[str]:
        """The rows as a client sees them that asks all shards."""

        def scan() -> list[str]:
            with self.engine.session() as session:
                return sorted(session.scalars(select(note.c.uid)))

        # An engine learns of a new primary within moments.
        return eventually(scan, within_s=40, what="no scan", ignore=ShardUnavailable)

    def held(self) -> dict[str, list[str]]:
        """The rows as they are on each shard."""
        found = {}
        for shard in stored(self.cluster).shards:
            with psycopg.connect(shard.primary.conninfo()) as conn:
                found[shard.name] = sorted(uid for (uid,) in conn.execute("SELECT uid FROM note"))
        return found

    def replica(self, shard: str) -> LocalServer:
        return self.cluster.replicas(shard)[0]

    def caught_up(self, shard: str) -> None:
        with self.cluster.primary(shard).connect() as conn, self.replica(shard).connect() as standby:
            (lsn,) = conn.execute("SELECT pg_current_wal_lsn()").fetchone() or (None,)
            eventually(
                lambda: standby.execute("SELECT pg_last_wal_replay_lsn() >= %s", (lsn,)).fetchone() == (True,),
                within_s=40,
                what="the replica does not follow",
            )


@pytest.fixture
def lagging() -> Iterator[Cluster]:
    with (
        LocalCluster(shards=2, replicas=1) as cluster,
        ShardedEngine(cluster.url, reroute_timeout_s=30) as engine,
    ):
        yield Cluster(cluster, engine)


async def test_what_a_source_has_lost_is_not_on_the_target(lagging: Cluster) -> None:
    def lose() -> None:
        cut(lagging.replica(SOURCE))
        lagging.write("lost")
        # The stream has brought it, since both sides are compared with it.
        fail_over(lagging.cluster, SOURCE)

    async with Manager(lagging.cluster.url) as manager:
        job = await manager.move_keys([lagging.moving], target={"shard_id": TARGET})
        strike = Strike("leg_compared", lose)
        rested = await run(lagging.cluster, job, strike)
        assert rested.status is Status.VALIDATION, rested.error
        assert strike.steps.count("leg_copied") == 2, strike.steps
        lagging.write("second")
        assert lagging.scanned() == ["first", "second"]
        await manager.rollback(job.id)
        ended = await run(lagging.cluster, job)
    assert ended.status is Status.ROLLED_BACK, ended.error
    assert lagging.held() == {SOURCE: ["first", "second"], TARGET: []}
    await nothing_left(lagging.cluster, job)


@pytest.mark.parametrize("step", ["leg_copied", "schema_finished", "leg_compared", "status_cutover"])
async def test_what_a_target_has_lost_is_brought_again(lagging: Cluster, step: str) -> None:
    async with Manager(lagging.cluster.url) as manager:
        job = await manager.move_keys([lagging.moving], target={"shard_id": TARGET})
        cut(lagging.replica(TARGET))
        strike = Strike(step, lambda: fail_over(lagging.cluster, TARGET))
        rested = await run(lagging.cluster, job, strike)
        assert rested.status is Status.VALIDATION, rested.error
        assert strike.steps.count("leg_copied") == 2, strike.steps
        assert lagging.scanned() == ["first"]
        await manager.complete(job.id)
        ended = await run(lagging.cluster, job)
    assert ended.status is Status.COMPLETED, ended.error
    assert lagging.held() == {SOURCE: [], TARGET: ["first"]}
    await nothing_left(lagging.cluster, job)


@pytest.mark.parametrize("shard", [SOURCE, TARGET])
async def test_a_dsn_that_leads_to_another_server_is_noticed(lagging: Cluster, shard: str) -> None:
    replica = lagging.replica(shard)
    lead_to_either(lagging.cluster, shard)

    def lose() -> None:
        cut(replica)
        lagging.write("second")
        promote(lagging.cluster, shard)

    async with Manager(lagging.cluster.url) as manager:
        job = await manager.move_keys([lagging.moving], target={"shard_id": TARGET})
        strike = Strike("leg_compared", lose)
        rested = await run(lagging.cluster, job, strike)
        assert rested.status is Status.VALIDATION, rested.error
        assert strike.steps.count("leg_copied") == 2, strike.steps
        kept = ["first"] if shard == SOURCE else ["first", "second"]
        assert lagging.scanned() == kept
        await manager.complete(job.id)
        ended = await run(lagging.cluster, job)
    assert ended.status is Status.COMPLETED, ended.error
    assert lagging.held() == {SOURCE: [], TARGET: kept}
    await nothing_left(lagging.cluster, job)


async def test_a_target_that_is_behind_what_its_slot_was_told_is_copied_anew(lagging: Cluster) -> None:
    # As after a restore of its disk, which is no failover that the server itself could tell of.
    def set_back() -> None:
        with lagging.cluster.primary(TARGET).connect() as conn:
            conn.execute("UPDATE shardlib.position SET lsn = '0/1'")
            conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ '^shardlib job [1-9]'"
            )

    async with Manager(lagging.cluster.url) as manager:
        job = await manager.move_keys([lagging.moving], target={"shard_id": TARGET})
        strike = Strike("leg_compared", set_back)
        rested = await run(lagging.cluster, job, strike)
        assert rested.status is Status.VALIDATION, rested.error
        assert strike.steps.count("leg_copied") == 2, strike.steps
        assert lagging.scanned() == ["first"]
        await manager.complete(job.id)
        assert (await run(lagging.cluster, job)).status is Status.COMPLETED
    assert lagging.held() == {SOURCE: [], TARGET: ["first"]}


@pytest.mark.parametrize(("shard", "lags"), [(SOURCE, True), (SOURCE, False), (TARGET, True)])
async def test_after_the_switch_a_failover_costs_the_way_back(lagging: Cluster, shard: str, lags: bool) -> None:
    async with Manager(lagging.cluster.url) as manager:
        job = await manager.move_keys([lagging.moving], target={"shard_id": TARGET})
        assert (await run(lagging.cluster, job)).status is Status.VALIDATION
        if lags:
            cut(lagging.replica(shard))
        lagging.write("after")
        if shard == SOURCE:
            assert (await run(lagging.cluster, job)).status is Status.VALIDATION
            assert lagging.held()[SOURCE] == ["after", "first"], "the stream back has not brought it"
        if not lags:
            lagging.caught_up(shard)
        await asyncio.to_thread(fail_over, lagging.cluster, shard)
        await manager.rollback(job.id)
        rested = await run(lagging.cluster, job)
        assert (rested.status, rested.error) == (Status.VALIDATION, WAY_BACK_LOST)
        for one in stored(lagging.cluster).shards:
            with psycopg.connect(one.primary.conninfo()) as conn:
                left = "SELECT slot_name FROM pg_replication_slots WHERE slot_type = 'logical'"
                assert conn.execute(left).fetchall() == [], "a slot that nobody reads keeps WAL"
        kept = ["after", "first"] if shard == SOURCE else ["first"]
        assert lagging.scanned() == kept
        await manager.complete(job.id)
        ended = await run(lagging.cluster, job)
    assert ended.status is Status.COMPLETED, ended.error
    assert lagging.held() == {SOURCE: [], TARGET: kept}
    await nothing_left(lagging.cluster, job)


async def told(manager: Manager, job: Job, running: asyncio.Task[Job]) -> str:
    """What the operator is told while the job waits for a replica."""

    async def waits() -> str | None:
        assert not running.done(), running.result()
        error = (await manager.get_job(job.id)).error
        return error if "has not replayed" in (error or "") else None

    return str(await eventually_async(waits, 60, "it does not wait for the replica"))


@pytest.mark.parametrize("shard", [SOURCE, TARGET])
async def test_no_switch_while_a_replica_that_may_be_promoted_has_not_the_rows(lagging: Cluster, shard: str) -> None:
    async with Manager(lagging.cluster.url) as manager:
        job = await manager.move_keys([lagging.moving], target={"shard_id": TARGET})
        cut(lagging.replica(shard))
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(run(lagging.cluster, job))
            waiting = await told(manager, job, running)
            assert f"shard {shard!r}" in waiting
            mend(lagging.replica(shard))
        assert running.result().status is Status.VALIDATION
        await asyncio.to_thread(fail_over, lagging.cluster, shard)
        assert lagging.scanned() == ["first"]
        await manager.complete(job.id)
        assert (await run(lagging.cluster, job)).status is Status.COMPLETED
    assert lagging.held() == {SOURCE: [], TARGET: ["first"]}
    await nothing_left(lagging.cluster, job)


async def test_old_rows_count_as_deleted_when_replicas_have_deleted_them(lagging: Cluster) -> None:
    async with Manager(lagging.cluster.url) as manager:
        job = await manager.move_keys([lagging.moving], target={"shard_id": TARGET})
        assert (await run(lagging.cluster, job)).status is Status.VALIDATION
        await manager.complete(job.id)
        cut(lagging.replica(SOURCE))
        strike = Strike("finished", lambda: fail_over(lagging.cluster, SOURCE))
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(run(lagging.cluster, job, strike))
            assert f"shard {SOURCE!r}" in await told(manager, job, running)
            mend(lagging.replica(SOURCE))
        assert running.result().status is Status.COMPLETED
    assert lagging.scanned() == ["first"]
    assert lagging.held() == {SOURCE: [], TARGET: ["first"]}
