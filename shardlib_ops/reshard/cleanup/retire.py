"""Take everything away that a job has made in a shard's database, and tell what is left of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import clear_control, keys_table
from shardlib_ops.reshard.locks import with_short_locks
from shardlib_ops.reshard.stream.slot import drop_slot

__all__ = ["leftovers", "retire"]


async def retire(
    conn: AsyncConnection[Any], runner: Runner, *, slots: Sequence[str], publication: str, budget_s: float = 30.0
) -> None:
    """Remove what a job made in this database: slots, publication, guard, key table, control rows. Idempotent.

    What stays is a row of `shardlib.job`, which refuses runners that held the job earlier.

    No topology may name the job's moves any more, and no transaction that knows one that did may be in flight: scans
    look at the key table.

    Args:
        conn: autocommit connection to the shard's primary.
        runner: who is at work. It holds the job here, or nothing of the job is here any more.
        slots: names of the job's replication slots of this server; who reads from one is ended.
        publication: name of the job's publication.
        budget_s: seconds for each step.

    Raises:
        Blocked: somebody uses a table for longer than the budget; it is named.
        ShardUnavailable: somebody reads from a slot again and again.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    if not await leftovers(conn, runner.job):
        return
    for name in slots:
        await drop_slot(conn, name, runner=runner)
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
    await clear_control(conn, runner)


async def leftovers(conn: AsyncConnection[Any], job: int) -> list[str]:
    """What is left of a job in this database, one line a thing; empty when it is retired."""
    found = await conn.execute(_LEFT, {"job": job, "name": f"shardlib_job_{job:d}", "prefix": _prefix(job)})
    left = [str(row[0]) for row in await found.fetchall()]
    row = await (await conn.execute("SELECT to_regclass('shardlib.copied') IS NOT NULL")).fetchone()
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
"""
