"""Each kind of job from end to end, while clients write: every row is there once, with what they wrote."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import ForeignKeyConstraint, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import ShardedEngine, ShardedSession
from shardlib.errors import CommitOutcomeUnknown
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder

pytestmark = pytest.mark.timeout(240)

WRITERS = 3
LEFT = (
    "SELECT relname FROM pg_class WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^job_[0-9]'",
    "SELECT slot_name FROM pg_replication_slots",
    "SELECT conname FROM pg_constraint WHERE NOT convalidated",
)


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    tenant: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    count: Mapped[int]


class Entry(Base):
    __tablename__ = "entry"
    __table_args__ = (ForeignKeyConstraint(["tenant"], ["account.tenant"], name="entry_of"),)

    tenant: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Books:
    """The cluster, and what its clients were told."""

    def __init__(self, cluster: LocalCluster, engine: ShardedEngine) -> None:
        self.cluster, self.engine, self.url = cluster, engine, cluster.url
        self.tenants = [f"tenant-{number}" for number in range(60)]
        self.told, self.doubtful = Counter[str](), Counter[str]()
        self.errors: list[BaseException] = []
        for tenant in self.tenants:
            with engine.session(tenant) as session:
                session.add(Account(tenant=tenant, count=0))
                session.commit()

    def _write(self, stop: threading.Event, mine: list[str], rng: random.Random) -> None:
        try:
            while not stop.is_set():
                tenant = rng.choice(mine)

                def work(session: ShardedSession, tenant: str = tenant) -> None:
                    account = session.get_one(Account, tenant)
                    account.count += 1
                    session.add(Entry(tenant=tenant, number=account.count))

                try:
                    self.engine.run(work, shard_key=tenant)
                    self.told[tenant] += 1
                except CommitOutcomeUnknown:
                    self.doubtful[tenant] += 1
                time.sleep(rng.uniform(0, 0.004))
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.errors.append(error)

    @asynccontextmanager
    async def written(self) -> AsyncIterator[None]:
        """Clients write, each to tenants of its own."""
        stop, before = threading.Event(), self.told.total()
        threads = [
            threading.Thread(target=self._write, args=(stop, self.tenants[at::WRITERS], random.Random(at)))
            for at in range(WRITERS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
            await asyncio.sleep(0.3)
        finally:
            stop.set()
            for thread in threads:
                await asyncio.to_thread(thread.join, 60)
        assert self.errors == []
        assert self.told.total() - before > 50

    def check(self) -> Topology:
        """Every row is where its key is, once, and nowhere else; nothing of a job is left."""
        topology = self.engine.refresh()
        assert topology.moves == ()
        counts, entries = dict[str, int](), Counter[str]()
        for shard in topology.shards:
            with psycopg.connect(shard.primary.reveal()) as conn:
                if conn.execute("SELECT to_regclass('public.account')").fetchall() == [(None,)]:
                    continue
                for tenant, count in conn.execute("SELECT tenant, count FROM public.account").fetchall():
                    assert self.engine.shard_for(tenant).id == shard.id, f"{tenant} is on {shard.name}"
                    assert counts.setdefault(tenant, count) is count
                rows = conn.execute("SELECT tenant, max(number), count(*) FROM public.entry GROUP BY 1").fetchall()
                for tenant, number, some in rows:
                    assert self.engine.shard_for(tenant).id == shard.id, f"an entry of {tenant} is on {shard.name}"
                    assert number == some
                    entries[tenant] = number
                assert [conn.execute(query.encode()).fetchall() for query in LEFT] == [[]] * len(LEFT)
        assert sorted(counts) == sorted(self.tenants)
        for tenant in self.tenants:
            told = self.told[tenant]
            assert told <= counts[tenant] <= told + self.doubtful[tenant], tenant
            assert entries[tenant] == counts[tenant], tenant
        with self.engine.session() as session:
            assert sorted(session.scalars(select(Account.tenant)).all()) == sorted(self.tenants)
        return topology

    async def run(self, job: Job, *, complete: bool = True) -> Job:
        async with Resharder(self.url) as resharder, asyncio.timeout(120):
            return await resharder.run(job.id, complete=complete)


@pytest.fixture(scope="module")
def books() -> Iterator[Books]:
    with LocalCluster(shards=3) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(Base.metadata)
        yield Books(cluster, engine)


@pytest.fixture
async def manager(books: Books) -> AsyncIterator[Manager]:
    async with Manager(books.url) as opened:
        yield opened


def owned(topology: Topology, name: str) -> float:
    shard = topology.shard(name)
    if shard.id not in topology.ring.shard_ids:
        return 0.0
    return sum(part.last - part.first + 1 for part in topology.ring.ranges_of(shard.id)) / 2**64


async def test_move_keys(books: Books, manager: Manager) -> None:
    moved = [tenant for tenant in books.tenants if books.engine.shard_for(tenant).name != "shard-02"][:3]
    async with books.written():
        job = await books.run(await manager.move_keys(moved, target={"shard_id": "shard-02"}))
    assert job.status is Status.COMPLETED, job.error
    books.check()
    assert {books.engine.shard_for(tenant).name for tenant in moved} == {"shard-02"}


async def test_undo(books: Books, manager: Manager) -> None:
    """What was written on the new side meanwhile is on the old one after the rollback."""
    spare = books.cluster.spare("undo-1")
    before = books.engine.refresh().ring
    async with books.written():
        target: dict[str, Any] = {"name": "undone", "primary_endpoint": spare.dsn}
        job = await books.run(await manager.split("shard-01", targets=[target]), complete=False)
        assert job.status is Status.VALIDATION, job.error
        told = books.told.total()
        async with asyncio.timeout(60):
            while books.told.total() < told + 100:  # noqa: ASYNC110 - told by threads
                await asyncio.sleep(0.05)
        await manager.rollback(job.id)
        job = await books.run(job, complete=False)
    assert job.status is Status.ROLLED_BACK, job.error
    topology = books.check()
    assert owned(topology, "undone") == 0
    assert [topology.ring.owner_of(token) for token in before.tokens] == [before.owner_of(t) for t in before.tokens]


async def test_rebalance(books: Books, manager: Manager) -> None:
    spare = books.cluster.spare("rebalance-1")
    async with books.written():
        job = await books.run(await manager.rebalance(target={"name": "fresh", "primary_endpoint": spare.dsn}))
    assert job.status is Status.COMPLETED, job.error
    share = owned(books.check(), "fresh")
    assert 0.1 < share < 0.5
    assert len(job.legs) > 1


async def test_drain(books: Books, manager: Manager) -> None:
    topology = books.engine.refresh()
    name = max(topology.owners(), key=lambda shard: shard.id).name
    async with books.written():
        job = await books.run(await manager.drain(name))
    assert job.status is Status.COMPLETED, job.error
    assert owned(books.check(), name) == 0


async def test_merge(books: Books, manager: Manager) -> None:
    first, second, *_ = books.engine.refresh().owners()
    async with books.written():
        job = await books.run(await manager.merge([second.name], target={"shard_id": first.name}))
    assert job.status is Status.COMPLETED, job.error
    assert owned(books.check(), second.name) == 0


async def test_split_into_two_tells_where_moved_keys_are(books: Books, manager: Manager) -> None:
    """And the foreign keys that were made before the rows were there are checked after the switch, and told of."""
    spares = [books.cluster.spare(f"split-{number}") for number in (1, 2)]
    source = books.engine.refresh().owners()[0]
    mine = [tenant for tenant in books.tenants if books.engine.shard_for(tenant).id == source.id]
    orphan = mine[0]
    with psycopg.connect(source.primary.reveal(), autocommit=True) as conn:
        conn.execute("SET session_replication_role = replica")
        for tenant in mine:
            conn.execute("INSERT INTO public.entry VALUES (%s, -1)", (tenant,))
            conn.execute("DELETE FROM public.account WHERE tenant = %s", (tenant,))
        targets: list[dict[str, Any]] = [
            {"name": f"part-{at}", "primary_endpoint": spare.dsn} for at, spare in enumerate(spares, 1)
        ]
        job = await books.run(await manager.split(source.name, targets=targets, keep=0), complete=False)
        assert job.status is Status.VALIDATION, job.error
        assert job.error is not None
        assert "entry.entry_of" in job.error
        books.engine.refresh()
        with pytest.raises(psycopg.Error) as refused:
            conn.execute("INSERT INTO public.account VALUES (%s, 0)", (orphan,))
        assert f"has moved to shard {books.engine.shard_for(orphan).name}" in str(refused.value)
    for tenant in mine:
        with psycopg.connect(books.engine.shard_for(tenant).primary.reveal()) as there:
            count = books.told[tenant] + books.doubtful[tenant]
            there.execute("DELETE FROM public.entry WHERE number = -1 AND tenant = %s", (tenant,))
            there.execute("INSERT INTO public.account VALUES (%s, %s)", (tenant, count))
    job = await books.run(job)
    assert job.status is Status.COMPLETED, job.error
    books.check()


COLLATIONS = {
    "C": 'CREATE COLLATION IF NOT EXISTS keyed FROM "C"',
    "icu": "CREATE COLLATION IF NOT EXISTS keyed (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
}


def with_icu() -> Path | None:
    """The programs of a package of the system, which is built with ICU; None for the usual ones, which may not be."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@pytest.mark.parametrize("kind", COLLATIONS)
