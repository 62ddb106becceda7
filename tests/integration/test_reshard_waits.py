"""Whom a job waits for: it says so at once, waits for whoever could do harm, and goes on when they have ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from psycopg import AsyncConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.cutover import Limits
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder

pytestmark = pytest.mark.timeout(180)


class Base(DeclarativeBase):
    pass


class Crate(Base):
    __tablename__ = "crate"

    owner: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    weight: Mapped[int]


class Yard:
    """Two shards; `take` gives a key of the first shard that no test has had."""

    def __init__(self, cluster: LocalCluster, engine: ShardedEngine) -> None:
        self.cluster, self.url, self.engine = cluster, cluster.url, engine
        found = (f"owner-{number}" for number in range(10_000))
        self._keys = (key for key in found if engine.shard_for(key).id == "s1")

    def take(self) -> str:
        key = next(self._keys)
        with self.engine.session(key) as session:
            session.add(Crate(owner=key, number=1, weight=0))
            session.commit()
        return key

    def weight(self, key: str) -> int | None:
        self.engine.refresh()
        with self.engine.session(key) as session:
            crate = session.get(Crate, (key, 1))
            return None if crate is None else crate.weight

    @asynccontextmanager
    async def stranger(self, server: int = 0) -> AsyncIterator[AsyncConnection[tuple[object, ...]]]:
        dsn = self.cluster.servers[server].dsn
        async with await AsyncConnection.connect(dsn, autocommit=True, application_name="old report") as conn:
            yield conn

    @asynccontextmanager
    async def moving(
        self, key: str, on_step: Callable[[str], Awaitable[None]] | None = None
    ) -> AsyncIterator[tuple[Manager, Job, asyncio.Task[Job]]]:
        async with Manager(self.url) as manager:
            job = await manager.move_keys([key], target={"shard_id": "s2"})
            limits = Limits(budget_s=0.6, close_s=0.3)
            async with Resharder(self.url, limits=limits, on_step=on_step) as resharder:
                running = asyncio.create_task(resharder.run(job.id, complete=True))
                try:
                    yield manager, job, running
                finally:
                    running.cancel()
                    await asyncio.wait([running])


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with LocalCluster(shards=2) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(Base.metadata)
        yield Yard(cluster, engine)


async def said(manager: Manager, job: Job, *parts: str, within_s: float = 20.0) -> str:
    """What the job says that it waits for, once that has these parts."""
    error = None
    async with asyncio.timeout(within_s):
        while error is None or not all(part in error for part in parts):
            await asyncio.sleep(0.1)
            error = (await manager.get_job(job.id)).error
    return error


async def ended(running: asyncio.Task[Job]) -> None:
    async with asyncio.timeout(60):
        job = await running
    assert job.status is Status.COMPLETED, job.error
    assert job.error is None


async def test_a_writer_from_before_the_job_is_named_within_seconds(yard: Yard) -> None:
    key = yard.take()
    async with yard.stranger() as conn:
        await conn.execute("BEGIN")
        await conn.execute("UPDATE crate SET weight = 7 WHERE owner = %s", (key,))
        async with yard.moving(key) as (manager, job, running):
            pid = str(conn.info.backend_pid)
            began = time.monotonic()
            error = await said(manager, job, f"process {pid}", "old report", "idle in transaction", "making the guard")
            assert time.monotonic() - began < 10  # not only when the lock's whole budget is over
            assert key not in error
            assert "UPDATE" not in error
            assert not running.done()
            await conn.execute("COMMIT")
            await ended(running)
    assert yard.weight(key) == 7


async def test_who_keeps_a_slot_from_being_made_is_named(yard: Yard) -> None:
    key = yard.take()
    async with yard.stranger() as conn:
        await conn.execute("BEGIN")
        await conn.execute("SELECT pg_current_xact_id()")
        async with yard.moving(key) as (manager, job, running):
            error = await said(manager, job, f"pid {conn.info.backend_pid}", "old report", "slot")
            assert "pg_current_xact_id" not in error
            await conn.execute("COMMIT")
            await ended(running)


async def test_a_writer_behind_a_gate_that_stays_open_cannot_write_past_the_switch(yard: Yard) -> None:
    """It wrote the table before the guard stood, so that its next statement does not meet the guard."""
    stays, moves = yard.take(), yard.take()
    async with yard.stranger() as conn:
        opened: list[int] = []

        async def step(name: str) -> None:
            if name != "status_cutover" or opened:
                return
            gate = yard.engine.refresh().default_gate("s1")
            opened.append(gate)
            await conn.execute("BEGIN")
            await conn.execute(f"LOCK TABLE shardlib.gate_{gate} IN ACCESS SHARE MODE".encode())
            await conn.execute("UPDATE crate SET weight = 1 WHERE owner = %s", (stays,))

        async with yard.moving(moves, step) as (manager, job, running):
            await said(manager, job, "transactions", "write to sharded tables", f"process {conn.info.backend_pid}")
            await asyncio.sleep(1)
            assert not running.done()
            await conn.execute("UPDATE crate SET weight = 5 WHERE owner = %s", (moves,))
            await conn.execute("COMMIT")
            await ended(running)
    assert yard.weight(moves) == 5
    assert yard.engine.shard_for(moves).id == "s2"


async def test_a_forgotten_session_is_ended_by_the_server_and_the_job_goes_on(yard: Yard) -> None:
    """The library lets a server end its idle transactions (after a minute, if nothing else is said).

    The program that still holds the session does not notice before its next statement; what it wrote is not there.
    """
    key = yard.take()
    with ShardedEngine(yard.url, idle_in_transaction_timeout_s=3.0) as engine:
        session = engine.session(key)
        crate = session.get(Crate, (key, 1))
        assert crate is not None
        crate.weight = 9
        session.flush()
        async with yard.moving(key) as (manager, job, running):
            error = await said(manager, job, "process ", "idle in transaction")
            assert key not in error
            await ended(running)
        with pytest.raises(SQLAlchemyError, match="idle-in-transaction timeout"):
            session.commit()
        session.close()
    assert yard.weight(key) == 0
    assert yard.engine.shard_for(key).id == "s2"


@pytest.mark.parametrize("verb", ["cancel", "pause"])
async def test_an_operator_ends_a_comparison_at_the_servers_too(yard: Yard, verb: str) -> None:
    """It waits for a lock that nobody gives back, as it would be busy for hours with many rows."""
    key = yard.take()
    async with yard.stranger(1) as holder, yard.stranger(1) as look:
        held = asyncio.Event()

        async def step(name: str) -> None:
            if name == "status_deltasync" and not held.is_set():
                await holder.execute("BEGIN")
                await holder.execute("LOCK TABLE crate IN ACCESS EXCLUSIVE MODE")
                held.set()

        async def compares(job: Job, wanted: int) -> None:
            statement = (
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s AND state = 'active'"
                " AND wait_event_type = 'Lock'"
            )
            async with asyncio.timeout(60):
                found = None
                while found != (wanted,):
                    await asyncio.sleep(0.1)
                    found = await (await look.execute(statement, (f"shardlib job {job.id} % compare%",))).fetchone()

        async with yard.moving(key, step) as (manager, job, running):
            async with asyncio.timeout(60):
                await held.wait()
            await compares(job, 1)
            if verb == "cancel":
                await manager.cancel(job.id)
            else:
                await manager.pause(job.id)
            await compares(job, 0)
            assert not running.done()
            if verb == "pause":
                paused = False
                async with asyncio.timeout(60):
                    while not paused:
                        await asyncio.sleep(0.1)
                        paused = (await manager.get_job(job.id)).paused
            await holder.execute("ROLLBACK")
            if verb == "pause":
                await manager.resume(job.id)
                await ended(running)
                return
            async with asyncio.timeout(60):
                assert (await running).status is Status.CANCELLED
    assert yard.weight(key) == 0
    assert yard.engine.shard_for(key).id == "s1"
