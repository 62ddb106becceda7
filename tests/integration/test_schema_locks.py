"""A change of tables that meets a transaction: it gives up in time and names who is in the way."""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
from sqlalchemy import Column, Connection, ForeignKey, MetaData, String, Table, event, text
from sqlalchemy.exc import OperationalError

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.engine import schema
from shardlib.errors import LockTimeout, ShardUnavailable
from shardlib_ops.manager.bootstrap import NewShard, create_cluster
from shardlib_ops.testing import cleaning

KEY = {"shard_key": True}


def parents(metadata: MetaData) -> Table:
    return Table("parent", metadata, Column("tenant", String, primary_key=True, info=KEY))


def children(metadata: MetaData) -> Table:
    return Table("child", metadata, Column("tenant", String, ForeignKey("parent.tenant"), primary_key=True, info=KEY))


@pytest.fixture
def url(database: str) -> Iterator[str]:
    url = f"memory://locks-{uuid.uuid4().hex}"
    with closing(open_catalog(url)) as catalog:
        create_cluster(catalog, [NewShard("only", Dsn(database))])
        yield url


@pytest.fixture
def engine(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardedEngine]:
    monkeypatch.setattr(schema, "_LOCK_TIMEOUT_S", 1)
    with ShardedEngine(url) as engine:
        yield engine


def test_create_all_names_who_writes_to_a_table_it_refers_to(engine: ShardedEngine, database: str) -> None:
    metadata = MetaData()
    parents(metadata)
    engine.create_all(metadata)
    children(metadata)
    with psycopg.connect(database, application_name="long report") as writer:
        writer.execute("INSERT INTO parent VALUES ('a')")
        began = time.monotonic()
        with pytest.raises(LockTimeout) as caught:
            engine.create_all(metadata)
        assert time.monotonic() - began < 8
        told = str(caught.value)
        assert f"process {writer.info.backend_pid} " in told
        assert "'long report'" in told
        assert "idle in transaction" in told
        assert "'parent'" in told
        assert "shard 'only' within 1 s" in told
        assert str(Dsn(database).conninfo()) not in told
        assert str(pickle.loads(pickle.dumps(caught.value))) == told
        writer.rollback()
    engine.create_all(metadata)
    assert len(engine.topology.tables) == 2


def test_drop_all_names_readers_and_prepared_transactions(engine: ShardedEngine, database: str) -> None:
    metadata = MetaData()
    parents(metadata)
    engine.create_all(metadata)
    gid = f"forgotten-{uuid.uuid4().hex}"
    with psycopg.connect(database, autocommit=True) as admin, psycopg.connect(database) as reader:
        reader.execute("SELECT FROM parent")
        admin.execute("BEGIN; INSERT INTO parent VALUES ('a')")
        admin.execute(f"PREPARE TRANSACTION '{gid}'")
        try:
            with pytest.raises(LockTimeout) as caught:
                engine.drop_all(metadata)
            assert f"process {reader.info.backend_pid} " in caught.value.holders
            assert f"prepared transaction '{gid}'" in caught.value.holders
        finally:
            admin.execute(f"ROLLBACK PREPARED '{gid}'")
        reader.rollback()
    engine.drop_all(metadata)
    assert engine.topology.tables == ()


def test_what_the_server_refuses_is_not_a_shard_that_is_away(engine: ShardedEngine) -> None:
    metadata = MetaData()

    @event.listens_for(parents(metadata), "before_create")
    def too_slow(target: Table, connection: Connection, **_: object) -> None:
        connection.execute(text("SET LOCAL statement_timeout = '50ms'"))
        connection.execute(text("SELECT pg_sleep(10)"))

    with pytest.raises(OperationalError, match="canceling statement due to statement timeout"):
        engine.create_all(metadata)


def test_a_connection_that_is_cut_is_a_shard_that_is_away(engine: ShardedEngine) -> None:
    metadata = MetaData()

    @event.listens_for(parents(metadata), "before_create")
    def cut(target: Table, connection: Connection, **_: object) -> None:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(ShardUnavailable, match="terminating connection") as caught:
        engine.create_all(metadata)
    assert not caught.value.final


def test_the_cleaning_after_a_test_names_who_is_in_the_way(
    url: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "_LOCK_S", 1)
    metadata = MetaData()
    parents(metadata)
    with ShardedEngine(url) as engine, psycopg.connect(database, application_name="left open") as left:

        def test() -> None:
            with cleaning.cleaned(url):
                engine.create_all(metadata)
                left.execute("SELECT FROM parent")

        with pytest.raises(LockTimeout, match=r"'left open'.* holds 'parent'"):
            test()
