"""A COMMIT whose answer is lost is neither called done nor failed, and never run again by itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text

from shardlib import AsyncShardedEngine, ShardedEngine, errors
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually, eventually_async
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.faults import Proxy
from tests.support.models import Base, Customer

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def proxied() -> Iterator[tuple[LocalCluster, Proxy]]:
    """One shard, which clients reach through a proxy that can lose an answer."""
    with LocalCluster(shards=1) as cluster, Proxy(cluster.servers[0].dsn) as proxy:
        catalog = open_catalog(cluster.url)
        before = catalog.load()
        shard = replace(before.shards[0], primary=Dsn(proxy.dsn))
        catalog.publish(before.evolve(shards=(shard,), nonce="through the proxy"), expected=before.version)
        catalog.close()
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(Base.metadata)
        yield cluster, proxy


@pytest.fixture(params=[SyncFacade, AsyncFacade], ids=["sync", "asyncio"])
def facade(request: pytest.FixtureRequest, proxied: tuple[LocalCluster, Proxy]) -> Iterator[Any]:
    cluster, proxy = proxied
    proxy.heal()
    with psycopg.connect(cluster.servers[0].dsn) as conn:
        conn.execute("TRUNCATE customer CASCADE")
    made = request.param(cluster.url)
    yield made
    made.close()


def names(proxied: tuple[LocalCluster, Proxy]) -> list[str]:
    with psycopg.connect(proxied[0].servers[0].dsn) as conn:
        return [name for (name,) in conn.execute("SELECT name FROM customer ORDER BY 1")]


@pytest.mark.parametrize("pinned", [True, False])
def test_the_answer_of_a_commit_is_lost(facade: Any, proxied: tuple[LocalCluster, Proxy], pinned: bool) -> None:
    attempts: list[int] = []

    def body(s: Any) -> None:
        attempts.append(1)
        s.add(Customer(tenant_id="t", id=1, name="x"))
        s.flush()
        proxied[1].cut_at("COMMIT", forwarded=True)

    with pytest.raises(errors.CommitOutcomeUnknown, match="read back"):
        facade.run(body, **({"shard_key": "t"} if pinned else {}))
    assert attempts == [1]
    assert names(proxied) == ["x"]
    # The session's connection is not used again, and work goes on.
    assert facade.session(lambda s: s.get(Customer, ("t", 1)).name) == "x"


@pytest.mark.parametrize("answer", [("PANIC", "58030"), ("FATAL", "53100")])
def test_a_commit_that_ends_the_session_is_unknown(
    facade: Any, proxied: tuple[LocalCluster, Proxy], answer: tuple[str, str]
) -> None:
    """A server that cannot flush its WAL may find the commit record there as it recovers."""
    attempts: list[int] = []

    def body(s: Any) -> None:
        attempts.append(1)
        s.add(Customer(tenant_id="t", id=len(attempts), name="x"))
        s.flush()
        proxied[1].cut_at("COMMIT", instead=answer)

    with pytest.raises(errors.CommitOutcomeUnknown):
        facade.run(body, shard_key="t")
    assert names(proxied) == ["x"]
    assert facade.session(lambda s: s.get(Customer, ("t", 1)).name) == "x"


def test_a_transaction_that_idled_too_long_is_run_again(facade: Any, proxied: tuple[LocalCluster, Proxy]) -> None:
    """The server ends it before it reads the COMMIT: nothing is kept, and that is certain."""
    attempts: list[int] = []

    def body(s: Any) -> None:
        attempts.append(1)
        s.add(Customer(tenant_id="t", id=len(attempts), name="x"))
        s.flush()
        if len(attempts) == 1:
            pid = s.scalar(text("SELECT pg_backend_pid()"))
            s.execute(text("SET LOCAL idle_in_transaction_session_timeout = 20"))
            with psycopg.connect(proxied[0].servers[0].dsn, autocommit=True) as conn:
                alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
                eventually(lambda: conn.execute(alive, (pid,)).fetchone() == (0,), 20)

    facade.run(body, shard_key="t")
    assert len(attempts) == 2
    assert names(proxied) == ["x"]


def test_a_connection_lost_before_commit_is_run_again(facade: Any, proxied: tuple[LocalCluster, Proxy]) -> None:
    attempts: list[int] = []

    def body(s: Any) -> None:
        attempts.append(1)
        s.add(Customer(tenant_id="t", id=1, name="x"))
        s.flush()
        if len(attempts) == 1:
            proxied[1].cut()
            s.execute(select(Customer).where(Customer.tenant_id == "t"))

    facade.run(body)
    assert len(attempts) == 2
    assert names(proxied) == ["x"]


def test_a_core_commit_without_an_answer(facade: Any, proxied: tuple[LocalCluster, Proxy]) -> None:
    def body(conn: Any) -> None:
        conn.execute(text("INSERT INTO customer (tenant_id, id, name) VALUES ('t', 1, 'core')"))
        proxied[1].cut_at("COMMIT", forwarded=True)
        with pytest.raises(errors.CommitOutcomeUnknown):
            conn.commit()

    facade.connect(body, "t")
    assert names(proxied) == ["core"]


def test_an_idle_connection_that_died_is_replaced_unseen(facade: Any, proxied: tuple[LocalCluster, Proxy]) -> None:
    for number in range(5):
        facade.session(lambda s, n=number: (s.add(Customer(tenant_id="t", id=n, name=f"{n}")), s.commit()))
        proxied[1].cut()
    assert names(proxied) == ["0", "1", "2", "3", "4"]


def test_commit_after_a_failed_statement_is_no_silent_rollback(facade: Any) -> None:
    """PostgreSQL answers such a COMMIT with ROLLBACK and no error."""

    def body(conn: Any) -> None:
        conn.execute(text("INSERT INTO customer (tenant_id, id, name) VALUES ('t', 1, 'x')"))
        with pytest.raises(Exception, match="nonsense"):
            conn.execute(text("SELECT nonsense"))
        with pytest.raises(Exception, match="roll it back"):
            conn.commit()
        conn.rollback()

    facade.connect(body, "t")


async def test_a_cancelled_commit_is_waited_for() -> None:
    """With a synchronous replica that is stopped: cancelling would make the row visible and acknowledge nothing."""
    with LocalCluster(shards=1, replicas=1, synchronous=True) as cluster:
        async with AsyncShardedEngine(cluster.url) as engine:
            await engine.create_all(Base.metadata)
            replica = next(server for server in cluster.servers if server.role == "replica")
            session = engine.session("t")
            session.add(Customer(tenant_id="t", id=1, name="x"))
            await session.flush()
            replica.pause()
            committing = asyncio.ensure_future(session.commit())
            with psycopg.connect(cluster.servers[0].dsn, autocommit=True) as conn:

                async def waits_for_the_replica() -> bool:
                    waiting = conn.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
                    return waiting.fetchone() == (1,)

                await eventually_async(waits_for_the_replica, 20)
                committing.cancel()
                done, _ = await asyncio.wait([committing], timeout=0.3)
                assert not done, "the cancellation was passed on to the COMMIT"
                seen = conn.execute("SELECT count(*) FROM customer").fetchone()
                assert seen == (0,)
                replica.resume()
                with pytest.raises(asyncio.CancelledError):
                    await committing
                assert conn.execute("SELECT count(*) FROM customer").fetchone() == (1,)
            await session.close()


def test_a_commit_that_lost_its_synchronous_replica_is_unknown() -> None:
    """An operator cancels the wait: PostgreSQL says COMMIT, with a notice. That is no success."""
    with LocalCluster(shards=1, replicas=1, synchronous=True) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(Base.metadata)
        replica = next(server for server in cluster.servers if server.role == "replica")
        with psycopg.connect(cluster.servers[0].dsn, autocommit=True) as conn, engine.session("t") as session:
            session.add(Customer(tenant_id="t", id=1, name="x"))
            session.flush()
            replica.pause()
            cancel = (
                "SELECT set_config('statement_timeout', '20s', false)",
                (
                    "DO $$ BEGIN LOOP"
                    " IF (SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep') > 0"
                    " THEN RETURN; END IF; PERFORM pg_sleep(0.02); PERFORM pg_stat_clear_snapshot(); END LOOP; END $$"
                ),
            )
            canceller = threading.Thread(target=lambda: [conn.execute(part) for part in cancel])
            canceller.start()
            with pytest.raises(errors.CommitOutcomeUnknown, match="synchronous replica"):
                session.commit()
            canceller.join()
            replica.resume()
