"""Reference tables: every shard holds all their rows, so a new one gets them, and an old one must have them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib.topology import Table
from shardlib_ops.reshard.control import claimed
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import TableShape, read_shapes
from shardlib_ops.reshard.schema.sequences import advance_sequences
from shardlib_ops.reshard.world import Blocked, Failure

__all__ = ["copy_references", "fill", "together_locked"]

T = TypeVar("T")

_BUDGET_S: Final = 60.0
_ORIGIN_LOCK_MS: Final = 2_000
_SINK_LOCK_MS: Final = 500
_PAUSE_FIRST_S: Final = 0.05
_PAUSE_MAX_S: Final = 2.0
_HOLDERS_SHOWN: Final = 5

Digest = tuple[int, int]
"""Rows, and the sum of the hashes of their texts."""


async def copy_references(
    link: Link, references: Sequence[Table], origin: AsyncConnection[Any], sink: AsyncConnection[Any]
) -> None:
    """Let the sink have the rows of the origin's reference tables. Idempotent.

    An empty table is filled, and so is again one that this leg has filled and that has changed at the origin
    since; any other must be equal. What differs is looked at a second time under locks on both sides, since a load
    commits on one shard after the other.

    Args:
        link: a leg, forward.
        references: what both have; made alike.
        origin: a connection to the origin, not in a transaction.
        sink: one to the sink, not in a transaction.

    Raises:
        Failure: a table differs.
        Blocked: the locks could not be had within the budget; who holds them is named.
        psycopg.Error: a server was lost, or another runner holds the job.
    """
    shapes = await read_shapes(origin, references)
    unlike = [shape for shape in shapes if await _digest(origin, shape) != await _digest(sink, shape)]
    if unlike:

        async def work() -> None:
            wrong = [shape.table.fullname for shape in unlike if not await _made_equal(link, shape, origin, sink)]
            if wrong:
                raise Failure(
                    f"the reference tables {', '.join(wrong)} hold other rows on shard {link.sink.name!r} (target) "
                    f"than on {link.origin.name!r} (source), and every shard must hold the same; correct the rows, "
                    "or delete all of them on the target: then they are copied"
                )

        await together_locked(link, [shape.table for shape in unlike], origin, sink, work, sink_locks=True)
    await advance_sequences(origin, sink, link.runner, shapes, ahead=0)


async def _made_equal(link: Link, shape: TableShape, origin: AsyncConnection[Any], sink: AsyncConnection[Any]) -> bool:
    here, there = await _digest(origin, shape), await _digest(sink, shape)
    if here == there:
        return True
    if there[0]:
        mark = await sink.execute(
            "SELECT FROM shardlib.copied WHERE job = %s AND leg = %s AND table_name = %s",
            (link.runner.job, -link.number, shape.table.fullname),
        )
        if await mark.fetchone() is None:
            return False
    await fill(link, shape, origin, sink)
    return True


async def fill(link: Link, shape: TableShape, origin: AsyncConnection[Any], sink: AsyncConnection[Any]) -> int:
    """Put the origin's rows in the place of the sink's, in the transaction that the caller has begun; how many."""
    # Foreign keys to the table, and its triggers, do not fire. TRUNCATE would be refused for a foreign key.
    await sink.execute("SET LOCAL session_replication_role = replica")
    await sink.execute(sql.SQL("DELETE FROM {}").format(shape.name))
    source = sql.SQL("COPY (SELECT {columns} FROM {table}) TO STDOUT")
    target = sql.SQL("COPY {table} ({columns}) FROM STDIN")
    names = {"columns": shape.column_list(), "table": shape.name}
    async with origin.cursor() as read, sink.cursor() as write:
        async with read.copy(source.format(**names)) as rows, write.copy(target.format(**names)) as written:
            async for block in rows:
                await written.write(block)
        count = write.rowcount
    # Numbers of legs count from 1: the negative one is no leg's table, and goes with the job's other marks.
    await sink.execute(
        "INSERT INTO shardlib.copied VALUES (%s, %s, %s, '0/0', %s)"
        " ON CONFLICT (job, leg, table_name) DO UPDATE SET rows = excluded.rows",
        (link.runner.job, -link.number, shape.table.fullname, count),
    )
    return count


async def together_locked(
    link: Link,
    tables: Sequence[Table],
    origin: AsyncConnection[Any],
    sink: AsyncConnection[Any],
    work: Callable[[], Awaitable[T]],
    *,
    sink_locks: bool,
) -> T:
    """Run `work` in a transaction on each side while nobody writes to these tables; the sink's is committed first.

    A load holds its locks on all shards at once, so one that waits for us while we wait for it would wait for ever:
    a lock that does not come in time lets go of all, and everything is done again.

    Args:
        link: which shards.
        tables: locked on the origin.
        origin: not in a transaction.
        sink: not in a transaction.
        work: what to do; may be called again.
        sink_locks: whether the tables are on the sink, to be locked there as well.

    Raises:
        Blocked: not within the budget.
    """
    deadline, pause_s = time.monotonic() + _BUDGET_S, _PAUSE_FIRST_S
    names = sql.SQL(", ").join(sql.Identifier(table.schema or "public", table.name) for table in tables)
    while True:
        try:
            async with origin.transaction(force_rollback=True):
                await origin.execute(f"SET LOCAL lock_timeout = {_ORIGIN_LOCK_MS}".encode())
                if tables:
                    await origin.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(names))
                async with sink.transaction():
                    await sink.execute(claimed(link.runner))
                    await sink.execute(f"SET LOCAL lock_timeout = {_SINK_LOCK_MS}".encode())
                    if tables and sink_locks:
                        await sink.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(names))
                    return await work()
        except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
            if time.monotonic() + pause_s > deadline:
                who = [*await _holders(origin, tables), *await _holders(sink, tables)][:_HOLDERS_SHOWN]
                raise Blocked(
                    f"the reference tables {', '.join(table.fullname for table in tables)} are written to without "
                    f"end: no lock on them within {_BUDGET_S:g} s, held by {', '.join(who) or 'nobody now'}"
                ) from error
        # Half of it at random, so that two who met do not meet again.
        await asyncio.sleep(pause_s * (0.5 + random.random()))  # noqa: S311
        pause_s = min(_PAUSE_MAX_S, pause_s * 2)


async def _digest(conn: AsyncConnection[Any], shape: TableShape) -> Digest:
    columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in sorted(c.name for c in shape.stored))
    found = await conn.execute(
        sql.SQL("SELECT count(*), coalesce(sum(hashtextextended(ROW({})::text, 0)), 0) FROM {} AS t").format(
            columns, shape.name
        )
    )
    row = await found.fetchone()
    return (0, 0) if row is None else (int(row[0]), int(row[1]))


async def _holders(conn: AsyncConnection[Any], tables: Sequence[Table]) -> list[str]:
    found = await conn.execute(
        "SELECT DISTINCT coalesce('process ' || l.pid || ' of ' || a.usename || ' (' || a.application_name || ')',"
        " 'a prepared transaction')"
        " FROM unnest(%s::text[], %s::text[]) AS w(schema, name) JOIN pg_namespace s ON s.nspname = w.schema"
        " JOIN pg_class c ON c.relnamespace = s.oid AND c.relname = w.name"
        " JOIN pg_locks l ON l.locktype = 'relation' AND l.relation = c.oid AND l.granted"
        " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " LEFT JOIN pg_stat_activity a ON a.pid = l.pid"
        " WHERE l.mode <> 'AccessShareLock' AND l.pid IS DISTINCT FROM pg_backend_pid()",
        ([table.schema or "public" for table in tables], [table.name for table in tables]),
    )
    return [str(who) for (who,) in await found.fetchall()]
