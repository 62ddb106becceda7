"""A server that is frozen while its kernel acknowledges all it is sent: what waits for an answer has a limit."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import Column, Connection, MetaData, String, Table, event, insert, select, text
from sqlalchemy.exc import OperationalError

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.engine import schema
from shardlib.errors import ShardUnavailable
from shardlib_ops import LocalCluster

pytestmark = pytest.mark.timeout(120)

LIMIT_S = 2
"""The least that `connect_timeout_s` can be."""


def tables() -> MetaData:
    metadata = MetaData()
    Table("thing", metadata, Column("tenant", String, primary_key=True, info={"shard_key": True}))
    return metadata


METADATA = tables()
THING = METADATA.tables["thing"]
OPTIONS = {"reroute_timeout_s": 1.0, "connect_timeout_s": LIMIT_S, "breaker_failures": 1, "breaker_wait_s_first": 60.0,
           "breaker_wait_s_max": 60.0}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=1) as running:
        with ShardedEngine(running.url) as engine:
            engine.create_all(METADATA)
        yield running


@pytest.fixture
def frozen(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """To be frozen by the test, and thawed after it."""
    try:
        yield cluster
    finally:
        cluster.servers[0].resume()


def state(engine: ShardedEngine) -> str:
    (stats,) = engine.pool_status()
    return str(stats.breaker)


def test_the_start_of_a_transaction(frozen: LocalCluster) -> None:
    with ShardedEngine(frozen.url, **OPTIONS) as engine:
        with engine.session("a") as session:
            session.execute(insert(THING).values(tenant="a"))
        frozen.servers[0].pause()
        began = time.monotonic()
        with engine.session("a") as session, pytest.raises(ShardUnavailable, match="began no transaction within 2 s"):
            session.execute(select(THING).where(THING.c.tenant == "a"))
        assert LIMIT_S * 0.9 < time.monotonic() - began < LIMIT_S + 15
        assert state(engine) == "open", "it counts as a failed attempt"
        began = time.monotonic()
        with engine.session("a") as session, pytest.raises(ShardUnavailable):
            session.execute(select(THING).where(THING.c.tenant == "a"))
        assert time.monotonic() - began < LIMIT_S * 0.8, "the server was asked again"


def test_the_start_of_a_pinned_transaction(frozen: LocalCluster) -> None:
    with ShardedEngine(frozen.url, **OPTIONS) as engine, engine.connect("a") as conn:
        conn.execute(text("SELECT 1"))
        conn.rollback()
        frozen.servers[0].pause()
        began = time.monotonic()
        with pytest.raises(ShardUnavailable, match="began no transaction within 2 s"):
            conn.execute(text("SELECT 1"))
        assert LIMIT_S * 0.9 < time.monotonic() - began < LIMIT_S + 15
        assert state(engine) == "open"


async def test_the_start_of_a_transaction_under_asyncio(frozen: LocalCluster) -> None:
    async with AsyncShardedEngine(frozen.url, **OPTIONS) as engine:
        async with engine.session("a") as session:
            await session.execute(insert(THING).values(tenant="a"))
        frozen.servers[0].pause()
        began = time.monotonic()
        async with engine.session("a") as session:
            with pytest.raises(ShardUnavailable, match="began no transaction within 2 s"):
                await session.execute(select(THING).where(THING.c.tenant == "a"))
        assert LIMIT_S * 0.9 < time.monotonic() - began < LIMIT_S + 15
        assert state(engine.sync_engine) == "open"


def test_a_change_of_tables(frozen: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_ASK_AFTER_S", 1.0)
    metadata = tables()

    @event.listens_for(metadata, "after_create")
    def freeze(target: MetaData, connection: Connection, **_: object) -> None:
        frozen.servers[0].pause()
        connection.execute(text("SELECT 1"))

    with ShardedEngine(frozen.url, **OPTIONS) as engine:
        began = time.monotonic()
        with pytest.raises(ShardUnavailable, match="no answer within 1 s"):
            engine.create_all(metadata)
        assert time.monotonic() - began < 1 + LIMIT_S + 15
        frozen.servers[0].resume()
        engine.create_all(METADATA)  # and the lock of the schema is free


def test_a_change_of_tables_that_takes_long(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is there all the time: it is asked, and waited for."""
    monkeypatch.setattr(schema, "_ASK_AFTER_S", 0.3)
    metadata, slept = tables(), list[bool]()

    @event.listens_for(metadata, "after_create")
    def long(target: MetaData, connection: Connection, **_: object) -> None:
        connection.execute(text("SELECT pg_sleep(1.5)"))
        slept.append(True)

    with ShardedEngine(cluster.url) as engine:
        engine.create_all(metadata)
    assert slept


def test_connections_for_tables_are_opened_as_those_of_the_pools(cluster: LocalCluster) -> None:
    found: dict[str, str] = {}
    metadata = tables()

    @event.listens_for(metadata, "after_create")
    def look(target: MetaData, connection: Connection, **_: object) -> None:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        found.update(driver.info.get_parameters())

    with ShardedEngine(cluster.url, tcp_user_timeout_ms=12_345, keepalive_idle_s=17, connect_timeout_s=3) as engine:
        engine.create_all(metadata)
    assert (found["tcp_user_timeout"], found["keepalives_idle"]) == ("12345", "17")
    assert (found["connect_timeout"], found["application_name"]) == ("3", "shardlib schema")


@pytest.mark.parametrize("pinned", [False, True], ids=["a session", "a connection"])
def test_a_start_that_the_server_refuses(cluster: LocalCluster, pinned: bool) -> None:
    """For another reason than a closed gate: the error is SQLAlchemy's, and the connection goes on."""
    with ShardedEngine(cluster.url) as engine, psycopg.connect(cluster.servers[0].dsn) as other:
        gate = engine.topology.place(engine.token("a")).gate
        with engine.connect("a") as conn:
            conn.execute(text("SET lock_timeout = '50ms'"))
            conn.commit()
            other.execute(f"LOCK TABLE shardlib.gate_{gate} IN ACCESS EXCLUSIVE MODE".encode())
            if pinned:
                with pytest.raises(OperationalError, match="lock timeout"):
                    conn.execute(text("SELECT 1"))
        if not pinned:
            with engine.session("a") as session, pytest.raises(OperationalError, match="lock timeout"):
                session.execute(select(THING).where(THING.c.tenant == "a"))
        other.rollback()
        with engine.session("a") as session:
            session.execute(select(THING).where(THING.c.tenant == "a"))
