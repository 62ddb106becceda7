"""How far a job is, on real servers: counted, written down, shown; and what it says while something is in its way."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.ring.ranges import ranges_contain
from shardlib.token import hash_of
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.progress import JobProgress, Waiting
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.reshard.store import JobStore

pytestmark = pytest.mark.timeout(240)

ROWS, KEYS = 30_000, 600


class Base(DeclarativeBase):
    pass


class Visit(Base):
    __tablename__ = "visit"

    visitor: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    page: Mapped[str]


class Nothing(Base):
    __tablename__ = "nothing"

    visitor: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})


class Town:
    """A cluster of two shards, whose rows go to and fro."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster, self.url = cluster, cluster.url
        self.dsns = {server.shard: server.dsn for server in cluster.servers}
        with ShardedEngine(self.url) as engine:
            engine.create_all(Base.metadata)
            engine.bulk_load(
                Visit.__table__,
                ({"visitor": f"v-{n % KEYS}", "number": n, "page": f"/p/{n}" * 10} for n in range(ROWS)),
            )
            owned = {engine.shard_for(f"v-{n}").name for n in range(KEYS)}
        assert owned == {"shard-01", "shard-02"}

    def query(self, shard: str, text: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsns[shard], autocommit=True) as conn:
            return conn.execute(text.encode()).fetchall()

    def do(self, shard: str, *texts: str) -> None:
        with psycopg.connect(self.dsns[shard], autocommit=True) as conn:
            for text in texts:
                conn.execute(text.encode())

    def giver(self) -> tuple[str, str]:
        """(the shard that has most of the rows, the other one)."""
        counts = {shard: self.query(shard, "SELECT count(*) FROM visit")[0][0] for shard in self.dsns}
        one, other = sorted(counts, key=lambda shard: -counts[shard])
        return one, other

    async def half(self) -> tuple[Job, str, str]:
        """A job that moves a part from the shard that has most to the other one."""
        giver, taker = self.giver()
        async with Manager(self.url) as manager:
            job = await manager.split(giver, targets=[{"shard_id": taker}], keep=256)
        return job, giver, taker

    def moving(self, job: Job) -> str:
        """A visitor whose rows move."""
        token, ranges = hash_of("murmur3"), [part for leg in job.legs for part in leg.ranges]
        return next(v for n in range(KEYS) if ranges_contain(ranges, token((v := f"v-{n}").encode())))

    def stored(self, job: int) -> tuple[Job, JobProgress | None]:
        with closing(open_catalog(self.url)) as catalog:
            store = JobStore(catalog)
            return store.load(job), store.progress(job)

    def standing(self, job: int, said: str) -> Job | None:
        """The job, if it says this of what it waits for."""
        found, _ = self.stored(job)
        return found if said in (found.error or "") else None

    def waiting(self, job: int) -> tuple[Waiting, ...]:
        """Who stands in the way, as the catalog has it."""
        _, progress = self.stored(job)
        return () if progress is None else progress.waiting

    def clean(self) -> None:
        """Nothing of any job is left on the servers."""
        for shard in self.dsns:
            assert self.query(shard, "SELECT slot_name FROM pg_replication_slots") == []
            assert self.query(shard, "SELECT pubname FROM pg_publication") == []
        total = sum(self.query(shard, "SELECT count(*) FROM visit WHERE number < 1000000")[0][0] for shard in self.dsns)
        assert total == ROWS


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with LocalCluster(shards=2) as cluster:
        yield Town(cluster)


@pytest.fixture(autouse=True)
async def settled(town: Town) -> AsyncIterator[None]:
    """A test that failed leaves its job to nobody."""
    yield
    async with Manager(town.url) as manager, Resharder(town.url) as resharder, asyncio.timeout(100):
        for job in await manager.list_jobs():
            if not job.status.over:
                if job.switched_at is None:
                    await manager.cancel(job.id)
                await resharder.run(job.id, complete=True)


class Told:
    """Every progress that a resharder tells."""

    def __init__(self) -> None:
        self.all: list[JobProgress] = []
        self.changed = asyncio.Event()

    def __call__(self, progress: JobProgress) -> None:
        self.all.append(progress)
        self.changed.set()

    async def until(self, condition: Callable[[JobProgress], Any], timeout_s: float = 60) -> JobProgress:
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if self.all and condition(self.all[-1]):
                        return self.all[-1]
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(f"never told; the last was {self.all[-1:]}") from None


