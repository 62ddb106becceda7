"""A shard that only decides transactions of other shards is not taken out of the cluster while they need it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from shardlib import ShardedEngine
from shardlib.errors import InvalidTopology
from shardlib.session.settling import gid_of
from shardlib_ops import LocalCluster, Manager
from shardlib_ops.manager import shards
from tests.support.models import Base

SPARE = "spare-1"


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """One shard, and a second one that owns nothing and holds the decision to commit a part of the first."""
    with LocalCluster(shards=1) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(Base.metadata)
        with made.servers[0].connect() as conn:
            conn.execute("CREATE DATABASE spare")
            dsn = make_conninfo(made.servers[0].dsn, dbname="spare")
            with Manager.sync(made.url) as manager:
                manager.create_shard(SPARE, primary_endpoint=dsn)
                first, spare = manager.list_shards()
            txid = uuid4().hex
            with psycopg.connect(dsn) as decider:
                decider.execute("INSERT INTO shardlib.decision (txid, verdict) VALUES (%s, 'commit')", (txid,))
            conn.execute("BEGIN")
            conn.execute("INSERT INTO customer (tenant_id, id, name) VALUES ('k', 1, 'x')")
            conn.execute(f"PREPARE TRANSACTION '{gid_of(txid, spare.id, first.id)}'")
        yield made


def customers(cluster: LocalCluster) -> int:
    with cluster.servers[0].connect() as conn:
        return len(conn.execute("SELECT 1 FROM customer").fetchall())


def test_it_stays_while_a_session_may_need_it(cluster: LocalCluster) -> None:
    with Manager.sync(cluster.url) as manager:
        with pytest.raises(
            InvalidTopology, match=r"decides prepared transactions of other shards: shardlib:"
        ) as refused:
            manager.delete_shard(SPARE)
        assert "engine.settle()" in str(refused.value)
        with ShardedEngine(cluster.url) as engine:
            assert [entry.verdict for entry in engine.settle(older_than_s=0)] == ["commit"]
        manager.delete_shard(SPARE)
        assert len(manager.list_shards()) == 1
    assert customers(cluster) == 1


def test_what_lost_sessions_left_is_settled_first(cluster: LocalCluster, monkeypatch: Any) -> None:
    monkeypatch.setattr(shards, "_SETTLE_AFTER_S", 0.0)
    with Manager.sync(cluster.url) as manager:
        manager.delete_shard(SPARE)
        assert len(manager.list_shards()) == 1
    assert customers(cluster) == 1
