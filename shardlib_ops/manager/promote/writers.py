"""Who may still write to an old primary, past its gates; and who keeps a replica from replaying."""

from __future__ import annotations

import time
from typing import Any, Final

import psycopg

from shardlib.errors import ShardlibError
from shardlib_ops.manager.promote.server import Node, until

__all__ = ["Blocked", "drain", "name_readers"]

_PATIENCE: Final = 0.3
"""The part of the budget in which a transaction that has written nothing yet may end by itself."""


class Blocked(Exception):  # noqa: N818 - an answer of the world: the promotion gives way
    """Somebody is in the way for now. The message names who."""


async def drain(old: Node, budget_s: float) -> None:
    """Wait until nobody can commit anything more on a primary whose gates are closed and whose sessions are read-only.

    What begins from here on is read-only. A transaction that began before and has written is waited for, and named
    when it does not end. One that has written nothing may still do so: after a while its session is ended, which loses
    nothing, and which the old primary's restart would do anyway.

    Raises:
        Blocked: a transaction that has written, or a prepared one, does not end; or a session cannot be ended.
    """
    began = time.monotonic()
    before = await old.value("SELECT clock_timestamp()")
    found: list[tuple[Any, ...]] = []

    async def quiet() -> bool:
        nonlocal found
        found = await old.rows(_TRANSACTIONS, before)
        if time.monotonic() - began > budget_s * _PATIENCE:
            idle = [pid for pid, *_, wrote, _ in found if pid is not None and not wrote]
            if idle:
                await old.rows("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", idle)
        return not found

    if not await until(quiet, budget_s):
        raise Blocked("transactions that take no gate have not ended: " + "; ".join(line for *_, line in found))


async def name_readers(replica: Node) -> str:
    """Sessions that keep a replica from replaying the closing of a gate, for a message; empty if there is none."""
    try:
        rows = await replica.rows(_READERS)
    except (psycopg.Error, ShardlibError):
        return ""
    return "".join(f"; process {pid} ({name or 'no application name'}) holds a gate there" for pid, name in rows)


# Vacuum writes too, and nothing that anybody would miss. A prepared transaction has no process.
_TRANSACTIONS: Final = """
SELECT pid, backend_xid IS NOT NULL AS wrote,
       format('process %%s of %%s (%%s, %%s, for %%s s)', pid, coalesce(usename, backend_type),
              coalesce(nullif(application_name, ''), 'no application name'), coalesce(state, 'at work'),
              round(extract(epoch FROM clock_timestamp() - xact_start), 1))
  FROM pg_stat_activity
 WHERE pid <> pg_backend_pid() AND backend_type NOT LIKE 'autovacuum%%'
   AND (backend_xid IS NOT NULL OR (backend_type = 'client backend' AND xact_start <= %s))
   AND NOT coalesce(application_name ~ '^shardlib job 0 ' AND usename = current_user, false)
UNION ALL
SELECT NULL, true, format('prepared transaction %%s of %%s', quote_literal(gid), owner) FROM pg_prepared_xacts
"""

_READERS: Final = """
SELECT DISTINCT l.pid, a.application_name FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
  JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.granted AND l.locktype = 'relation' AND c.relnamespace = 'shardlib'::regnamespace
   AND c.relname ~ '^gate_[0-9]+$' AND l.pid <> pg_backend_pid() AND l.mode = 'AccessShareLock'
"""
