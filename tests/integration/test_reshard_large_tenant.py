"""A tenant with very many rows that is always written moves all the same, and a row of it that differs is found."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import psycopg
import pytest
from sqlalchemy import BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import ShardedEngine, ShardedSession
from shardlib.errors import CommitOutcomeUnknown
from shardlib.ring.ranges import ranges_contain
from shardlib.token import hash_of
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.reshard.validate import compare
from shardlib_ops.reshard.validate.sides import Equal

pytestmark = pytest.mark.timeout(400)

ROWS: Final = 300_000
SMALL: Final = 20
_LIMIT_S: Final = 150


class Base(DeclarativeBase):
    pass


class Line(Base):
    __tablename__ = "line"

    tenant: Mapped[int] = mapped_column(BigInteger, primary_key=True, info={"shard_key": True})
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    v: Mapped[int] = mapped_column(BigInteger)


class Shop:
    """A cluster whose first shard has one large tenant that a split will move, and small ones."""

    def __init__(self, cluster: LocalCluster, engine: ShardedEngine) -> None:
        self.cluster, self.engine, self.url = cluster, engine, cluster.url
        self.target = cluster.spare("spare-1")
        self.large = 0
        self.small: list[int] = []
        self.sum: dict[int, int] = {}
        """By tenant, the sum of `v` that was acknowledged: each write adds one, or takes a row away."""
        self.count: dict[int, int] = {}
        self.doubtful = self.written = 0
        self.errors: list[BaseException] = []

    def fill(self, moves: Callable[[int], bool]) -> None:
        self.large = next(number for number in range(1, 1_000) if moves(number))
        self.small = [number for number in range(1, 200) if number != self.large][:40]
        with self.cluster.servers[0].connect() as conn:
            for tenant, rows in ((self.large, ROWS), *((tenant, SMALL) for tenant in self.small)):
                conn.execute("INSERT INTO line SELECT %s, g, 0 FROM generate_series(1, %s) g", (tenant, rows))
                self.sum[tenant], self.count[tenant] = 0, rows

    def write(self, rng: random.Random) -> None:
        """One transaction: one row is changed, and perhaps one added, or one that was added taken away."""
        tenant = self.large if rng.random() < 0.8 else rng.choice(self.small)
        row = 1 if rng.random() < 0.2 else rng.randint(1, ROWS if tenant == self.large else SMALL)
        other = -rng.randint(1, 2_000)

        def work(session: ShardedSession) -> tuple[int, int]:
            session.get_one(Line, (tenant, row)).v += 1
            found = session.get(Line, (tenant, other))
            if found is None:
                session.add(Line(tenant=tenant, id=other, v=1))
                return 2, 1
            session.delete(found)
            return 1 - found.v, -1

        try:
            more, rows = self.engine.run(work, shard_key=tenant)
        except CommitOutcomeUnknown:
            self.doubtful += 1
            return
        self.sum[tenant] += more
        self.count[tenant] += rows
        self.written += 1

    def _write(self, stop: threading.Event, rng: random.Random) -> None:
        try:
            while not stop.wait(rng.uniform(0, 0.002)):
                self.write(rng)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.errors.append(error)

    @asynccontextmanager
    async def being_written(self, seed: int) -> AsyncIterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._write, args=(stop, random.Random(seed)))
        thread.start()
        try:
            yield
            await self.more_written(50)
        finally:
            stop.set()
            await asyncio.to_thread(thread.join, 60)
        assert self.errors == []

    async def more_written(self, count: int) -> None:
        until = self.written + count
        async with asyncio.timeout(60):
            while self.written < until and not self.errors:  # noqa: ASYNC110 - told by a thread
                await asyncio.sleep(0.05)

    def check(self, *, moved: bool) -> None:
        """Each row is there once, on the shard of its tenant, with what was written."""
        topology = self.engine.refresh()
        assert topology.moves == ()
        sums, counts = dict[int, int](), dict[int, int]()
        for shard in topology.shards:
            with psycopg.connect(shard.primary.reveal()) as conn:
                if conn.execute("SELECT to_regclass('public.line')").fetchone() == (None,):
                    continue
                found = conn.execute("SELECT tenant, sum(v)::bigint, count(*) FROM public.line GROUP BY 1").fetchall()
                for tenant, total, rows in found:
                    assert self.engine.shard_for(tenant).id == shard.id, f"{tenant} is on {shard.name}"
                    sums[tenant], counts[tenant] = total, rows
        assert self.engine.shard_for(self.large).name == ("large" if moved else "shard-01")
        if not self.doubtful:
            assert (sums, counts) == (self.sum, self.count)

    async def run(self, job: Job, on_step: Callable[[str], Awaitable[None]] | None = None) -> Job:
        resharder = Resharder(self.url, purge_rows_per_s=1_000_000, on_step=on_step)
        async with resharder, asyncio.timeout(_LIMIT_S):
            return await resharder.run(job.id, complete=True)


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    with LocalCluster(shards=1) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(Base.metadata)
        yield Shop(cluster, engine)


async def test_a_large_tenant_moves_while_it_is_written(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    lately = compare.compare_lately
    read: list[tuple[bool, int, float]] = []

    async def watched(*args: Any, whole: int, **more: Any) -> Equal:
        began = time.monotonic()
        found = await lately(*args, whole=whole, **more)
        read.append((whole == compare._WHOLE_CLOSED, found.rows, time.monotonic() - began))
        return found

    monkeypatch.setattr(compare, "compare_lately", watched)
    planted = asyncio.Event()

    async def plant(step: str) -> None:
        if step == "status_cutover":
            await shop.more_written(30)  # the first row is among those that changed since the last comparison
        if step == "drained" and not planted.is_set():
            planted.set()
            with shop.target.connect() as conn:
                done = conn.execute("UPDATE public.line SET v = v - 1 WHERE tenant = %s AND id = 1", (shop.large,))
                assert done.rowcount == 1

    async with Manager(shop.url) as manager:
        targets: list[dict[str, Any]] = [{"name": "large", "primary_endpoint": shop.target.dsn}]
        plan = await manager.split("shard-01", targets=targets, dry_run=True)
        ranges, token = plan.job_legs[0].ranges, hash_of(shop.engine.topology.hash_function)
        shop.fill(lambda number: ranges_contain(ranges, token(str(number).encode())))

        # A row that was changed behind the stream, just before the comparison: nothing is switched.
        async with shop.being_written(seed):
            job = await shop.run(await manager.split("shard-01", targets=targets), plant)
            assert planted.is_set()
            assert job.status is Status.FAILED, job.error
            assert job.error is not None
            assert f"'{shop.large}'" in job.error
            await shop.more_written(50)  # the ranges are open
        shop.check(moved=False)

        read.clear()
        async with shop.being_written(seed + 1):
            job = await shop.run(await manager.split("shard-01", targets=[{"shard_id": "large"}]))
        assert job.status is Status.COMPLETED, job.error
    shop.check(moved=True)
    closed = [(rows, round(took_s, 3)) for window, rows, took_s in read if window]
    print(f"attempts {job.attempts}, in the closed window: {closed}, {shop.written} writes")
    rows, _ = closed[-1]
    assert 0 < rows < ROWS // 10, "what was changed lately, and not all rows of the tenant"
