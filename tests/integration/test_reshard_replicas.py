"""A switch waits until the replicas of the source have closed what it has closed: any of them may be promoted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import psycopg
import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import ShardedEngine
from shardlib.dsn import Dsn, secrets_of
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.cutover import Limits
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.progress import JobProgress, Waiting
from shardlib_ops.reshard.resharder import Resharder
from tests.support.eventually import eventually_async

pytestmark = pytest.mark.timeout(180)


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    __tablename__ = "parcel"

    owner: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    weight: Mapped[int]


class Pair:
    """Two shards with a replica each, and a key of the first one that is to move."""

    def __init__(self, cluster: LocalCluster, engine: ShardedEngine) -> None:
        self.cluster, self.engine = cluster, engine
        self.key = next(key for n in range(1000) if engine.shard_for(key := f"owner-{n}").id == "s1")
        with engine.session(self.key) as session:
            session.add(Parcel(owner=self.key, weight=0))
            session.commit()

    def at_replica(self, statement: str, shard: str = "shard-01") -> None:
        (replica,) = self.cluster.replicas(shard)
        with psycopg.connect(replica.dsn, autocommit=True) as conn:
            conn.execute(statement.encode())

    def add(self) -> str:
        """Write the row, wherever it is: the id of its shard then."""

        def work(session: object) -> None:
            session.get_one(Parcel, self.key).weight += 1  # type: ignore[attr-defined]

        self.engine.run(work, shard_key=self.key)
        return self.engine.shard_for(self.key).id


@pytest.fixture
def pair() -> Iterator[Pair]:
    with LocalCluster(shards=2, replicas=1) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(Base.metadata)
        yield Pair(cluster, engine)


async def gives_way(manager: Manager, job: Job, part: str) -> None:
    """Until an attempt of the job has given way for this reason, and another one as well."""
    async with asyncio.timeout(60):
        while part not in ((found := await manager.get_job(job.id)).error or "") or found.attempts < 2:
            assert found.status not in (Status.VALIDATION, Status.COMPLETED), "switched"
            await asyncio.sleep(0.1)


async def run(pair: Pair, job: Job) -> Job:
    async with Resharder(pair.cluster.url, limits=Limits(budget_s=0.6, close_s=0.3)) as resharder:
        return await resharder.run(job.id, complete=True)


async def test_a_replica_that_has_not_replayed_the_closing_keeps_the_switch_waiting(pair: Pair) -> None:
    async with Manager(pair.cluster.url) as manager:
        pair.at_replica("SELECT pg_wal_replay_pause()")
        job = await manager.move_keys([pair.key], target={"shard_id": "s2"})
        running = asyncio.create_task(run(pair, job))
        await gives_way(manager, job, "has not replayed")
        assert await asyncio.to_thread(pair.add) == "s1", "the range is open again, and where it was"
        pair.at_replica("SELECT pg_wal_replay_resume()")
        async with asyncio.timeout(90):
            assert (await running).status is Status.COMPLETED
        assert await asyncio.to_thread(pair.add) == "s2"


async def test_a_replica_that_somebody_promoted_does_not_count_as_one_that_has_closed(pair: Pair) -> None:
    # Clients who are sent there would be let in by gates that the primary has closed, and their writes be lost.
    async with Manager(pair.cluster.url) as manager:
        job = await manager.move_keys([pair.key], target={"shard_id": "s2"})
        pair.at_replica("SELECT pg_promote()")
        running = asyncio.create_task(run(pair, job))
        await gives_way(manager, job, "was promoted")
        assert await asyncio.to_thread(pair.add) == "s1"
        await manager.cancel(job.id)
        async with asyncio.timeout(60):
            assert (await running).status is Status.CANCELLED
        assert await asyncio.to_thread(pair.add) == "s1"


SIDES = pytest.mark.parametrize("shard", ["shard-01", "shard-02"], ids=["source", "target"])


class Told:
    """Runs a job, and hears what it says of the replicas that keep it waiting."""

    def __init__(self, pair: Pair, job: Job) -> None:
        self.pair, self.job = pair, job
        self.waiting: tuple[Waiting, ...] = ()
        self.metrics = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[Job]]:
        def hear(progress: JobProgress) -> None:
            self.waiting = progress.waiting
            self.metrics = resharder.metrics()

        async with Resharder(self.pair.cluster.url, on_progress=hear) as resharder:
            task = asyncio.create_task(resharder.run(self.job.id, complete=True))
            try:
                yield task
            finally:
                task.cancel()
                await asyncio.wait([task])

    async def said(self, part: str) -> Waiting:
        """What it says of one replica, once that has this part."""

        async def found() -> list[Waiting]:
            return [one for one in self.waiting if one.kind == "replica" and part in one.text]

        (one,) = await eventually_async(found, 60, part)
        return one


@SIDES
async def test_a_replica_that_is_behind_is_named_in_the_progress(pair: Pair, shard: str) -> None:
    (replica,) = pair.cluster.replicas(shard)
    async with Manager(pair.cluster.url) as manager:
        pair.at_replica("SELECT pg_wal_replay_pause()", shard)
        told = Told(pair, job := await manager.move_keys([pair.key], target={"shard_id": "s2"}))
        async with told.running() as task:
            await gives_way(manager, job, "has not replayed")
            one = await told.said("has not replayed")
            assert one.shard == shard
            assert one.behind_bytes is not None
            assert one.behind_bytes > 0
            assert str(Dsn(replica.dsn)) in one.text
            assert not any(secret in one.text for secret in secrets_of(replica.dsn))
            assert f'shard_reshard_waiting{{job="{job.id}",kind="replica"}} 1' in told.metrics
            assert not task.done()
            pair.at_replica("SELECT pg_wal_replay_resume()", shard)
            async with asyncio.timeout(90):
                assert (await task).status is Status.COMPLETED
        assert told.waiting == ()
    assert await asyncio.to_thread(pair.add) == "s2"


@SIDES
async def test_a_replica_that_is_away_is_named_in_the_progress(pair: Pair, shard: str) -> None:
    (replica,) = pair.cluster.replicas(shard)
    async with Manager(pair.cluster.url) as manager:
        told = Told(pair, await manager.move_keys([pair.key], target={"shard_id": "s2"}))
        await asyncio.to_thread(replica.stop)
        async with told.running() as task:
            one = await told.said("does not answer")
            assert (one.shard, one.behind_bytes) == (shard, None)
            assert str(Dsn(replica.dsn)) in one.text
            assert not task.done()
            await asyncio.to_thread(replica.start)
            async with asyncio.timeout(90):
                assert (await task).status is Status.COMPLETED
    assert await asyncio.to_thread(pair.add) == "s2"
