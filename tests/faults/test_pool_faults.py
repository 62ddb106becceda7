"""The pools while servers are killed, restarted and frozen, and processes fork."""

from __future__ import annotations

import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from shardlib.dsn import Dsn
from shardlib.errors import PoolTimeout, ShardUnavailable
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from tests.support.eventually import eventually
from tests.support.pools import Client

pytestmark = pytest.mark.fault

Make = Callable[..., Client]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2, bootstrap=False) as servers:
        yield servers


@pytest.fixture
def servers(cluster: LocalCluster) -> Iterator[tuple[LocalServer, LocalServer]]:
    """Two servers that run again after the test, whatever was done to them."""
    first, second = cluster.servers
    yield first, second
    for server in (first, second):
        server.resume()
        server.start()


@pytest.fixture(params=["sync", "asyncio"])
def make(request: pytest.FixtureRequest, servers: tuple[LocalServer, LocalServer]) -> Iterator[Make]:
    clients: list[Client] = []
    endpoints = {"s1": servers[0].dsn, "s2": servers[1].dsn}

    def made(**options: Any) -> Client:
        client = Client(request.param, endpoints, **options)
        clients.append(client)
        return client

    yield made
    for client in clients:
        client.close()
        assert client.pools.budget.open == 0, "every permit came back"


def test_a_restart_under_idle_connections_is_not_noticed(make: Make, servers: tuple[LocalServer, LocalServer]) -> None:
    client = make()

    def hold(count: int) -> None:
        held = [client.pools.engine("s1").connect() for _ in range(count)]
        for conn in held:
            conn.execute(text("SELECT 1"))
            conn.close()

    def body() -> None:
        hold(5)
        assert client.figures() == (5, 0, 0)
        servers[0].kill()
        servers[0].start()
        hold(5)
        assert client.figures() == (5, 0, 0)
        assert len(client.connected) == 10

    client.run(body)


def test_the_breaker_opens_and_closes(make: Make, servers: tuple[LocalServer, LocalServer]) -> None:
    client = make(breaker_failures=3, breaker_wait_s_first=6.0, breaker_wait_s_max=6.0)

    def state() -> str:
        return client.pools.stats()[0].breaker

    def body() -> None:
        client.pid("s1")
        servers[0].kill()
        for _ in range(3):
            with pytest.raises(ShardUnavailable, match="did not answer"):
                client.pid("s1")
        assert state() == "open"
        began = time.monotonic()
        with pytest.raises(ShardUnavailable, match="3 attempts failed in a row"):
            client.pid("s1")
        assert time.monotonic() - began < 2.5, "at once: the first new attempt is three seconds away or more"
        client.pid("s2")
        servers[0].start()
        client.eventually(lambda: client.pid("s1"), 40, "the server is asked again", ignore=(ShardUnavailable,))
        assert state() == "closed"
        client.pid("s1")

    client.run(body)


def test_a_frozen_server_costs_a_bounded_time_and_nobody_else(
    make: Make, servers: tuple[LocalServer, LocalServer]
) -> None:
    client = make(connect_timeout_s=2, breaker_failures=2, connects_max=2, pool_timeout_s=20)
    errors: list[Exception] = []
    meanwhile: list[int] = []

    def of_frozen() -> None:
        try:
            client.pid("s1")
        except ShardUnavailable as error:
            errors.append(error)

    def of_other() -> None:
        while not errors:
            client.pid("s2")
            meanwhile.append(len(errors))
            client.waits.sleep(0.02)

    def body() -> None:
        client.pid("s2")
        servers[0].pause()
        began = time.monotonic()
        client.side_by_side([of_frozen] * 12 + [of_other])
        took_s = time.monotonic() - began
        servers[0].resume()
        assert len(errors) == 12
        assert took_s < 11, f"two rounds of attempts of 2 s at most, not one for each of 12 users ({took_s:.1f} s)"
        assert meanwhile.count(0) >= 5, "another shard answers while every attempt at the frozen one still waits"

    client.run(body)


