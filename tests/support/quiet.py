"""What must hold once nobody works any more: no connection is out, none is dirty, no gate is held."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg

from shardlib import ShardedEngine
from shardlib.fence import holders, list_gates
from shardlib_ops.local import LocalServer
from tests.support.eventually import eventually


def out(engine: ShardedEngine) -> list[str]:
    """Connections that the accounts of the pools do not show as idle; empty when all have come back."""
    pools = engine._core.pools
    found = [
        f"{stats.shard}: {stats.in_use} in use, {stats.connecting} connecting, {stats.waiting} waiting"
        for stats in pools.stats()
        if stats.in_use or stats.connecting or stats.waiting
    ]
    if not found and pools.budget.open != sum(stats.idle for stats in pools.stats()):
        found.append(f"{pools.budget.open} permits for {[stats.idle for stats in pools.stats()]} idle connections")
    return found


def dirty(conn: psycopg.Connection[Any]) -> list[str]:
    """What transactions left on a server: sessions that are not idle, gates that are held, prepared transactions."""
    found = [
        f"pid {pid} is {state}: {query}"
        for pid, state, query in conn.execute(
            "SELECT pid, state, query FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'"
        )
    ]
    found += [f"gate {number} is held by {holder}" for number in list_gates(conn) for holder in holders(conn, number)]
    found += [f"prepared: {gid}" for (gid,) in conn.execute("SELECT gid FROM pg_prepared_xacts")]
    return found


def assert_quiet(engine: ShardedEngine, servers: Iterable[LocalServer], within_s: float = 20.0) -> None:
    """Everything that was in use has come back clean, or is gone, within the time."""
    connections = [server.connect() for server in servers]

    def left() -> list[str]:
        return out(engine) + [line for conn in connections for line in dirty(conn)]

    def none_left() -> bool:
        nonlocal last
        last = left()
        return not last

    last: list[str] = []
    try:
        eventually(none_left, within_s, "nothing is left behind")
    except AssertionError:
        raise AssertionError(f"left behind after {within_s:g} s: {last}") from None
    finally:
        for conn in connections:
            conn.close()
