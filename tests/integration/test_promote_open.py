"""A promotion that cannot be brought to its end now stays open, says so, and never leaves two primaries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from psycopg import sql

from shardlib.catalog import open_catalog
from shardlib.errors import InvalidTopology, ShardUnavailable
from shardlib.fence.gate import open_gate
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.promote import Promotion, Stage
from shardlib_ops.manager.promote.record import PromotionStore
from tests.support.eventually import eventually
from tests.support.promote_runner import die_at

pytestmark = pytest.mark.timeout(240)

SHARD = "shard-01"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=1, replicas=1) as made:
        yield made


@pytest.fixture
async def manager(cluster: LocalCluster) -> AsyncIterator[Manager]:
    async with Manager(cluster.url) as made:
        yield made


async def resumed(manager: Manager, cluster: LocalCluster) -> Promotion:
    """Resume as soon as the lease of the dead manager has ended."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await manager.resume_promotion(SHARD, rejoin=cluster.rejoin)
            except InvalidTopology as error:
                if "another manager is at work" not in str(error):
                    raise


def gates(server: LocalServer) -> set[int]:
    with server.connect() as conn:
        rows = conn.execute(
            "SELECT substring(relname FROM 6)::int FROM pg_class"
            " WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^gate_[0-9]+$'"
        ).fetchall()
    return {number for (number,) in rows}


async def test_a_replica_that_may_be_promoted_yet_keeps_the_old_primary_closed(
    manager: Manager, cluster: LocalCluster
) -> None:
    old, new = cluster.primary(SHARD), cluster.replicas(SHARD)[0]
    await asyncio.to_thread(die_at, cluster.url, SHARD, "promoting")
    with new.connect() as there:
        there.execute("SELECT pg_wal_replay_pause()")
        try:
            with pytest.raises(ShardUnavailable, match=r"may be promoted yet.*is still open.*--resume"):
                await resumed(manager, cluster)
            assert gates(old) == set()
            record = await manager.get_promotion(SHARD)
            assert record is not None
            assert record.stage is Stage.PROMOTING
        finally:
            there.execute("SELECT pg_wal_replay_resume()")
    assert (await resumed(manager, cluster)).stage is Stage.UNDONE
    topology = await manager.topology()
    assert gates(old) == set(topology.gates_of("s1"))
    assert [replica.port for replica in topology.shard(SHARD).replicas] == [str(new.port)]


async def test_a_replica_that_was_given_up_stays_so_when_it_is_back(manager: Manager, cluster: LocalCluster) -> None:
    old, new = cluster.primary(SHARD), cluster.replicas(SHARD)[0]
    await asyncio.to_thread(die_at, cluster.url, SHARD, "promoting")
    new.stop()
    try:
        record = await resumed(manager, cluster)
    finally:
        new.start()
    assert (record.stage, record.given_up) == (Stage.UNDONE, True)
    shard = await manager.get_shard(SHARD)
    assert (shard.primary.port, shard.replicas) == (str(old.port), ())
    assert [replica.port for replica in (await manager.add_replica(SHARD, new.dsn)).replicas] == [str(new.port)]


async def test_no_replica_is_added_while_a_promotion_is_open(manager: Manager, cluster: LocalCluster) -> None:
    new = cluster.replicas(SHARD)[0]
    await manager.remove_replica(SHARD, new.dsn)
    catalog = open_catalog(cluster.url)
    try:
        with catalog.acquire("promote-s1", ttl_s=10, holder="another", wait_s=1) as lease:  # type: ignore[union-attr]
            with pytest.raises(InvalidTopology, match="another manager is at work on the servers of shard"):
                await manager.add_replica(SHARD, new.dsn)
            record = await manager.get_promotion(SHARD)
            assert record is not None
            PromotionStore(catalog).save(record.changed(stage=Stage.CLOSING, given_up=False), lease)
        with pytest.raises(InvalidTopology, match="a promotion of shard 'shard-01' is open"):
            await manager.add_replica(SHARD, new.dsn)
        assert (await manager.get_shard(SHARD)).replicas == ()
    finally:
        catalog.close()
    assert (await resumed(manager, cluster)).stage is Stage.UNDONE
    assert len((await manager.add_replica(SHARD, new.dsn)).replicas) == 1


@pytest.mark.parametrize("by_sql", [False, True])
async def test_an_undone_promotion_leaves_the_replica_its_synchronous_setting(
    manager: Manager, cluster: LocalCluster, by_sql: bool
) -> None:
    old, new = cluster.primary(SHARD), cluster.replicas(SHARD)[0]
    with old.connect() as here, new.connect() as there:
        here.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        here.execute("SELECT pg_reload_conf()")
        # It names the replica itself, as after a failover: this value must go while it is made the primary.
        own = there.execute("SHOW cluster_name").fetchone()
        assert own is not None
        names = f'FIRST 1 ("{own[0]}")' if own[0] else ""
        if by_sql:
            assert names
            there.execute(sql.SQL("ALTER SYSTEM SET synchronous_standby_names = {}").format(names))
            there.execute("SELECT pg_reload_conf()")
        settings = (
            "SELECT setting, sourcefile LIKE '%/postgresql.auto.conf' FROM pg_settings"
            " WHERE name = 'synchronous_standby_names'"
        )
        expected = [(names, True)] if by_sql else [("", None)]
        eventually(lambda: there.execute(settings).fetchall() == expected, within_s=40)

        async def told(step: str) -> None:
            if step == "cascaded":
                assert there.execute("SHOW synchronous_standby_names").fetchone() == ("",)
                raise InvalidTopology("not today", "tomorrow")

        try:
            with pytest.raises(InvalidTopology, match="was not promoted, and is as before: not today"):
                await manager.promote_replica(SHARD, on_step=told)
            eventually(lambda: there.execute(settings).fetchall() == expected, within_s=40)
        finally:
            for conn in (here, there):
                conn.execute("ALTER SYSTEM RESET synchronous_standby_names")
                conn.execute("SELECT pg_reload_conf()")


async def test_what_stops_a_promotion_after_the_replica_was_promoted_is_told(
    manager: Manager, cluster: LocalCluster
) -> None:
    new = cluster.replicas(SHARD)[0]
    stale = (await manager.topology()).next_gate + 1000
    with psycopg.connect(new.dsn, autocommit=True) as holder:

        async def told(step: str) -> None:
            if step == "promoted":
                await asyncio.to_thread(open_gate, holder, stale)
                holder.execute(f"BEGIN; LOCK TABLE shardlib.gate_{stale} IN ACCESS SHARE MODE")

        with pytest.raises(InvalidTopology, match=r"is still open: transactions hold a gate.*--resume"):
            await manager.promote_replica(SHARD, on_step=told)
        holder.execute("ROLLBACK")
    assert (await resumed(manager, cluster)).stage is Stage.DONE
    shard = await manager.get_shard(SHARD)
    assert (shard.primary.port, len(shard.replicas)) == (str(new.port), 1)
