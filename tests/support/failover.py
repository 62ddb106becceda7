"""A failover as another tool would do it: the primary is killed, a replica promoted, and then the topology told."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
from psycopg import sql

from shardlib.catalog import Catalog, open_catalog
from shardlib.catalog.publish import publish_change
from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.fence.gate import close_gate, list_gates, open_gate
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from shardlib_ops.local.postgres import LocalServer
from shardlib_ops.manager.promote.swap import reserved, swapped
from tests.support.eventually import eventually

_GUARDS = """
    SELECT DISTINCT p.proname::text FROM pg_proc p WHERE p.pronamespace = 'shardlib'::regnamespace
       AND p.proname ~ '^job_[0-9]+_guard_'
"""
_TRIES = 20
_WRITABLE = "target_session_attrs=read-write"


def cut(replica: LocalServer) -> None:
    """The replica hears nothing more of its primary: what is committed there from now on it does not have."""
    with replica.connect() as conn:
        conn.execute("ALTER SYSTEM SET primary_conninfo = ''")
        conn.execute("SELECT pg_reload_conf()")
        eventually(
            lambda: conn.execute("SELECT count(*) FROM pg_stat_wal_receiver").fetchone() == (0,),
            within_s=20,
            what="the replica still streams",
        )


def mend(replica: LocalServer) -> None:
    """It follows its primary again."""
    with replica.connect() as conn:
        conn.execute("ALTER SYSTEM RESET primary_conninfo")
        conn.execute("SELECT pg_reload_conf()")


def fail_over(cluster: LocalCluster, shard: str) -> LocalServer:
    """Kill the primary of a shard; its only replica serves behind new gates, and has no old gate and no guard."""
    catalog = open_catalog(cluster.url)
    try:
        new = promote(cluster, shard)
        with new.connect() as conn:
            for (guard,) in conn.execute(_GUARDS).fetchall():
                conn.execute(sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE").format(sql.Identifier("shardlib", guard)))
            _tell(catalog, shard, Dsn(new.dsn), conn)
    finally:
        catalog.close()
    return new


def promote(cluster: LocalCluster, shard: str) -> LocalServer:
    """Kill the primary of a shard and promote its only replica, which waits for no other. The catalog is not told."""
    (old,) = (server for server in cluster.servers if server.shard == shard and server.role == "primary")
    (new,) = cluster.replicas(shard)
    old.kill()
    with new.connect() as conn:
        assert conn.execute("SELECT pg_promote(true, 60)").fetchone() == (True,)
        _alone(conn)
    return new


def lead_to_either(cluster: LocalCluster, shard: str) -> None:
    """Let the shard's DSN in the catalog lead to whichever of its servers is the primary, without naming a replica."""
    dsn, other = urlsplit(cluster.primary(shard).dsn), cluster.replicas(shard)[0]
    both = Dsn(urlunsplit(dsn._replace(netloc=f"{dsn.netloc},{dsn.hostname}:{other.port}", query=_WRITABLE)))
    catalog = open_catalog(cluster.url)
    try:
        publish_change(catalog, partial(_led, shard=shard, dsn=both))
    finally:
        catalog.close()


def _alone(conn: psycopg.Connection[object]) -> None:
    """It has no replica of its own to wait for."""
    conn.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
    conn.execute("SELECT pg_reload_conf()")
    eventually(
        lambda: conn.execute("SELECT current_setting('synchronous_standby_names')").fetchone() == ("",),
        within_s=20,
        what="the promoted server waits for a replica",
    )


def _tell(catalog: Catalog, shard: str, new: Dsn, conn: psycopg.Connection[object]) -> None:
    """Open the gates of the next topology, close all others, and publish it; again when others were faster."""
    for _ in range(_TRIES):
        found = catalog.load()
        count = len(found.gates_of(found.shard(shard).id))
        after = publish_change(catalog, partial(_reserved, count=count))
        numbers = range(after.next_gate - count, after.next_gate)
        for number in numbers:
            open_gate(conn, number)
        for number in set(list_gates(conn)) - set(numbers):
            assert close_gate(conn, number, budget_s=10).closed
        try:
            publish_change(catalog, partial(_swapped, shard=shard, new=new, numbers=numbers))
        except InvalidTopology:
            continue  # it has another number of gates by now
        return
    raise AssertionError("the topology changes all the time")


def _reserved(now: Topology, count: int) -> Topology:
    return reserved(now, count, nonce=uuid4().hex)


def _swapped(now: Topology, shard: str, new: Dsn, numbers: range) -> Topology:
    return swapped(now, now.shard(shard).id, new, numbers, nonce=uuid4().hex)


def _led(now: Topology, shard: str, dsn: Dsn) -> Topology:
    shards = tuple(
        replace(one, primary=dsn, replicas=()) if one.id == now.shard(shard).id else one for one in now.shards
    )
    return now.evolve(shards=shards, nonce=uuid4().hex)