class Halt:
    """Holds a job up when it has done a step, for as long as a test likes."""

    def __init__(self, step: str) -> None:
        self._step = step
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, step: str) -> None:
        if step == self._step:
            self.reached.set()
            await self.go_on.wait()

    async def there(self) -> None:
        async with asyncio.timeout(60):
            await self.reached.wait()


@asynccontextmanager
async def running(resharder: Resharder, job: int, *, complete: bool = False) -> AsyncIterator[asyncio.Task[Job]]:
    task = asyncio.create_task(resharder.run(job, complete=complete))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def eventually(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := await asyncio.to_thread(condition)):
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.1)
    return found


async def cancelled(town: Town, job: int) -> None:
    async with Manager(town.url) as manager:
        await manager.cancel(job)
    async with Resharder(town.url) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job)).status is Status.CANCELLED


async def test_the_copy_counts_its_rows_and_the_record_of_it_stays(town: Town) -> None:
    job, giver, _ = await town.half()
    town.do(giver, "ANALYZE visit")
    told = Told()
    before = town.query(giver, "SELECT count(*), count(DISTINCT visitor) FROM visit")[0]
    async with Resharder(town.url, on_progress=told) as resharder, asyncio.timeout(90):
        assert resharder.metrics().splitlines()[-1].startswith("# TYPE shard_reshard_slot_bytes")
        assert (await resharder.run(job.id)).status is Status.VALIDATION
        (last,) = told.all[-1:]
        text = resharder.metrics()
    tables = {one.table: one for one in last.tables}
    assert set(tables) == {"visit", "nothing"}
    moved = tables["visit"]
    assert moved.done
    assert 0 < moved.rows < before[0]
    assert moved.rows == moved.rows_total
    assert moved.bytes is not None
    assert moved.bytes > moved.rows * 40
    assert (tables["nothing"].rows, tables["nothing"].done) == (0, True)
    assert last.keys_exact
    assert last.keys is not None
    assert 0 < last.keys < before[1]
    assert f'shard_reshard_table_rows{{job="{job.id}",leg="1",table="visit"}} {moved.rows}' in text
    assert f'shard_manager_reshard_progress{{job="{job.id}"}}' in text
    record, stored = town.stored(job.id)
    assert stored is not None
    assert (stored.status, stored.tables) == ("validation", last.tables)
    assert record.status is Status.VALIDATION
    async with Resharder(town.url) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job.id, complete=True)).status is Status.COMPLETED
    _, stored = town.stored(job.id)
    assert stored is not None
    assert (stored.fraction, stored.deleted_rows) == (1.0, moved.rows)
    town.clean()


async def test_before_the_copy_its_size_is_estimated_or_unknown(town: Town) -> None:
    job, giver, taker = await town.half()
    town.do(giver, "ANALYZE visit")
    rows, stored_bytes = town.query(giver, "SELECT count(*), pg_table_size('visit') FROM visit")[0]
    told = Told()
    # The copy waits behind this lock, which lets nobody read.
    with psycopg.connect(town.dsns[taker]) as locked:
        locked.execute("LOCK TABLE visit IN EXCLUSIVE MODE")
        async with Resharder(town.url, on_progress=told) as resharder, running(resharder, job.id):
            found = await told.until(lambda now: any(one.rows_total for one in now.tables))
            (table,) = [one for one in found.tables if one.table == "visit"]
            assert table.rows_total is not None
            assert table.bytes_total is not None
            assert 0.2 * rows < table.rows_total < 0.9 * rows
            assert 0.2 * stored_bytes < table.bytes_total < 0.9 * stored_bytes
            assert (table.rows, table.rows_per_s, table.eta_s) == (0, None, None)
            (empty,) = [one for one in found.tables if one.table == "nothing"]
            assert empty.rows_total == 0
        locked.rollback()
    await cancelled(town, job.id)
    town.clean()


GATES = "SELECT relname FROM pg_class WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^gate_'"