def test_a_server_that_freezes_after_the_login_is_cut(
    make: Make, servers: tuple[LocalServer, LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The login succeeds; then a question on the new connection is never answered."""
    client = make(connect_timeout_s=2)

    def frozen_question(driver: Any, shard_id: str) -> None:
        servers[0].pause()
        if client.is_async:
            client.waits.await_(driver.execute("SELECT 1"))
        else:
            driver.execute("SELECT 1")

    monkeypatch.setattr(client, "hook", frozen_question)

    def body() -> None:
        began = time.monotonic()
        with pytest.raises(ShardUnavailable):
            client.pid("s1")
        assert time.monotonic() - began < 15
        monkeypatch.setattr(client, "hook", None)
        servers[0].resume()
        client.pid("s1")

    client.run(body)


def test_a_ping_of_a_frozen_server_has_a_limit(make: Make, servers: tuple[LocalServer, LocalServer]) -> None:
    client = make(connect_timeout_s=2, pre_ping_idle_s=0)

    def body() -> None:
        client.pid("s1")
        servers[0].pause()
        client.waits.sleep(0.02)
        began = time.monotonic()
        with pytest.raises(ShardUnavailable):
            client.pid("s1")
        assert 1.9 < time.monotonic() - began < 15, "the ping, and one attempt to connect anew"

    client.run(body)


def test_kills_under_load_lose_no_permit(
    make: Make, servers: tuple[LocalServer, LocalServer], rng: random.Random
) -> None:
    client = make(
        pool_size=2, max_overflow=2, max_connections=6, pool_timeout_s=20,
        breaker_wait_s_first=0.05, breaker_wait_s_max=0.2, connect_timeout_s=2,
    )  # fmt: skip
    stop = threading.Event()
    outcomes = {"done": 0, "lost": 0, "unavailable": 0}
    most = [0]

    def use(shard_id: str) -> None:
        while not stop.is_set():
            try:
                with client.pools.engine(shard_id).connect() as conn:
                    most[0] = max(most[0], client.pools.budget.open)
                    conn.execute(text("SELECT pg_sleep(0.001)"))
                outcomes["done"] += 1
            except ShardUnavailable:
                outcomes["unavailable"] += 1
                client.waits.sleep(0.02)
            except DBAPIError:
                outcomes["lost"] += 1
            except PoolTimeout as error:
                raise AssertionError("a lost wake-up") from error

    def nemesis() -> None:
        try:
            for _ in range(4):
                time.sleep(rng.uniform(0.2, 0.4))
                victim = rng.choice(servers)
                victim.kill()
                victim.start()
            time.sleep(0.3)
        finally:
            stop.set()

    def body() -> None:
        killer = threading.Thread(target=nemesis)
        killer.start()
        client.side_by_side([partial(use, f"s{i % 2 + 1}") for i in range(50)])
        killer.join()
        stats = client.pools.stats()
        assert [(s.in_use, s.connecting, s.waiting) for s in stats] == [(0, 0, 0)] * 2
        assert client.pools.budget.open == sum(s.idle for s in stats)
        assert most[0] <= 6
        assert outcomes["done"] > 100
        assert outcomes["lost"] + outcomes["unavailable"] > 0, "the kills were felt"
        client.eventually(
            lambda: client.pid("s1") and client.pid("s2"), 20, "the breakers close again", ignore=(ShardUnavailable,)
        )

    client.run(body)


def forked(body: Callable[[], object]) -> int:
    """Run `body` in a forked child; its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads, which is the point
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fork_in_the_middle_of_everything(servers: tuple[LocalServer, LocalServer]) -> None:
    client = Client("sync", {"s1": servers[0].dsn, "s2": servers[1].dsn}, pool_size=2, max_overflow=0)
    stop = threading.Event()
    errors: list[BaseException] = []

    def use() -> None:
        try:
            while not stop.is_set():
                client.pid("s2")
        except BaseException as error:  # noqa: BLE001 - shown by the test's thread
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        held = client.pools.engine("s1").connect()
        held.execute(text("CREATE TEMP TABLE mine AS SELECT 42 AS answer"))
        parents = {client.pid("s1")}
        own = held.execute(text("SELECT pg_backend_pid()")).scalar_one()

        def child() -> None:
            assert [(s.size, s.idle, s.waiting) for s in client.pools.stats()] == [(0, 0, 0)] * 2
            assert client.pid("s1") not in {*parents, own}
            for _ in range(3):
                client.pid("s2")
            with pytest.raises(DBAPIError):
                held.execute(text("SELECT answer FROM mine"))
            client.pools.dispose()

        for _ in range(5):
            assert forked(child) == 0
        assert held.execute(text("SELECT answer FROM mine")).scalar_one() == 42, "the child sent nothing on it"
        assert client.pid("s1") in parents
        held.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        client.close()
    assert not errors
    assert client.pools.budget.open == 0


def test_a_fork_leaves_no_session_of_the_child_behind(servers: tuple[LocalServer, LocalServer]) -> None:
    client = Client("sync", {"s1": servers[0].dsn}, application_name="fork-test")
    client.pid("s1")
    assert forked(client.pid) == 0

    def left() -> bool:
        with psycopg.connect(Dsn(servers[0].dsn).conninfo(), autocommit=True) as admin:
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fork-test'"
            return admin.execute(query).fetchone() == (1,)

    eventually(left, 20, "only the parent's session is left")
    client.close()
