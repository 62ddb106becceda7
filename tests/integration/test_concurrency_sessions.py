"""Sessions and connections used in ways that go wrong: none may keep a connection, a gate, or the wrong gate."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from shardlib import AsyncShardedEngine, ShardedEngine, errors
from shardlib.catalog import open_catalog
from shardlib.fence import close_gate, holders, open_gate
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.models import Customer
from tests.support.quiet import assert_quiet


def add(session: Any, key: str, number: int, name: str = "x") -> None:
    session.add(Customer(tenant_id=key, id=number, name=name))


def count(session: Any, key: str) -> int:
    return int(session.scalar(select(func.count()).select_from(Customer).where(Customer.tenant_id == key)))


# ------------------------------------------------------------------------------------------- both facades


def test_a_shard_asked_by_a_session_that_must_roll_back_keeps_nothing(
    facade: Any, keys: list[str], shop: LocalCluster
) -> None:
    kept: list[BaseException] = []

    def body(s: Any) -> None:
        add(s, keys[0], 1)
        s.commit()
        s.expunge_all()
        add(s, keys[0], 1)
        with pytest.raises(IntegrityError):
            s.flush()
        for key in keys[1:]:
            with pytest.raises(SQLAlchemyError, match="rolled back") as caught:
                count(s, key)
            kept.append(caught.value)  # whoever logs errors keeps their frames
        s.rollback()
        assert_quiet(facade.core, shop.servers)
        assert count(s, keys[1]) == 0

    facade.session(body)
    assert_quiet(facade.core, shop.servers)


def test_a_begin_that_was_interrupted_does_not_lend_its_gate_to_the_next(facade: Any, keys: list[str]) -> None:
    """The gates of the next transaction are those that the next one needs, whatever the last one left."""

    def body(conn: Any) -> None:
        conn.execute(text("SELECT 1"))
        conn.commit()
        driver = conn.driver
        from shardlib.fence.connection import start

        place = facade.core.topology.place(facade.core.token(keys[0]))
        start(driver, (place.gate,))  # as if the answer had come, and its reader been interrupted
        with psycopg.connect(place.shard.primary.conninfo(), autocommit=True) as admin:
            open_gate(admin, 9_999)
            try:
                start(driver, (9_999,))
                pid = driver.info.backend_pid
                assert [holder.pid for holder in holders(admin, 9_999)] == [pid]
                assert pid not in [holder.pid for holder in holders(admin, place.gate)]
                conn.invalidate()
                conn.close()
            finally:
                assert close_gate(admin, 9_999, budget_s=5).closed

    facade.connect(body, keys[0])


@pytest.mark.parametrize("make", [SyncFacade, AsyncFacade], ids=["sync", "asyncio"])
def test_disposed_while_sessions_are_open(make: Any, shop: LocalCluster) -> None:
    facade = make(shop.url, application_name="disposed")

    def body(s: Any) -> None:
        add(s, "disposed", 1)
        s.flush()
        facade.core.dispose()
        assert count(s, "disposed") == 1
        s.rollback()

    facade.session(body)
    assert_quiet(facade.core, shop.servers)
    assert facade.core._core.pools.budget.open == 0, "a connection that comes back after dispose is closed"
    facade.close()


# ------------------------------------------------------------------------------------------------ threads


@pytest.fixture
def engine(shop: LocalCluster) -> Iterator[ShardedEngine]:
    with ShardedEngine(shop.url, pool_size=2, max_overflow=0, application_name="threads") as engine:
        yield engine


def test_threads_share_an_engine(engine: ShardedEngine, shop: LocalCluster) -> None:
    errors_: list[BaseException] = []

    def work(number: int) -> None:
        key = f"shared-{number}"
        try:
            for turn in range(10):
                with engine.session(key) as s:
                    add(s, key, turn)
                    s.commit()
                with engine.session() as s:
                    assert count(s, key) == turn + 1
        except BaseException as error:
            errors_.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors_ == []
    assert_quiet(engine, shop.servers)


def test_one_session_in_two_threads_is_an_error_and_does_no_damage(engine: ShardedEngine, shop: LocalCluster) -> None:
    seen: list[str] = []
    for turn in range(30):
        session = engine.session()
        barrier = threading.Barrier(4)

        def use(number: int, session: Any = session, barrier: Any = barrier, turn: int = turn) -> None:
            barrier.wait(10)
            try:
                for step in range(5):
                    session.execute(
                        insert(Customer).values(tenant_id="misused", id=turn * 100 + number * 10 + step, name="x")
                    )
                session.commit()
            except (SQLAlchemyError, errors.ShardlibError, psycopg.Error) as error:
                seen.append(type(error).__name__)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a misused session hangs"
        try:
            session.close()
        except SQLAlchemyError as error:
            seen.append(type(error).__name__)
        del session
    gc.collect()
    print(sorted(set(seen)), len(seen))
    assert_quiet(engine, shop.servers)
    with engine.session("misused") as s:
        s.execute(text("DELETE FROM customer WHERE tenant_id = 'misused'"))
        s.commit()


@pytest.mark.parametrize("where", ["statement", "gate", "pool", "commit"])
def test_ctrl_c_in_the_main_thread(engine: ShardedEngine, shop: LocalCluster, where: str) -> None:
    key = "interrupted"
    shard = engine.shard_for(key)
    place = engine.topology.place(engine.token(key))
    server = next(one for one in shop.servers if one.shard == shard.name)
    held: list[Any] = []
    with server.connect() as admin, server.connect(autocommit=False) as other:
        if where == "statement":
            waiting = "query LIKE '%pg_sleep%'"
        elif where == "gate":
            other.execute(f"LOCK TABLE shardlib.gate_{place.gate} IN ACCESS EXCLUSIVE MODE")
            waiting = "wait_event_type = 'Lock'"
        elif where == "commit":
            admin.execute("DROP TABLE IF EXISTS slow_commit")
            admin.execute("CREATE TABLE slow_commit (id int)")
            admin.execute(
                "CREATE OR REPLACE FUNCTION slow_commit() RETURNS trigger LANGUAGE plpgsql"
                " AS $$ BEGIN PERFORM pg_sleep(20); RETURN NULL; END $$"
            )
            admin.execute(
                "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow_commit DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW EXECUTE FUNCTION slow_commit()"
            )
            waiting = "wait_event = 'PgSleep'"
        else:
            held = [engine.connect(key) for _ in range(2)]

        def interrupt() -> None:
            if where == "pool":
                pools = engine._core.pools
                eventually(lambda: any(stats.waiting for stats in pools.stats()), 10)
            else:
                query = f"SELECT count(*) > 0 FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND {waiting}"
                eventually(lambda: admin.execute(query).fetchone() == (True,), 10)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        began = time.monotonic()
        thread.start()

        def work() -> None:
            with engine.session(key) as s:
                if where == "commit":
                    s.execute(text("INSERT INTO slow_commit VALUES (1)"))
                    s.commit()
                else:
                    s.execute(text("SELECT pg_sleep(20)" if where == "statement" else "SELECT 1"))

        with pytest.raises(KeyboardInterrupt):
            work()
        assert time.monotonic() - began < 12
        thread.join(10)
        other.rollback()
        for conn in held:
            conn.close()
        assert_quiet(engine, shop.servers)
        if where == "commit":
            assert admin.execute("SELECT count(*) FROM slow_commit").fetchone() == (0,)
            admin.execute("DROP TABLE slow_commit")
    with engine.session(key) as s:
        assert s.scalar(text("SELECT 1")) == 1


# --------------------------------------------------------------------------------------- forgotten sessions


def test_a_session_that_was_forgotten_gives_its_connection_back(engine: ShardedEngine, shop: LocalCluster) -> None:
    for _ in range(6):  # more than there are connections
        session = engine.session("forgotten")
        add(session, "forgotten", 1)
        session.flush()
        del session
        gc.collect()
    assert_quiet(engine, shop.servers)
    with engine.session("forgotten") as s:
        assert count(s, "forgotten") == 0


def test_an_asyncio_session_that_was_forgotten_gives_its_permit_back(
    shop: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with AsyncShardedEngine(shop.url, pool_size=2, max_overflow=0, pool_timeout_s=5) as engine:
            for _ in range(6):
                session = engine.session("forgotten")
                await session.execute(text("SELECT 1"))
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    del session
                    gc.collect()
                assert any("garbage collector" in str(one.message) for one in seen)
            await asyncio.to_thread(assert_quiet, engine.sync_engine, shop.servers)

    asyncio.run(main())


# -------------------------------------------------------------------------------------------- many at once


def test_two_hundred_sessions_over_ten_connections(shop: LocalCluster) -> None:
    with ShardedEngine(shop.url, pool_size=4, max_overflow=4, max_connections=10) as engine:
        most = [0]

        def work(number: int) -> None:
            with engine.session(f"many-{number}") as s:
                assert s.scalar(text("SELECT pg_sleep(0.01) IS NOT NULL"))
                most[0] = max(most[0], engine._core.pools.budget.open)
                s.commit()

        with ThreadPoolExecutor(200) as threads:
            list(threads.map(work, range(200), timeout=60))
        assert most[0] == 10
        assert_quiet(engine, shop.servers)


async def test_two_hundred_tasks_over_ten_connections(shop: LocalCluster) -> None:
    async with AsyncShardedEngine(shop.url, pool_size=4, max_overflow=4, max_connections=10) as engine:
        most = [0]

        async def work(number: int) -> None:
            async with engine.session(f"many-{number}") as s:
                await s.execute(text("SELECT pg_sleep(0.01)"))
                most[0] = max(most[0], engine.sync_engine._core.pools.budget.open)
                await s.commit()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(200):
                group.create_task(work(number))
        assert most[0] == 10
        await asyncio.to_thread(assert_quiet, engine.sync_engine, shop.servers)


@pytest.mark.parametrize("make", [SyncFacade, AsyncFacade], ids=["sync", "asyncio"])
def test_scans_on_fewer_connections_than_shards_do_not_hang(make: Any, shop: LocalCluster) -> None:
    """A scan of three shards under a bound of two connections cannot be: it says so, and soon."""
    facade = make(shop.url, pool_size=1, max_overflow=0, max_connections=2, pool_timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(errors.PoolTimeout, match="max_connections"):
        facade.session(lambda s: s.scalars(select(Customer)).all())
    assert time.monotonic() - began < 5
    assert_quiet(facade.core, shop.servers)
    facade.close()


def test_scans_that_wait_for_each_others_connections_end(shop: LocalCluster) -> None:
    """Each holds a connection that another one needs: run() gives back what it has and tries again."""
    with ShardedEngine(shop.url, pool_size=1, max_overflow=1, max_connections=4, pool_timeout_s=0.3) as engine:

        def scan(_: int) -> int:
            return len(engine.run(lambda s: s.scalars(select(Customer)).all()))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(scan, range(24), timeout=90))
        assert_quiet(engine, shop.servers)


# ------------------------------------------------------------------------------------------ asyncio's ways


async def test_a_timeout_ends_a_statement_and_the_engine_goes_on(shop: LocalCluster) -> None:
    async with AsyncShardedEngine(shop.url, pool_size=1, max_overflow=0) as engine:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), engine.session("timed") as s:
                    await s.execute(text("SELECT pg_sleep(20)"))
            await asyncio.to_thread(assert_quiet, engine.sync_engine, shop.servers)
        async with engine.session("timed") as s:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await s.execute(text("SELECT pg_sleep(20)"))
            with pytest.raises(SQLAlchemyError):
                await s.execute(text("SELECT 1"))
            await s.rollback()
            assert await s.scalar(text("SELECT 1")) == 1


async def test_a_task_group_stops_the_other_tasks(shop: LocalCluster) -> None:
    async with AsyncShardedEngine(shop.url, pool_size=3) as engine:

        async def slow(key: str) -> None:
            async with engine.session(key) as s:
                await s.execute(text("SELECT pg_sleep(20)"))

        async def fails() -> None:
            await asyncio.sleep(0.2)
            raise LookupError

        began = time.monotonic()

        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(6):
                    group.create_task(slow(f"group-{number}"))
                group.create_task(fails())

        with pytest.raises(ExceptionGroup) as caught:
            await together()
        assert [type(one) for one in caught.value.exceptions] == [LookupError]
        assert time.monotonic() - began < 8
        await asyncio.to_thread(assert_quiet, engine.sync_engine, shop.servers)


async def test_a_cancelled_scan_stops_on_every_shard(shop: LocalCluster) -> None:
    async with AsyncShardedEngine(shop.url) as engine:
        with ExitStack() as stack:
            admins = [stack.enter_context(server.connect()) for server in shop.servers]
            query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            for conn in admins:
                conn.execute("BEGIN; LOCK TABLE customer IN ACCESS EXCLUSIVE MODE")
            lookers = [stack.enter_context(server.connect()) for server in shop.servers]

            def waiting() -> int:
                return sum(conn.execute(query).fetchone()[0] for conn in lookers)  # type: ignore[index]

            async with engine.session() as s:
                scanning = asyncio.ensure_future(s.execute(select(Customer.id)))
                seen = 0
                while seen < len(admins) and not scanning.done():
                    seen = await asyncio.to_thread(waiting)
                assert not scanning.done(), scanning
                scanning.cancel()
                await asyncio.wait([scanning], timeout=10)
                assert scanning.cancelled()
                assert await asyncio.to_thread(waiting) == 0
            for conn in admins:
                conn.rollback()
        await asyncio.to_thread(assert_quiet, engine.sync_engine, shop.servers)


def test_event_loops_in_turn_and_side_by_side(shop: LocalCluster) -> None:
    engine = AsyncShardedEngine(shop.url, pool_size=2, max_overflow=0)

    async def main(number: int) -> None:
        async def one(turn: int) -> None:
            async with engine.session(f"loop-{number}-{turn}") as s:
                assert await s.scalar(text("SELECT 1")) == 1
                await s.commit()

        await asyncio.gather(*[one(turn) for turn in range(8)])

    for number in range(5):
        asyncio.run(main(number))
        assert engine.sync_engine._core.pools.budget.open == 0, "connections end with their loop"
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: asyncio.run(main(number)), range(12), timeout=60))
    assert_quiet(engine.sync_engine, shop.servers)
    asyncio.run(engine.dispose())


# ------------------------------------------------------------------------------------------------ processes


def _spawned(url: str, number: int) -> tuple[int, bytes]:
    """In a spawned process: its own engine, and an error that travels back."""
    with ShardedEngine(url, pool_size=1) as engine:
        with engine.session(f"spawned-{number}") as s:
            answer = s.scalar(text("SELECT 41")) + 1
        try:
            with engine.session() as s:
                s.execute(text("SELECT 1"))
        except errors.ShardKeyRequired as error:
            return answer, pickle.dumps(error)
    raise AssertionError


def _raising(url: str) -> None:
    with ShardedEngine(url) as engine, engine.session("a") as s:
        s.execute(select(Customer).where(Customer.tenant_id == "b"))


def test_spawned_processes_have_engines_of_their_own_and_their_errors_travel(shop: LocalCluster) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        for answer, pickled in processes.map(_spawned, [shop.url] * 4, range(4), timeout=60):
            assert answer == 42
            assert isinstance(pickle.loads(pickled), errors.ShardKeyRequired)
        with pytest.raises(errors.ShardKeyMismatch, match="'b'") as caught:
            processes.submit(_raising, shop.url).result(60)
        assert caught.value.pinned == "a"


def test_a_gate_renewed_while_a_session_waits_for_a_connection(shop: LocalCluster) -> None:
    """Routed before it waited: the old gate is gone when its turn comes, and nobody notices."""
    with ShardedEngine(shop.url, pool_size=1, max_overflow=0) as engine:
        key = "patient"
        shard = engine.shard_for(key)
        server = next(one for one in shop.servers if one.shard == shard.name)
        holder = engine.session(key)
        holder.execute(text("SELECT 1"))
        answers: list[Any] = []

        def waits() -> None:
            with engine.session(key) as s:
                answers.append(s.scalar(text("SELECT 7")))

        thread = threading.Thread(target=waits)
        thread.start()
        eventually(lambda: any(stats.waiting for stats in engine._core.pools.stats()), 10)
        catalog = open_catalog(shop.url)
        before = catalog.load()
        after = renew_gates(before, shard.id, nonce="patient")
        with server.connect() as admin:
            for number in after.gates_of(shard.id):
                open_gate(admin, number)
            catalog.publish(after, expected=before.version)
            holder.close()
            for number in before.gates_of(shard.id):
                assert close_gate(admin, number, budget_s=5).closed
        catalog.close()
        thread.join(20)
        assert answers == [7]
        assert_quiet(engine, shop.servers)