async def test_who_keeps_a_switch_from_happening_is_named(town: Town) -> None:
    job, giver, _ = await town.half()
    told = Told()
    halt = Halt("reverse_slots")
    async with Resharder(town.url, on_step=halt, on_progress=told) as resharder:
        with (
            psycopg.connect(town.dsns[giver], application_name="nightly report") as holder,
            psycopg.connect(town.dsns[giver], application_name="a cron job") as foreign,
        ):
            async with running(resharder, job.id) as task:
                await halt.there()
                # Through every gate that is open, as a client with keys of them all.
                gates = [f"shardlib.{gate}" for (gate,) in town.query(giver, GATES)]
                holder.execute(f"LOCK TABLE {', '.join(gates)} IN ACCESS SHARE MODE".encode())
                foreign.execute("UPDATE visit SET page = page WHERE number = (SELECT min(number) FROM visit)")
                halt.go_on.set()
                found = await told.until(
                    lambda now: {one.kind for one in now.waiting} >= {"transaction", "foreign_writer"}
                )
                (one,) = [each for each in found.waiting if each.kind == "transaction"]
                assert (one.pid, one.shard, one.application) == (holder.info.backend_pid, giver, "nightly report")
                assert one.state == "idle in transaction"
                assert one.since is not None
                assert f"process {one.pid}" in one.text
                (other,) = [each for each in found.waiting if each.kind == "foreign_writer"]
                assert (other.pid, other.application) == (foreign.info.backend_pid, "a cron job")
                assert "visit" in other.text
                assert f'shard_reshard_waiting{{job="{job.id}",kind="transaction"}} 1' in resharder.metrics()
                holder.rollback()
                foreign.rollback()
                async with asyncio.timeout(60):
                    assert (await task).status is Status.VALIDATION
    assert told.all[-1].waiting == ()
    async with Resharder(town.url) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job.id, complete=True)).status is Status.COMPLETED
    town.clean()


async def test_a_prepared_transaction_that_keeps_a_switch_from_happening_is_named(town: Town) -> None:
    """It has no process. What it wrote counts, however late it is decided."""
    job, giver, taker = await town.half()
    moving, told, halt = town.moving(job), Told(), Halt("reverse_slots")
    async with Resharder(town.url, on_step=halt, on_progress=told) as resharder, running(resharder, job.id) as task:
        await halt.there()
        gates = ", ".join(f"shardlib.{gate}" for (gate,) in town.query(giver, GATES))
        town.do(
            giver,
            "BEGIN",
            f"LOCK TABLE {gates} IN ACCESS SHARE MODE",
            f"UPDATE visit SET page = 'decided late' WHERE visitor = '{moving}'",
            "PREPARE TRANSACTION 'undecided-7'",
        )
        try:
            halt.go_on.set()
            found = await told.until(lambda now: [one for one in now.waiting if one.kind == "prepared"])
            (one,) = {(each.gid, each.pid, each.shard, each.user, each.state) for each in found.waiting}
            assert one == ("undecided-7", None, giver, "postgres", "prepared")
            assert all("prepared transaction 'undecided-7' of postgres" in each.text for each in found.waiting)
            (first, *_) = [each for each in found.waiting if each.kind == "prepared"]
            assert first.since is not None
            assert re.search(r'shard_reshard_waiting{job="\d+",kind="prepared"} [1-9]', resharder.metrics())
            # The record says it too, and the catalog has it for whoever looks from elsewhere.
            await eventually(lambda: town.standing(job.id, "prepared transaction"))
            await eventually(lambda: "prepared" in {each.kind for each in town.waiting(job.id)})
            assert not task.done()
        finally:
            town.do(giver, "COMMIT PREPARED 'undecided-7'")
        async with asyncio.timeout(90):
            done = await task
        assert (done.status, done.error) == (Status.VALIDATION, None)
    assert told.all[-1].waiting == ()
    assert town.query(taker, f"SELECT DISTINCT page FROM visit WHERE visitor = '{moving}'") == [("decided late",)]
    async with Resharder(town.url) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job.id, complete=True)).status is Status.COMPLETED
    town.clean()


async def test_a_catalog_that_is_away_stops_the_telling_only(town: Town) -> None:
    """The figures go on in the process; the job goes on by itself when the catalog is back."""
    job, _, _ = await town.half()
    told, halt = Told(), Halt("leg_copied")
    resharder = Resharder(town.url, on_step=halt, on_progress=told, lease_ttl_s=60)
    async with resharder, running(resharder, job.id) as task:
        await halt.there()
        (etcd,) = town.cluster.etcd
        etcd.pause()
        try:
            count = len(told.all)
            await told.until(lambda _: len(told.all) >= count + 4)
            halt.go_on.set()
            await told.until(lambda _: len(told.all) >= count + 6)
            assert not task.done()
        finally:
            etcd.resume()
        async with asyncio.timeout(90):
            assert (await task).status is Status.VALIDATION
    async with Resharder(town.url) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job.id, complete=True)).status is Status.COMPLETED
    town.clean()