async def test_keys_are_told_apart_by_their_bytes_whatever_a_column_takes_as_equal(kind: str) -> None:
    """`Straße-1` and `straße-1` are two keys, though the column's collation takes them as equal."""
    keys = [text for number in range(20) for text in (f"straße-{number}", f"Straße-{number}", f"STRASSE-{number}")]
    with LocalCluster(shards=2, pg_bin=with_icu()) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(Entry.metadata)
        for server in cluster.servers:
            with psycopg.connect(server.dsn, autocommit=True) as conn:
                try:
                    conn.execute(sql.SQL(COLLATIONS[kind]))
                except psycopg.errors.FeatureNotSupported:
                    pytest.skip("PostgreSQL was built without ICU")
                conn.execute("ALTER TABLE entry DROP CONSTRAINT entry_of")
                conn.execute("ALTER TABLE entry ALTER COLUMN tenant TYPE varchar COLLATE keyed")
        for number, key in enumerate(keys):
            engine.run(lambda session, n=number, k=key: session.add(Entry(tenant=k, number=n)), shard_key=key)  # type: ignore[misc]
        moved = [key for key in keys if engine.shard_for(key).id == "s1"][::2]
        async with Manager(cluster.url) as manager, Resharder(cluster.url) as resharder, asyncio.timeout(120):
            job = await manager.move_keys(moved, target={"shard_id": "s2"})
            rested = await resharder.run(job.id)
            assert rested.status is Status.VALIDATION, rested.error
            engine.refresh()
            with engine.session() as session:
                assert sorted(session.scalars(select(Entry.tenant)).all()) == sorted(keys)
            rested = await resharder.run(job.id, complete=True)
        assert rested.status is Status.COMPLETED, rested.error
        engine.refresh()
        for shard, server in zip(engine.topology.shards, cluster.servers, strict=True):
            with psycopg.connect(server.dsn) as conn:
                found = [key for (key,) in conn.execute("SELECT tenant FROM entry").fetchall()]
            assert sorted(found) == sorted(key for key in keys if engine.shard_for(key).id == shard.id)
