"""What cannot be done is refused with an error that says why and what to do; the topology stays as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import ShardedEngine
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder

pytestmark = pytest.mark.timeout(240)


class Base(DeclarativeBase):
    pass


class Ticket(Base):
    __tablename__ = "ticket"

    guest: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seat: Mapped[int]


KEYS = [f"guest-{number}" for number in range(40)]


class Hall:
    """Two shards with rows; every refusal is checked to have changed nothing."""

    def __init__(self, cluster: LocalCluster, engine: ShardedEngine, manager: Manager) -> None:
        self.cluster, self.engine, self.manager = cluster, engine, manager

    def sql(self, shard: str, statement: str) -> None:
        dsn = self.engine.topology.shard(shard).primary.reveal()
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(sql.SQL(statement))  # type: ignore[arg-type]

    @asynccontextmanager
    async def refused(self, *parts: str, error: type[Exception] = InvalidTopology) -> AsyncIterator[None]:
        before, jobs = await self.manager.topology(), await self.manager.list_jobs()
        with pytest.raises(error) as caught:
            yield
        for part in parts:
            assert part in str(caught.value)
        await self.unchanged(before)
        assert await self.manager.list_jobs() == jobs

    async def unchanged(self, before: Topology) -> None:
        after = await self.manager.topology()
        assert (after.version, after.nonce) == (before.version, before.nonce)

    def keys_of(self, shard_id: str) -> list[str]:
        return [key for key in KEYS if self.engine.shard_for(key).id == shard_id]

    async def moved(self, **step: Any) -> Job:
        """A job that rests in validation."""
        job = await self.manager.move_keys(self.keys_of("s1")[:1], target={"shard_id": "s2"})
        async with Resharder(self.cluster.url, **step) as resharder, asyncio.timeout(60):
            rested = await resharder.run(job.id)
        assert rested.status is Status.VALIDATION, rested.error
        return rested


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as running:
        with ShardedEngine(running.url) as engine:
            engine.create_all(Base.metadata)
            for number, key in enumerate(KEYS):
                with engine.session(key) as session:
                    session.add(Ticket(guest=key, number=number, seat=number // 2))
                    session.commit()
        yield running


@pytest.fixture
async def hall(cluster: LocalCluster) -> AsyncIterator[Hall]:
    with ShardedEngine(cluster.url) as engine:
        async with Manager(cluster.url) as manager:
            yield Hall(cluster, engine, manager)


async def test_a_merge_in_which_unique_values_would_collide(hall: Hall) -> None:
    """A primary key holds the shard key, so only other unique indexes can; each is named."""
    for shard in ("s1", "s2"):
        hall.sql(shard, "CREATE UNIQUE INDEX one_seat ON ticket (number, seat)")
    try:
        plan = await hall.manager.merge(["s1"], target={"shard_id": "s2"}, dry_run=True)
        assert any("unique index 'one_seat' of table 'ticket'" in line for line in plan.in_the_way)
        async with hall.refused(
            "unique index 'one_seat' of table 'ticket'", "add the shard key to the index, or drop it"
        ):
            await hall.manager.merge(["s1"], target={"shard_id": "s2"})
    finally:
        for shard in ("s1", "s2"):
            hall.sql(shard, "DROP INDEX one_seat")


async def test_a_target_that_holds_rows_of_the_ranges(hall: Hall) -> None:
    key = hall.keys_of("s1")[0]
    hall.sql("s2", f"INSERT INTO ticket VALUES ('{key}', 999, 1)")
    try:
        plan = await hall.manager.move_keys([key], target={"shard_id": "s2"}, dry_run=True)
        assert any(key in line for line in plan.in_the_way), plan
        async with hall.refused(key, "ticket"):
            await hall.manager.move_keys([key], target={"shard_id": "s2"})
    finally:
        hall.sql("s2", "DELETE FROM ticket WHERE number = 999")


async def test_a_split_into_a_shard_that_is_in_use(hall: Hall) -> None:
    """Its own rows are in nobody's way: it takes the part."""
    plan = await hall.manager.split("s1", targets=[{"shard_id": "s2"}], dry_run=True)
    assert plan.in_the_way == ()
    async with hall.refused("nothing moves onto itself", error=InvalidArgument):
        await hall.manager.split("s1", targets=[{"shard_id": "s1"}])