async def test_a_slot_past_its_budget_undoes_the_job_before_the_switch(town: Town) -> None:
    job, giver, _ = await town.half()
    before = town.query(giver, "SELECT count(*) FROM visit")
    async with Resharder(town.url, max_slot_wal=1) as resharder, asyncio.timeout(90):
        found = await resharder.run(job.id)
    assert found.status is Status.FAILED
    assert found.error is not None
    assert "max_slot_wal allows 1 B" in found.error
    assert "undone rather than the disk filled" in found.error
    assert town.query(giver, "SELECT count(*) FROM visit") == before
    town.clean()


async def test_a_slot_past_its_budget_after_the_switch_gives_up_the_way_back(town: Town) -> None:
    job, _, taker = await town.half()
    async with Resharder(town.url) as resharder, asyncio.timeout(90):
        assert (await resharder.run(job.id)).status is Status.VALIDATION
    slots = town.query(taker, "SELECT slot_name FROM pg_replication_slots")
    assert slots == [(f"shardlib_job_{job.id}_1_r",)]
    # Nobody reads it while no resharder runs.
    town.do(taker, "SELECT pg_logical_emit_message(false, 'fill', repeat('x', 4000000))", "SELECT pg_switch_wal()")
    async with Resharder(town.url, max_slot_wal=1 << 20) as resharder, asyncio.timeout(90):
        found = await resharder.run(job.id)
        assert found.status is Status.VALIDATION
        assert found.error is not None
        assert "`rollback` is not possible, `complete` is" in found.error
        assert "max_slot_wal allows 1.0 MiB" in found.error
        assert town.query(taker, "SELECT slot_name FROM pg_replication_slots") == []
        again = await resharder.run(job.id)
        assert (again.status, again.error) == (Status.VALIDATION, found.error)
        assert (await resharder.run(job.id, complete=True)).status is Status.COMPLETED
    town.clean()


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_job_stands_still_while_a_table_is_altered_and_goes_on_when_it_is_not(town: Town, side: str) -> None:
    job, giver, taker = await town.half()
    altered = giver if side == "source" else taker
    halt = Halt("reverse_slots")
    moving = town.moving(job)
    async with Resharder(town.url, on_step=halt) as resharder, running(resharder, job.id) as task:
        await halt.there()
        town.do(altered, "ALTER TABLE visit RENAME COLUMN page TO leaf")
        try:
            if side == "target":
                town.do(giver, f"UPDATE visit SET page = page || '!' WHERE visitor = '{moving}'")
            halt.go_on.set()
            found = await eventually(lambda: town.standing(job.id, "'visit'"))
            assert not found.status.over
            assert "cancel" in found.error
        finally:
            town.do(altered, "ALTER TABLE visit RENAME COLUMN leaf TO page")
        async with asyncio.timeout(60):
            done = await task
        assert (done.status, done.error) == (Status.VALIDATION, None)
    async with Resharder(town.url) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job.id, complete=True)).status is Status.COMPLETED
    town.clean()


FULL = """
    CREATE OR REPLACE FUNCTION public.full_disk() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$;
    CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON visit FOR EACH ROW EXECUTE FUNCTION public.full_disk();
    ALTER TABLE visit ENABLE ALWAYS TRIGGER full_disk
"""


@pytest.mark.parametrize(("step", "status"), [("announced", Status.PRECOPY), ("reverse_slots", Status.DELTASYNC)])
async def test_a_full_disk_of_the_target_is_waited_for(town: Town, step: str, status: Status) -> None:
    """While rows are copied, and while changes flow. The error is the server's, of a trigger that stands for the disk:
    a real one cannot be filled without root."""
    job, giver, taker = await town.half()
    halt, moving = Halt(step), town.moving(job)
    try:
        async with Resharder(town.url, on_step=halt) as resharder, running(resharder, job.id) as task:
            await halt.there()
            town.do(taker, FULL)
            town.do(giver, f"UPDATE visit SET page = page || '!' WHERE visitor = '{moving}'")
            halt.go_on.set()
            found = await eventually(lambda: town.standing(job.id, "disk"))
            assert f"the disk of shard {taker!r} is full" in found.error
            assert "goes on by itself" in found.error
            assert found.status is status
            town.do(taker, "DROP TRIGGER full_disk ON visit")
            async with asyncio.timeout(60):
                done = await task
            assert (done.status, done.error) == (Status.VALIDATION, None)
        assert town.query(taker, f"SELECT bool_and(page LIKE '%!') FROM visit WHERE visitor = '{moving}'") == [(True,)]
    finally:
        town.do(taker, "DROP TRIGGER IF EXISTS full_disk ON visit")
    async with Resharder(town.url) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job.id, complete=True)).status is Status.COMPLETED
    town.clean()


