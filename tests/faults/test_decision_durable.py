"""The decision of a two-phase commit is on disk before anybody acts on it, whatever the role's synchronous_commit."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import insert, select

from shardlib import ShardedEngine
from shardlib.session.twophase import TwoPhase
from shardlib_ops import LocalCluster
from tests.support.models import Base, Order
from tests.support.shop import one_key_a_shard

pytestmark = pytest.mark.fault


def test_a_crash_of_the_decider_takes_no_decision_back(monkeypatch: Any) -> None:
    with LocalCluster(shards=2) as cluster:
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(Base.metadata)
        for server in cluster.servers:
            with server.connect() as conn:
                conn.execute("ALTER ROLE CURRENT_USER SET synchronous_commit = off")
                conn.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")  # the longest: nothing else flushes by chance
                conn.execute("SELECT pg_reload_conf()")
        with ShardedEngine(cluster.url) as engine:
            ids = one_key_a_shard(engine)
            with engine.session() as session:
                assert session.scalars(select(Order)).all() == []  # connections are warm
            decider = cluster.servers[sorted(ids).index(max(ids))]
            end_parts = TwoPhase._end_parts

            def then_crash(self: TwoPhase, verb: Any) -> Any:
                silent = end_parts(self, verb)
                decider.kill()
                return silent

            monkeypatch.setattr(TwoPhase, "_end_parts", then_crash)
            with engine.session(twophase=True) as session:
                session.execute(insert(Order), [{"tenant_id": key, "id": 1} for key in ids.values()])
                session.commit()
            monkeypatch.undo()
            decider.start()
            assert engine.settle(older_than_s=0) == []
            with engine.session() as session:
                assert sorted(session.scalars(select(Order.tenant_id))) == sorted(ids.values())
