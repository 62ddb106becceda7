"""Who is in the way of a change of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from shardlib.fence.holding import LOCK_HOLDERS

__all__ = ["holders_of"]

_SHOWN_MAX: Final = 3
# What a CREATE INDEX or a new foreign key does not have to wait for: readers.
_READING: Final = ("AccessShareLock", "RowShareLock")
_HOLDERS: Final = f"""
    SELECT DISTINCT ON (l.pid, p.gid) l.pid, p.gid, c.relname, a.usename, a.application_name, a.state,
           extract(epoch FROM now() - coalesce(a.xact_start, p.prepared))::float8
      {LOCK_HOLDERS}
       AND l.pid IS DISTINCT FROM pg_backend_pid()
       AND l.relation IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
       AND l.mode <> ALL (%s)
"""


def holders_of(conn: psycopg.Connection[Any], tables: Sequence[tuple[str | None, str]], *, readers: bool) -> str:
    """Say which transactions hold locks on tables, those that are oldest first.

    They are asked for after a wait for a lock has ended in vain, so what held it may be gone by then.

    Args:
        conn: of any role, outside of a failed transaction. Without `pg_read_all_stats` it sees other roles' process
            numbers, and no more of them.
        tables: schema (None for what the search path finds) and name of each.
        readers: count those too that only read, which nothing but dropping or emptying a table has to wait for.
    """
    names = [
        (sql.Identifier(name) if schema is None else sql.Identifier(schema, name)).as_string(conn)
        for schema, name in tables
    ]
    with conn.cursor(row_factory=tuple_row) as cursor:
        rows = cursor.execute(_HOLDERS, (names, [] if readers else list(_READING))).fetchall()
    rows.sort(key=lambda row: -(row[-1] or 0.0))
    shown = [_shown(*row) for row in rows[:_SHOWN_MAX]]
    if len(rows) > _SHOWN_MAX:
        shown.append(f"and {len(rows) - _SHOWN_MAX} more")
    return ", ".join(shown) or "nobody holds a lock on them any more, or it was on something else"


def _shown(
    pid: int | None,
    gid: str | None,
    table: str,
    user: str | None,
    application: str | None,
    state: str | None,
    age_s: float | None,
) -> str:
    who = f"process {pid}" if pid is not None else f"the prepared transaction {gid!r}"
    details = [f"role {user!r}"] if user else []
    details += [f"application {application!r}"] if application else []
    details += [state] if state else []
    details += [f"for {age_s:.0f} s"] if age_s is not None else []
    return f"{who} ({', '.join(details)}) holds {table!r}" if details else f"{who} holds {table!r}"
