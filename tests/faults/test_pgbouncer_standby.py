"""Behind PgBouncer the old primary comes back as a replica: whoever has not heard of it gets no old rows there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import select, text

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import CatalogUnavailable, StaleTopology
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.models import Base, Order
from tests.support.pgbouncer import MISSING, PgBouncer, find_pgbouncer

pytestmark = [pytest.mark.fault, pytest.mark.skipif(find_pgbouncer() is None, reason=MISSING)]


def test_an_old_primary_behind_pgbouncer_answers_no_strong_read(tmp_path: Path, monkeypatch: Any) -> None:
    with LocalCluster(shards=1, replicas=1) as cluster:
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(Base.metadata)
            with engine.session("k") as session:
                session.add(Order(tenant_id="k", id=1, total=1))
                session.commit()
        old, (new,) = cluster.primary("shard-01"), cluster.replicas("shard-01")
        with PgBouncer(tmp_path, [old]) as pooler:
            catalog = open_catalog(cluster.url)
            now = catalog.load()
            shards = tuple(replace(shard, primary=Dsn(pooler.dsns[old.name])) for shard in now.shards)
            catalog.publish(now.evolve(shards=shards, nonce=uuid4().hex), expected=now.version)
            catalog.close()
            with ShardedEngine(cluster.url, pgbouncer=True, reroute_timeout_s=0.5) as engine:
                with engine.session("k") as session:
                    session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))  # no query came before it
                    assert session.scalar(select(Order.total).where(Order.tenant_id == "k")) == 1

                def cut_off(known: object = None) -> None:
                    raise CatalogUnavailable("etcd://nowhere", "cut off")

                engine._cache._watch.close()  # type: ignore[union-attr]
                monkeypatch.setattr(engine._catalog, "load", cut_off)
                old.stop()
                with new.connect() as conn:
                    assert conn.execute("SELECT pg_promote()").fetchone() == (True,)
                cluster._follow(old, new)

                def answers() -> bool:
                    with psycopg.connect(pooler.dsns[old.name]) as conn:
                        return conn.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)

                eventually(answers, 30, "the pooler reaches the replica", ignore=psycopg.OperationalError)
                with pytest.raises(StaleTopology), engine.session("k") as session:
                    session.scalar(select(Order.total).where(Order.tenant_id == "k"))
