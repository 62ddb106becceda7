"""Who may still read what a purge is about to delete: snapshots that are older than a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from psycopg import AsyncConnection

from shardlib_ops.reshard.world import Blocked

__all__ = ["horizon", "old_readers", "readers_gone"]

_POLL_FIRST_S: Final = 0.01
_POLL_MAX_S: Final = 0.5
_NAMED_MAX: Final = 5


async def horizon(conn: AsyncConnection[Any]) -> int:
    """A number of a transaction: every snapshot taken before now is older, also on replicas, and new ones are not.

    While a transaction that began before now goes on writing, or is prepared, snapshots taken later count as old, too.

    Args:
        conn: autocommit connection to a primary.
    """
    # A transaction that has written nothing would not be known to replicas.
    found = await conn.execute(
        "SELECT pg_current_xact_id()::text::bigint + 1 FROM pg_logical_emit_message(true, 'shardlib_horizon', '')"
    )
    row = await found.fetchone()
    assert row is not None  # noqa: S101 - one row by its form
    return int(row[0])


async def readers_gone(
    conn: AsyncConnection[Any],
    replicas: Mapping[str, AsyncConnection[Any]],
    *,
    before: int,
    timeout_s: float,
) -> None:
    """Wait until no transaction reads under a snapshot older than `before`, on the primary and on its replicas.

    Args:
        conn: to the primary; its role needs `pg_read_all_stats` to see others' snapshots.
        replicas: a connection to each replica, by a name for the message. Replicas that send their snapshots home
            (`hot_standby_feedback`) are seen at the primary, too, without a connection.
        before: see `horizon`.
        timeout_s: seconds to wait.

    Raises:
        Blocked: somebody still reads then; it is named.
    """
    pause, names = _POLL_FIRST_S, []
    try:
        async with asyncio.timeout(timeout_s):
            while names := await old_readers(conn, replicas, before=before):
                await asyncio.sleep(pause)
                pause = min(pause * 2, _POLL_MAX_S)
    except TimeoutError:
        shown = "; ".join(names[:_NAMED_MAX]) + ("; and others" if len(names) > _NAMED_MAX else "")
        raise Blocked(
            f"waited {timeout_s:g} s for transactions that began before the switch: {shown or 'no answer in time'}"
        ) from None


async def old_readers(
    conn: AsyncConnection[Any], replicas: Mapping[str, AsyncConnection[Any]], *, before: int
) -> list[str]:
    """Who has a snapshot older than `before`, in words."""
    names = await _ask(conn, _SESSIONS + _FEEDBACK, [before] * 4)
    for name, replica in replicas.items():
        names += [f"replica {name}: {what}" for what in await _ask(replica, _SESSIONS, [before])]
    return names


async def _ask(conn: AsyncConnection[Any], query: str, params: Sequence[object]) -> list[str]:
    found = await conn.execute(query.encode(), params)
    return [str(row[0]) for row in await found.fetchall()]


# Numbers of transactions wrap round at 2**32: older is what lies in the half before.
_OLDER: Final = "(({xid}::text::bigint - %s::bigint) & 4294967295) > 2147483647"

_SESSIONS: Final = f"""
    SELECT format('process %%s of %%s (%%s, %%s, for %%s s)', pid, coalesce(usename, backend_type),
                  coalesce(nullif(application_name, ''), 'no application name'), coalesce(state, 'unknown'),
                  coalesce(round(extract(epoch FROM clock_timestamp() - xact_start)), 0))
      FROM pg_stat_activity
     WHERE datname = current_database() AND backend_xmin IS NOT NULL AND pid <> pg_backend_pid()
       AND backend_type <> 'autovacuum worker' AND backend_type <> 'walsender'
       AND {_OLDER.format(xid="backend_xmin")}
"""

_FEEDBACK: Final = f"""
    UNION ALL
    SELECT format('prepared transaction %%L of %%s', gid, owner) FROM pg_prepared_xacts
     WHERE database = current_database() AND {_OLDER.format(xid="transaction")}
    UNION ALL
    SELECT format('a reader at replica %%s (%%s)', coalesce(nullif(application_name, ''), 'unnamed'), client_addr)
      FROM pg_stat_replication WHERE backend_xmin IS NOT NULL AND {_OLDER.format(xid="backend_xmin")}
    UNION ALL
    SELECT format('a reader at the replica of slot %%L', slot_name) FROM pg_replication_slots
     WHERE slot_type = 'physical' AND xmin IS NOT NULL AND {_OLDER.format(xid="xmin")}
"""
