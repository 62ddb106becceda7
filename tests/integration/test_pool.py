"""The pools on real servers, each body once for threads and once for asyncio."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import event, literal, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, PoolTimeout, ShardUnavailable
from shardlib.shard import ShardConnection
from tests.support.eventually import eventually
from tests.support.pools import Client

FACADES = ["sync", "asyncio"]


Make = Callable[..., Client]


@pytest.fixture(params=FACADES)
def make(request: pytest.FixtureRequest, database: str) -> Iterator[Make]:
    clients: list[Client] = []

    def made(endpoints: dict[str, str] | None = None, **options: Any) -> Client:
        client = Client(request.param, endpoints or {"s1": database, "s2": database}, **options)
        clients.append(client)
        return client

    yield made
    for client in clients:
        client.close()
        assert client.pools.budget.open == 0, "every permit came back"


def sessions(dsn: str, name: str) -> int:
    with psycopg.connect(Dsn(dsn).conninfo(), autocommit=True) as admin:
        found = admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()",
            (name,),
        ).fetchone()
    assert found is not None
    return int(found[0])


def test_the_last_returned_connection_is_used_first(make: Make) -> None:
    client = make()

    def body() -> None:
        engine = client.pools.engine("s1")
        first, second = engine.connect(), engine.connect()
        assert isinstance(first, ShardConnection)
        pids = [c.execute(text("SELECT pg_backend_pid()")).scalar_one() for c in (first, second)]
        assert client.figures() == (0, 2, 0)
        first.close()
        second.close()
        assert client.pid() == pids[1]
        assert client.figures() == (2, 0, 0)
        assert client.connected == ["s1", "s1"]

    client.run(body)


def test_pools_are_opened_when_used(make: Make) -> None:
    client = make()

    def body() -> None:
        assert client.pools.engine("s1") is client.pools.engine("s1")
        client.pools.engine("s2")
        assert [s.size for s in client.pools.stats()] == [0, 0]
        client.side_by_side([partial(client.pid, shard_id) for shard_id in ("s1", "s2")])
        assert [s.idle for s in client.pools.stats()] == [1, 1]
        client.side_by_side([partial(client.pid, shard_id) for shard_id in ("s1", "s2")])
        assert sorted(client.connected) == ["s1", "s2"], "what is idle is used again"

    client.run(body)


def test_one_statement_is_compiled_once_for_all_shards(make: Make) -> None:
    client = make()

    def body() -> None:
        for shard_id in ("s1", "s2"):
            with client.pools.engine(shard_id).connect() as conn:
                assert conn.execute(select(literal(7, literal_execute=False))).scalar_one() == 7
        assert client.pools.engine("s1").dialect is client.pools.engine("s2").dialect is client.pools.dialect
        cache = client.pools.engine("s1")._compiled_cache
        assert cache is not None
        assert cache is client.pools.engine("s2")._compiled_cache
        assert len(cache) == 1

    client.run(body)


def test_options_of_an_engine_keep_its_shard(make: Make) -> None:
    client = make()

    def body() -> None:
        engine: Any = client.pools.engine("s1").execution_options(isolation_level="SERIALIZABLE")
        assert (engine.shard_id, engine.role) == ("s1", "primary")
        with engine.connect() as conn:
            assert isinstance(conn, ShardConnection)
            assert conn.execute(text("SHOW transaction_isolation")).scalar_one() == "serializable"
        with client.pools.engine("s1").connect() as conn:
            assert conn.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"

    client.run(body)


def test_the_session_carries_the_options(make: Make, database: str) -> None:
    own = f"{database}?application_name=mine&options=-c%20work_mem%3D5MB"
    client = make({"s1": database, "s2": own}, idle_in_transaction_timeout_s=1.5, application_name="pools")

    def setting(shard_id: str, name: str) -> Any:
        with client.pools.engine(shard_id).connect() as conn:
            return conn.execute(text(f"SHOW {name}")).scalar_one()

    def body() -> None:
        assert setting("s1", "idle_in_transaction_session_timeout") == "1500ms"
        assert setting("s1", "application_name") == "pools"
        assert setting("s2", "application_name") == "mine"
        assert (setting("s2", "work_mem"), setting("s2", "idle_in_transaction_session_timeout")) == (
            "5MB",
            "1500ms",
        )

    client.run(body)


def test_pgbouncer_gets_no_startup_options_and_no_prepared_statements(make: Make) -> None:
    client = make(pgbouncer=True)

    def body() -> None:
        with client.pools.engine("s1").connect() as conn:
            assert conn.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one() == "0"
            driver: Any = conn.connection.driver_connection
            assert driver.prepare_threshold is None

    client.run(body)


def test_pool_events_of_sqlalchemy_reach_their_listeners(make: Make) -> None:
    client, seen = make(), []

    def body() -> None:
        engine = client.pools.engine("s1")
        for name in ("connect", "checkout", "checkin", "reset", "close"):
            event.listen(engine, name, lambda *args, name=name: seen.append(name))
        client.pid()
        client.pid()
        engine.dispose()
        client.pid()

    client.run(body)
    once = ["checkout", "reset", "checkin"]
    assert seen == ["connect", *once, *once, "close", "connect", *once] + ["close"] * client.is_async


def test_a_transaction_left_open_is_rolled_back(make: Make) -> None:
    client = make(pool_size=1, max_overflow=0)

    def body() -> None:
        conn = client.pools.engine("s1").connect()
        conn.execute(text("CREATE TABLE left_open (id int)"))
        raw = client.pools.engine("s2").raw_connection()
        raw.cursor().execute("SELECT 1")
        conn.close()
        raw.close()
        with client.pools.engine("s1").connect() as again:
            assert again.execute(text("SELECT to_regclass('left_open')")).scalar_one() is None

    client.run(body)


def test_a_connection_that_comes_back_dirty_is_not_kept(make: Make) -> None:
    client = make()

    def body() -> None:
        engine = client.pools.engine("s1")
        engine.pool._reset_on_return = cast("Any", None)
        raw = engine.raw_connection()
        raw.cursor().execute("SELECT 1")
        raw.close()
        assert client.figures() == (0, 0, 0)

    client.run(body)


def test_many_users_share_few_connections(make: Make) -> None:
    client = make(pool_size=2, max_overflow=1, max_connections=4)
    most = [0]

    def use(shard_id: str) -> None:
        for _ in range(8):
            with client.pools.engine(shard_id).connect() as conn:
                conn.execute(text("SELECT pg_sleep(0.001)"))
                most[0] = max(most[0], client.pools.budget.open)

    def body() -> None:
        client.side_by_side([partial(use, f"s{i % 2 + 1}") for i in range(24)])
        assert most[0] == 4
        assert client.figures("s1")[1:] == client.figures("s2")[1:] == (0, 0)

    client.run(body)


def test_waiting_has_a_limit_that_names_the_figures(make: Make) -> None:
    client = make(pool_size=1, max_overflow=0, pool_timeout_s=0.1)

    def body() -> None:
        with client.pools.engine("s1").connect():
            with pytest.raises(PoolTimeout, match=r"'shard-s1'.* 0\.1 s \(1 in use, 0 idle, 0 opening of 1; 1 of 100"):
                client.pools.engine("s1").connect()
            assert client.figures() == (0, 1, 0)
            client.pid("s2")
        client.pid()

    client.run(body)


def test_a_full_budget_makes_room_by_closing_what_lies_idle_elsewhere(make: Make) -> None:
    client = make(max_connections=1, pool_timeout_s=5)

    def body() -> None:
        for _ in range(3):
            client.pid("s1")
            client.pid("s2")
        assert client.connected == ["s1", "s2"] * 3
        with client.pools.engine("s1").connect() as conn:
            waiting: list[int] = []

            def other() -> None:
                waiting.append(client.pid("s2"))

            def release() -> None:
                until_waiting(client, "s2")
                conn.close()

            client.waits.run_all([other, release])
            assert len(waiting) == 1

    client.run(body)


def until_waiting(client: Client, shard_id: str) -> None:
    client.eventually(lambda: client.figures(shard_id)[2], 20, "somebody waits")


def test_idle_connections_are_closed_in_time(make: Make, database: str) -> None:
    client = make(idle_s=0.2, application_name="idle-test")

    def body() -> None:
        client.pid("s1")
        client.pid("s2")
        assert sessions(database, "idle-test") == 2
        client.eventually(lambda: not client.pools.budget.open, 20, "the reaper closes them")
        eventually(lambda: sessions(database, "idle-test") == 0, 5)
        client.pid()

    client.run(body)


def test_a_connection_lives_for_a_limited_time(make: Make) -> None:
    client = make(max_lifetime_s=1.0)

    def body() -> None:
        first = client.pid()
        assert client.pid() == first
        with client.pools.engine("s1").connect():
            client.waits.sleep(1.05)  # longer than it lives
        assert client.figures() == (0, 0, 0), "closed when it came back"
        second = client.pid()
        assert second != first

    client.run(body)


def test_asking_a_server_before_use(make: Make) -> None:
    client = make(pre_ping_idle_s=0)

    def body() -> None:
        first = client.pid()
        client.waits.sleep(0.02)
        assert client.pid() == first

    client.run(body)


def test_a_session_ended_by_the_server_is_replaced_unseen(make: Make, database: str) -> None:
    client = make()

    def body() -> None:
        first = client.pid()
        with psycopg.connect(Dsn(database).conninfo(), autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(%s)", (first,))
            gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
            eventually(lambda: admin.execute(gone, (first,)).fetchone() == (True,), 5)
        assert client.pid() != first

    client.run(body)


def test_a_server_that_says_something_harmless_is_not_taken_for_dead(make: Make) -> None:
    client = make()

    def body() -> None:
        first = client.pid()
        with client.pools.engine("s1").connect() as conn:
            conn.execute(text("LISTEN here"))
            conn.commit()
        with client.pools.engine("s2").connect() as conn:
            conn.execute(text("NOTIFY here"))
            conn.commit()
        client.waits.sleep(0.05)
        assert client.pid() == first

    client.run(body)


def test_the_password_is_read_anew_for_each_connection(
    make: Make, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = Dsn(database)
    monkeypatch.setenv("POOL_PASSWORD", "wr0ng-pass")
    client = make({"s1": f"postgresql://{dsn.user}:env:POOL_PASSWORD@{dsn.host}:{dsn.port}/{dsn.dbname}"})

    def body() -> None:
        for _ in range(5):  # more than the breaker would take of failures
            with pytest.raises(ShardUnavailable, match="password authentication failed") as caught:
                client.pid()
        message = str(caught.value)
        assert dsn.user in message
        assert dsn.host in message
        assert "wr0ng-pass" not in message + repr(caught.value)
        assert caught.value.final
        assert message.count("password authentication failed") == 1, message
        assert caught.value.__cause__ is None
        monkeypatch.setenv("POOL_PASSWORD", str(conninfo_to_dict(database)["password"]))
        client.pid()
        monkeypatch.delenv("POOL_PASSWORD")
        client.pools.dispose()
        with pytest.raises(InvalidArgument, match="POOL_PASSWORD"):
            client.pid()
        assert client.figures() == (0, 0, 0)

    client.run(body)


def test_what_on_connect_raises_reaches_the_caller(make: Make, database: str) -> None:
    client = make(application_name="refused-test")

    def body() -> None:
        client.refuse = InvalidTopology("this is the database of another shard", "correct the DSN")
        for _ in range(5):
            with pytest.raises(InvalidTopology, match="of another shard"):
                client.pid()
        assert client.figures() == (0, 0, 0)
        eventually(lambda: sessions(database, "refused-test") == 0, 5)
        client.refuse = None
        client.pid()

    client.run(body)


def test_a_shard_that_is_gone_is_let_go(make: Make, database: str) -> None:
    client = make(application_name="drop-test")

    def body() -> None:
        engine = client.pools.engine("s1")
        used = engine.connect()
        client.pid()
        assert client.figures() == (1, 1, 0)
        client.pools.drop("s1")
        eventually(lambda: sessions(database, "drop-test") == 1, 5)
        used.execute(text("SELECT 1"))
        used.close()
        eventually(lambda: sessions(database, "drop-test") == 0, 5)
        assert client.pools.budget.open == 0
        assert client.pools.engine("s1") is not engine
        del client.endpoints["s1"]
        client.pools.drop("s1")
        with pytest.raises(InvalidTopology):
            client.pools.engine("s1")

    client.run(body)


def test_a_moved_endpoint_is_followed(make: Make, database: str, second_database: str) -> None:
    client = make()

    def where() -> Any:
        with client.pools.engine("s1").connect() as conn:
            return conn.execute(text("SELECT current_database()")).scalar_one()

    def body() -> None:
        assert where() == Dsn(database).dbname
        client.pools.follow()
        assert client.figures() == (1, 0, 0)
        client.endpoints["s1"] = second_database
        client.pools.follow()
        assert client.figures() == (0, 0, 0)
        assert where() == Dsn(second_database).dbname
        assert client.pools.endpoints() == {"s1": Dsn(second_database)}
        client.pools.follow()
        assert client.figures() == (1, 0, 0)

    client.run(body)


def test_disposed_pools_can_be_used_again(make: Make) -> None:
    client = make(idle_s=0.2)

    def body() -> None:
        client.pid()
        client.pools.dispose()
        assert client.figures() == (0, 0, 0)
        client.pid()
        client.eventually(lambda: not client.pools.budget.open, 20, "the reaper runs again")

    client.run(body)


def test_nothing_keeps_forgotten_pools(database: str) -> None:
    client = Client("sync", {"s1": database})
    client.pid()
    reference = weakref.ref(client.pools)
    client.pools.engine("s1").dispose()
    client.close()
    del client
    eventually(lambda: (gc.collect(), reference() is None)[1], 5)


def forget(connections: list[Any]) -> None:
    connections.clear()
    gc.collect()


def test_a_connection_that_was_forgotten_comes_back(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    client = make(pool_size=1, max_overflow=0, pool_timeout_s=1)

    def body() -> None:
        forgotten = [client.pools.engine("s1").connect()]
        forgotten[0].execute(text("SELECT 1"))
        if client.is_async:
            with pytest.warns(Warning, match="garbage collector"):
                forget(forgotten)
        else:
            forget(forgotten)
        client.pid()

    with caplog.at_level(logging.CRITICAL, "sqlalchemy.pool"):
        client.run(body)


# ------------------------------------------------------------------------------------------------ asyncio only


@pytest.fixture
def aclient(database: str) -> Iterator[Client]:
    client = Client("asyncio", {"s1": database}, pool_size=3, max_overflow=0, application_name="aio-test")
    yield client
    client.close()


def test_connections_end_with_their_event_loop(aclient: Client, database: str) -> None:
    aclient.run(partial(aclient.pid, "s1"))
    assert aclient.pools.budget.open == 0
    eventually(lambda: sessions(database, "aio-test") == 0, 5)
    aclient.run(aclient.pid)


def test_loops_share_the_limit_but_no_connection(aclient: Client) -> None:
    errors: list[BaseException] = []

    def body() -> None:
        mine = set()
        for _ in range(20):
            raw = aclient.pools.engine("s1").raw_connection()
            mine.add(id(raw.driver_connection))
            entry: Any = raw._connection_record
            assert entry.owner is asyncio.get_running_loop()
            raw.cursor().execute("SELECT 1")
            raw.close()

    def loop() -> None:
        try:
            asyncio.run(greenlet_spawn(body))
        except BaseException as error:  # noqa: BLE001 - shown by the test's thread
            errors.append(error)

    threads = [threading.Thread(target=loop) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert aclient.pools.budget.open == 0


async def test_an_async_engine_works_over_it(aclient: Client) -> None:
    engine = AsyncEngine(aclient.pools.engine("s1"))
    async with engine.begin() as conn:
        assert (await conn.execute(select(literal(1)))).scalar_one() == 1
    await engine.dispose()


async def test_a_storm_of_cancellations_loses_no_permit(aclient: Client, rng: Any) -> None:
    """Cancelled while connecting, waiting, running a statement, or giving back."""
    engine = AsyncEngine(aclient.pools.engine("s1"))
    outcomes = {"done": 0, "cancelled": 0}

    async def use() -> None:
        try:
            async with engine.connect() as conn:
                await conn.execute(text("SELECT pg_sleep(0.002)"))
            outcomes["done"] += 1
        except asyncio.CancelledError:
            outcomes["cancelled"] += 1
            raise

    tasks = [asyncio.create_task(use()) for _ in range(300)]
    while any(not task.done() for task in tasks):
        for task in rng.sample(tasks, 12):
            task.cancel()
        await asyncio.sleep(rng.choice((0, 0.001, 0.004)))
    await asyncio.gather(*tasks, return_exceptions=True)
    assert outcomes["cancelled"] > 50
    stats = aclient.pools.stats()[0]
    assert (stats.in_use, stats.connecting, stats.waiting) == (0, 0, 0)
    assert stats.size == stats.idle == aclient.pools.budget.open <= 3
    three = [await engine.connect() for _ in range(3)]
    for conn in three:
        assert (await conn.execute(select(literal(1)))).scalar_one() == 1
        await conn.close()
