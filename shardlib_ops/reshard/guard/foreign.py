"""Who writes to sharded tables and is not waited for by the closing of a gate: without one, or through another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection

from shardlib_ops.reshard.rows import TableShape

__all__ = ["ForeignWriter", "foreign_writers", "lasting"]


@dataclass(frozen=True, slots=True)
class ForeignWriter:
    """A transaction that may have written rows of a sharded table.

    Attributes:
        pid: its backend; None for a prepared one.
        gid: of a prepared one.
        user: whose it is.
        application: `application_name`, empty if it gave none.
        state: as in `pg_stat_activity`, or `prepared`.
        age_s: seconds since it began, or was prepared.
        table: one of the tables, `schema.name`.
        transaction: its virtual transaction, which no other of this server has. PREPARE TRANSACTION changes it.
        gated: whether it holds a gate.
        numbers: its number, which PREPARE TRANSACTION leaves as it is, and those of its savepoints; empty while it has
            none.
    """

    pid: int | None
    gid: str | None
    user: str
    application: str
    state: str
    age_s: float
    table: str
    transaction: str
    gated: bool = False
    numbers: Sequence[str] = ()

    def __str__(self) -> str:
        way = "" if self.gated else " without a gate"
        if self.gid is not None:
            return (
                f"prepared transaction {self.gid!r} of {self.user}, which writes to table {self.table!r}{way}, "
                f"prepared {self.age_s:.1f} s ago"
            )
        return (
            f"process {self.pid} of {self.user} ({self.application or 'no application name'}, {self.state}, for "
            f"{self.age_s:.1f} s), which writes to table {self.table!r}{way}"
        )


async def foreign_writers(
    conn: AsyncConnection[Any], shapes: Sequence[TableShape], *, gated: bool = False
) -> tuple[ForeignWriter, ...]:
    """The transactions that hold a writer's lock on a sharded table and no gate, oldest first, prepared ones included.

    Left out are those of resharding jobs (by name and role), vacuum, and whoever still waits for the lock: when it is
    granted, the transaction learns of an active guard.

    Args:
        conn: a connection to the shard's primary; to see others' transactions whole its role needs `pg_read_all_stats`.
        shapes: the sharded tables, as they are in this database.
        gated: also who holds a gate. Closing the moving ranges' gate has waited for those who came through it; others
            came for rows that stay, but a trigger or a cascade of theirs may have reached further, and if they had
            written the table before the guard stood, their next UPDATE or DELETE may not have met it.
    """
    found = await conn.execute(_WRITERS, {"tables": [shape.oid for shape in shapes], "gated": gated})
    return tuple(ForeignWriter(*row) for row in await found.fetchall())


def lasting(first: Sequence[ForeignWriter], now: Sequence[ForeignWriter]) -> tuple[ForeignWriter, ...]:
    """Those of `now` that may have written before the guard stood: foreign traffic that goes on is not waited for.

    Who has come since the first look has found the guard active. A prepared one is told by its number, as it may have
    been one of the first under another name. If one of those had no number yet, every prepared one may be it.

    Args:
        first: what the first look found after `activate_guard` had returned.
        now: what a later look found.
    """
    known = {writer.transaction for writer in first}
    numbers = {number for writer in first for number in writer.numbers}
    unnumbered = any(not writer.numbers for writer in first)

    def may_be_first(writer: ForeignWriter) -> bool:
        if writer.transaction in known:
            return True
        prepared = writer.gid is not None or writer.pid is None
        return prepared and (unnumbered or not numbers.isdisjoint(writer.numbers))

    return tuple(writer for writer in now if may_be_first(writer))


# A prepared transaction's locks have no pid; it is found by the lock on its own number.
_WRITERS: Final = r"""
    WITH tables AS (
        SELECT w.oid FROM unnest(%(tables)s::oid[]) w(oid)
        UNION SELECT p.relid FROM unnest(%(tables)s::oid[]) w(oid) CROSS JOIN LATERAL pg_partition_tree(w.oid) p
    ), locks AS MATERIALIZED (
        SELECT * FROM pg_locks
         WHERE granted AND (locktype = 'transactionid' OR database =
               (SELECT oid FROM pg_database WHERE datname = current_database()))
    ), writers AS (
        SELECT l.virtualtransaction, l.pid, min(l.relation) AS relation
          FROM locks l JOIN tables t ON t.oid = l.relation
         WHERE l.locktype = 'relation'
           AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
           AND l.pid IS DISTINCT FROM pg_backend_pid()
         GROUP BY 1, 2
    ), gated AS (
        SELECT DISTINCT g.virtualtransaction, g.pid
          FROM locks g JOIN pg_class h ON h.oid = g.relation
         WHERE g.locktype = 'relation' AND h.relnamespace = 'shardlib'::regnamespace AND h.relname ~ '^gate_[0-9]+$'
    )
    SELECT w.pid, p.gid, coalesce(a.usename::text, p.owner::text, ''), coalesce(a.application_name, ''),
           CASE WHEN p.gid IS NULL THEN coalesce(a.state, 'unknown') ELSE 'prepared' END,
           coalesce(extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared)), 0)::float8,
           n.nspname || '.' || c.relname, w.virtualtransaction,
           g.virtualtransaction IS NOT NULL,
           -- Not from pg_stat_activity, which is read later: the process may be at its next transaction then.
           ARRAY (SELECT o.transactionid::text FROM locks o WHERE o.locktype = 'transactionid'
                     AND o.mode = 'ExclusiveLock' AND o.virtualtransaction = w.virtualtransaction
                     AND o.pid IS NOT DISTINCT FROM w.pid)
      FROM writers w
      JOIN pg_class c ON c.oid = w.relation
      JOIN pg_namespace n ON n.oid = c.relnamespace
      LEFT JOIN pg_stat_activity a ON a.pid = w.pid
      LEFT JOIN locks x ON w.pid IS NULL AND x.pid IS NULL AND x.locktype = 'transactionid'
            AND x.virtualtransaction = w.virtualtransaction
      LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
      LEFT JOIN gated g ON g.virtualtransaction = w.virtualtransaction AND g.pid IS NOT DISTINCT FROM w.pid
     WHERE (%(gated)s OR g.virtualtransaction IS NULL)
       AND coalesce(a.backend_type, '') <> 'autovacuum worker'
       AND NOT coalesce(a.application_name ~ '^shardlib job [0-9]+ [0-9]+ ' AND a.usename = current_user, false)
     ORDER BY 6 DESC, 1
"""