async def test_a_table_without_key_or_identity(hall: Hall) -> None:
    hall.sql("s1", "ALTER TABLE ticket DROP CONSTRAINT ticket_pkey")
    try:
        async with hall.refused("'ticket' has no primary key and no replica identity", "REPLICA IDENTITY FULL"):
            await hall.manager.move_keys(hall.keys_of("s1")[:1], target={"shard_id": "s2"})
    finally:
        hall.sql("s1", "ALTER TABLE ticket ADD PRIMARY KEY (guest, number)")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wal_level": "replica"}, "wal_level"),
        ({"max_replication_slots": "1"}, "max_replication_slots"),
        ({"max_wal_senders": "1"}, "max_wal_senders"),
    ],
)
async def test_a_server_that_cannot_send_changes(settings: dict[str, str], said: str) -> None:
    with LocalCluster(shards=2, settings=settings) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(Base.metadata)
        async with Manager(cluster.url) as manager:
            hall = Hall(cluster, engine, manager)
            async with hall.refused(said, "shard-01"):
                await manager.move_keys(hall.keys_of("s1")[:1], target={"shard_id": "s2"})
            plan = await manager.move_keys(hall.keys_of("s1")[:1], target={"shard_id": "s2"}, dry_run=True)
            assert any(said in line for line in plan.in_the_way)


async def test_a_target_whose_role_may_not_replicate(hall: Hall) -> None:
    spare = hall.cluster.spare("plain-1")
    with psycopg.connect(spare.dsn, autocommit=True) as conn:
        conn.execute("CREATE ROLE plain LOGIN PASSWORD 'hidden-word'")
        row = conn.execute("SELECT current_database()").fetchone()
        assert row is not None
        conn.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO plain").format(sql.Identifier(row[0])))
    plain = Dsn(spare.dsn).conninfo(user="plain", password="hidden-word")
    plan = await hall.manager.split("s1", targets=[{"name": "plain", "primary_endpoint": plain}], dry_run=True)
    found = [line for line in plan.in_the_way if "REPLICATION" in line]
    assert found, plan.in_the_way
    assert "hidden-word" not in " ".join(plan.in_the_way)


async def test_a_job_that_is_not_there(hall: Hall) -> None:
    for ask in (hall.manager.get_job, hall.manager.cancel, hall.manager.rollback, hall.manager.complete):
        async with hall.refused("4711"):
            await ask(4711)
    async with Resharder(hall.cluster.url) as resharder, hall.refused("4711"):
        await resharder.run(4711)
    async with hall.refused("no-shard"):
        await hall.manager.drain("no-shard")
    async with hall.refused("retention_s", error=InvalidArgument):
        await hall.manager.drain("s1", retention_s=-1)


async def test_cancelling_after_the_switch_and_rolling_back_after_the_cleanup_began(hall: Hall) -> None:
    job = await hall.moved()
    async with hall.refused("'validation'", "rollback"):
        await hall.manager.cancel(job.id)
    await hall.manager.rollback(job.id)
    async with hall.refused("roll back", "`resume`"):
        await hall.manager.complete(job.id)
    await hall.manager.resume(job.id)
    await hall.manager.complete(job.id)
    late: list[str] = []

    async def step(name: str) -> None:
        if name == "shard_purged":
            before = await hall.manager.topology()
            for ask in (hall.manager.rollback, hall.manager.cancel):
                with pytest.raises(InvalidTopology, match="'cleanup'") as caught:
                    await ask(job.id)
                late.append(str(caught.value))
            await hall.unchanged(before)

    async with Resharder(hall.cluster.url, on_step=step) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job.id)).status is Status.COMPLETED
    assert len(late) == 2


async def test_notes_are_told_and_stop_nothing(hall: Hall) -> None:
    for shard in ("s1", "s2"):
        hall.sql(shard, "CREATE UNIQUE INDEX one_number ON ticket (number)")
    spare = hall.cluster.spare("noted-1")
    try:
        plan = await hall.manager.split("s1", targets=[{"name": "noted", "primary_endpoint": spare.dsn}], dry_run=True)
        assert plan.in_the_way == ()
        assert any("one_number" in line for line in plan.notes)
    finally:
        for shard in ("s1", "s2"):
            hall.sql(shard, "DROP INDEX one_number")


async def test_a_cluster_without_tables() -> None:
    with LocalCluster(shards=1) as empty:
        spare = empty.spare("spare-1")
        async with Manager(empty.url) as manager:
            before = await manager.topology()
            with pytest.raises(InvalidTopology, match=r"no sharded table yet.*create_all"):
                await manager.split("shard-01", targets=[{"name": "shard-02", "primary_endpoint": spare.dsn}])
            assert (await manager.topology()).version == before.version
