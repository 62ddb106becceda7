"""A primary is another one, and the old one still serves, behind the same gates: who knows better stays away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import insert, select, text

from shardlib import ShardedEngine
from shardlib.dsn import Dsn
from shardlib.errors import CatalogUnavailable
from shardlib.session import twophase
from shardlib_ops import LocalCluster
from tests.support.endpoints import copy_primary, publish_primary
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.models import Base, Order
from tests.support.shop import one_key_a_shard

DATABASE = text("SELECT current_database()")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(Base.metadata)
        yield made


def moved(engine: ShardedEngine, shard_id: str) -> Dsn:
    return copy_primary(engine.topology.shard_by_id(shard_id).primary)


@pytest.mark.parametrize("kind", [SyncFacade, AsyncFacade])
def test_a_pinned_connection_begins_where_the_primary_is_now(cluster: LocalCluster, kind: Any) -> None:
    with closing(kind(cluster.url, pool_size=2)) as facade:
        shard_id, key = next(iter(one_key_a_shard(facade.core).items()))
        new = moved(facade.core, shard_id)

        def body(conn: Any) -> str:
            with conn.begin():
                assert conn.scalar(DATABASE) != new.dbname
            publish_primary(cluster.url, shard_id, new)
            facade.core.refresh()
            with conn.begin():
                return str(conn.scalar(DATABASE))

        assert facade.connect(body, key) == new.dbname


def test_a_connection_opened_just_then_keeps_no_old_one(cluster: LocalCluster) -> None:
    """A thread opens one after the topology has changed and before the pools are told: the old ones go all the same."""
    with ShardedEngine(cluster.url, pool_size=5) as engine:
        shard_id, key = next(iter(one_key_a_shard(engine).items()))
        new, found = moved(engine, shard_id), []

        def work() -> None:
            with engine.session(key) as session:
                found.append(session.scalar(DATABASE))

        def told_first(topology: object) -> None:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(10)

        with engine.session(key) as busy:
            assert busy.scalar(DATABASE) != new.dbname
            engine._cache._listeners.insert(0, told_first)
            publish_primary(cluster.url, shard_id, new)
            engine.refresh()
            engine._cache._listeners.remove(told_first)
        with engine.session(key) as first, engine.session(key) as second:
            found += [session.scalar(DATABASE) for session in (first, second)]
        assert found == [new.dbname] * 3


def test_settling_asks_the_decider_where_it_is_now(cluster: LocalCluster, monkeypatch: Any) -> None:
    """By an engine that has missed the change, of a transaction that another one has decided at the new primary."""
    with ShardedEngine(cluster.url) as stale:
        stale._cache._watch.close()  # type: ignore[union-attr]
        ids = one_key_a_shard(stale)
        publish_primary(cluster.url, max(ids), moved(stale, max(ids)))
        with ShardedEngine(cluster.url) as live:
            monkeypatch.setattr(twophase.TwoPhase, "finish", lambda self: self.__init__(self._core))
            with live.session(twophase=True) as session:
                session.execute(insert(Order), [{"tenant_id": key, "id": 1} for key in ids.values()])
                session.commit()
            assert stale.topology.version < live.topology.version

            def away(**options: Any) -> None:
                raise CatalogUnavailable("etcd://nowhere", "away")

            with monkeypatch.context() as patch:
                patch.setattr(stale._cache, "refresh", away)
                entries = stale.settle(older_than_s=0)
            assert [(entry.shard, entry.gid, entry.verdict) for entry in entries] == [
                (shard.name, "", "pending") for shard in stale.topology.shards
            ]
            assert all("the catalog does not tell" in entry.reason for entry in entries)
            assert [entry.verdict for entry in stale.settle(older_than_s=0)] == ["commit"]
            with live.session() as session:
                assert sorted(session.scalars(select(Order.tenant_id))) == sorted(ids.values())