async def test_a_slot_whose_wal_is_removed_is_told_of_and_the_copy_is_made_anew(town: Town) -> None:
    job, giver, _ = await town.half()
    told, halt = Told(), Halt("leg_copied")
    try:
        async with Resharder(town.url, on_step=halt, on_progress=told) as resharder:
            async with running(resharder, job.id):
                await halt.there()
            # Nobody reads the slot now.
            town.do(giver, "ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'", "SELECT pg_reload_conf()")
            for _ in range(3):
                town.do(
                    giver, "SELECT pg_logical_emit_message(false, 'fill', repeat('x', 1000))", "SELECT pg_switch_wal()"
                )
            town.do(giver, "CHECKPOINT")
            slots = town.query(giver, "SELECT wal_status FROM pg_replication_slots")
            assert slots == [("lost",)]
            town.do(giver, "ALTER SYSTEM RESET max_slot_wal_keep_size", "SELECT pg_reload_conf()")
            halt.go_on.set()
            async with asyncio.timeout(90):
                done = await resharder.run(job.id)
            assert (done.status, done.error) == (Status.VALIDATION, None)
    finally:
        town.do(giver, "ALTER SYSTEM RESET max_slot_wal_keep_size", "SELECT pg_reload_conf()")
    assert told.all[-1].tables[-1].done
    async with Resharder(town.url) as resharder, asyncio.timeout(60):
        assert (await resharder.run(job.id, complete=True)).status is Status.COMPLETED
    town.clean()


async def test_a_source_that_outruns_its_stream_is_told_of(town: Town) -> None:
    """The target is slow on purpose: a trigger takes its time for each row."""
    job, giver, taker = await town.half()
    moving = town.moving(job)
    halt, told, ended = Halt("reverse_slots"), Told(), asyncio.Event()
    resharder = Resharder(town.url, on_step=halt, on_progress=told, trend_s=6.0)
    async with resharder, running(resharder, job.id):
        await halt.there()
        await asyncio.to_thread(town.do, taker, SLOW)

        async def write() -> None:
            # New rows: changes of one row that come together are applied as one, and a target keeps up with those.
            conn = await psycopg.AsyncConnection.connect(town.dsns[giver], autocommit=True)
            async with conn:
                number = 1_000_000
                while not ended.is_set():
                    await conn.execute(
                        "INSERT INTO visit SELECT %s, n, '' FROM generate_series(%s::int, %s::int) AS n",
                        (moving, number, number + 49),
                    )
                    await conn.execute("SELECT pg_logical_emit_message(false, 'load', repeat('x', 500000))")
                    number += 50
                    await asyncio.sleep(0.2)  # a second of it keeps the target busy for five

        writing = asyncio.create_task(write())
        try:
            found = await told.until(lambda now: now.warnings)
            text = resharder.metrics()
        finally:
            ended.set()
            await writing
            # In a thread: the stream, which has the table, is of this loop.
            await asyncio.to_thread(town.do, taker, "DROP TRIGGER slow ON visit")
        (one,) = [each for each in found.streams if each.direction == "forward"]
        assert one.falls_behind
        assert one.lag_bytes is not None
        assert one.lag_bytes > 1 << 20
        assert one.lag_s is not None
        assert one.lag_s > 1
        assert one.written_per_s is not None
        assert one.applied_per_s is not None
        assert one.written_per_s > one.applied_per_s
        assert one.eta_s is None
        (said,) = found.warnings
        assert f"shard {giver!r} writes" in said
        assert "will not catch up: write less" in said
        assert f'shard_reshard_falls_behind{{job="{job.id}",leg="1",direction="forward"}} 1' in text
        # When the load is gone it catches up, and says so.
        await told.until(lambda now: not now.warnings and now.streams and now.streams[0].lag_bytes == 0, 120)
    await cancelled(town, job.id)
    town.clean()


SLOW = """
    CREATE OR REPLACE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END $$;
    CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON visit FOR EACH ROW EXECUTE FUNCTION public.slow();
    ALTER TABLE visit ENABLE ALWAYS TRIGGER slow
"""
