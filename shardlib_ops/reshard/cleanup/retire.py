"""Take everything away that a job has made in a shard's database, and tell what is left of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import claimed, drop_control, keys_table
from shardlib_ops.reshard.locks import with_short_locks
from shardlib_ops.reshard.world import Blocked

__all__ = ["leftovers", "retire"]

_SLOT_S: Final = 30.0
_TERMINATE_MS: Final = 5000
_PAUSE_FIRST_S: Final = 0.01
_PAUSE_MAX_S: Final = 0.5


async def retire(
    conn: AsyncConnection[Any], runner: Runner, *, slots: Sequence[str], publication: str, budget_s: float = 30.0
) -> None:
    """Remove what a job made in this database: slots, publication, guard, key table, control rows. Idempotent.

    No topology may name the job's moves any more, and no transaction that knows one that did may be in flight: scans
    look at the key table.

    Args:
        conn: autocommit connection to the shard's primary.
        runner: who is at work. It holds the job here, or the job is gone from here already.
        slots: names of the job's replication slots of this server; who reads from one is ended.
        publication: name of the job's publication.
        budget_s: seconds for each step.

    Raises:
        Blocked: somebody uses a table, or a slot, for longer than the budget; it is named.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    if not await leftovers(conn, runner.job):
        return
    for name in slots:
        await conn.execute(claimed(runner))
        await _drop_slot(conn, name, budget_s)
    await _drop(
        conn,
        runner,
        sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(publication)),
        [],
        "the publication",
    )
    for function, tables in await (await conn.execute(_GUARDS, (_prefix(runner.job) + "guard_",))).fetchall():
        # The triggers go with their function: one lock on the table for all.
        drop = sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE").format(sql.Identifier("shardlib", function))
        await _drop(conn, runner, drop, tables, "taking the guard off a table", budget_s)
    keys = keys_table(runner.job)
    found = await conn.execute("SELECT to_regclass(%s)::oid", (keys.as_string(conn),))
    row = await found.fetchone()
    if row is not None and row[0] is not None:
        drop = sql.SQL("DROP TABLE IF EXISTS {}").format(keys)
        await _drop(conn, runner, drop, [row[0]], "dropping the job's key table", budget_s)
    await drop_control(conn, runner)


async def leftovers(conn: AsyncConnection[Any], job: int) -> list[str]:
    """What is left of a job in this database, one line a thing; empty when it is retired."""
    found = await conn.execute(_LEFT, {"job": job, "name": f"shardlib_job_{job:d}", "prefix": _prefix(job)})
    left = [str(row[0]) for row in await found.fetchall()]
    row = await (await conn.execute("SELECT to_regclass('shardlib.job') IS NOT NULL")).fetchone()
    if row is not None and row[0]:
        found = await conn.execute(_ROWS, {"job": job})
        left += [str(row[0]) for row in await found.fetchall()]
    return left


def _prefix(job: int) -> str:
    return f"job_{job:d}_"


async def _drop(
    conn: AsyncConnection[Any],
    runner: Runner,
    statement: sql.Composed,
    tables: Sequence[int],
    what: str,
    budget_s: float = 30.0,
) -> None:
    await with_short_locks(conn, runner, lambda: conn.execute(statement), tables=tables, what=what, budget_s=budget_s)


async def _drop_slot(conn: AsyncConnection[Any], name: str, budget_s: float) -> None:
    deadline, pause = time.monotonic() + min(budget_s, _SLOT_S), _PAUSE_FIRST_S
    while True:
        try:
            await conn.execute(
                "SELECT pg_terminate_backend(active_pid, %s) FROM pg_replication_slots"
                " WHERE slot_name = %s AND active_pid IS NOT NULL",
                (_TERMINATE_MS, name),
            )
            await conn.execute("SELECT pg_drop_replication_slot(%s)", (name,))
            return
        except pg.UndefinedObject:
            return
        except pg.ObjectInUse as error:
            if time.monotonic() > deadline:
                raise Blocked(f"slot {name!r} is in use again each time its reader is ended: {error}") from None
        await asyncio.sleep(pause)
        pause = min(pause * 2, _PAUSE_MAX_S)


_GUARDS: Final = """
    SELECT f.proname::text,
           coalesce((SELECT array_agg(g.tgrelid::bigint) FROM pg_trigger g WHERE g.tgfoid = f.oid), '{}')
      FROM pg_proc f
     WHERE f.pronamespace = to_regnamespace('shardlib') AND starts_with(f.proname::text, %s)
     ORDER BY 1
"""

_LEFT: Final = """
    SELECT format('replication slot %%I', slot_name) FROM pg_replication_slots
     WHERE database = current_database() AND starts_with(slot_name::text, %(name)s || '_')
    UNION ALL
    SELECT format('publication %%I', pubname) FROM pg_publication WHERE pubname = %(name)s
    UNION ALL
    SELECT format('trigger %%I on %%s', g.tgname, g.tgrelid::regclass)
      FROM pg_trigger g JOIN pg_proc f ON f.oid = g.tgfoid
     WHERE f.pronamespace = to_regnamespace('shardlib') AND starts_with(f.proname::text, %(prefix)s)
    UNION ALL
    SELECT format('function shardlib.%%I()', proname) FROM pg_proc
     WHERE pronamespace = to_regnamespace('shardlib') AND starts_with(proname::text, %(prefix)s)
    UNION ALL
    SELECT format('table shardlib.%%I', relname) FROM pg_class
     WHERE relnamespace = to_regnamespace('shardlib') AND relkind = 'r' AND starts_with(relname::text, %(prefix)s)
"""

_ROWS: Final = """
    SELECT format('row of leg %%s in shardlib.position', leg) FROM shardlib.position WHERE job = %(job)s
    UNION ALL
    SELECT format('row of leg %%s, table %%s, in shardlib.copied', leg, table_name) FROM shardlib.copied
     WHERE job = %(job)s
    UNION ALL
    SELECT format('row %%s in shardlib.job', id) FROM shardlib.job WHERE id = %(job)s
"""
