"""Changes of tables that others are using: a short wait for the lock, then it gives way, again and again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg import errors as pg

from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import claimed
from shardlib_ops.reshard.world import Blocked

__all__ = ["lock_holders", "with_short_locks"]

_ATTEMPT_MS: Final = 100
_PAUSE_MAX_S: Final = 1.0
_NAMED_MAX: Final = 5


async def with_short_locks(
    conn: AsyncConnection[Any],
    runner: Runner,
    work: Callable[[], Awaitable[object]],
    *,
    tables: Sequence[int],
    what: str,
    budget_s: float = 30.0,
) -> None:
    """Run `work` in a transaction of the job's runner that waits for no lock longer than a moment.

    Newcomers wait behind whoever waits for a lock, so an attempt ends soon and leaves them time before the next.

    Args:
        conn: an autocommit connection.
        runner: who is at work.
        work: what happens in the transaction; may run several times.
        tables: OIDs of the tables whose locks it needs, to name who holds them.
        what: names the change, for the message.
        budget_s: seconds for all attempts together.

    Raises:
        Blocked: the budget is over; the message names the holders. Nothing has changed.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    deadline, pause = time.monotonic() + budget_s, _ATTEMPT_MS / 1000
    while True:
        try:
            async with conn.transaction():
                await conn.execute(f"SET LOCAL lock_timeout = '{_ATTEMPT_MS}ms'")
                await conn.execute(claimed(runner))
                await work()
            return
        except (pg.LockNotAvailable, pg.DeadlockDetected):
            if time.monotonic() + pause > deadline:
                held = await lock_holders(conn, tables)
                raise Blocked(f"no lock for {what} within {budget_s:g} s, which is held by {held}") from None
        await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - no secret, only spread
        pause = min(pause * 2, _PAUSE_MAX_S)


async def lock_holders(conn: AsyncConnection[Any], tables: Sequence[int]) -> str:
    """Who uses these tables now, the oldest transaction first, in words."""
    found = await conn.execute(_HOLDERS, (list(tables), _NAMED_MAX + 1))
    names = [str(row[0]) for row in await found.fetchall()]
    if not names:
        return "transactions that have ended meanwhile"
    return "; ".join(names[:_NAMED_MAX]) + ("; and others" if len(names) > _NAMED_MAX else "")


_HOLDERS: Final = """
    SELECT what FROM (
        SELECT DISTINCT coalesce(a.xact_start, p.prepared) AS since,
               coalesce(format('process %%s of %%s (%%s, %%s, for %%s s)', a.pid, coalesce(a.usename, a.backend_type),
                               coalesce(nullif(a.application_name, ''), 'no application name'), a.state,
                               round(extract(epoch FROM clock_timestamp() - a.xact_start))),
                        format('prepared transaction %%L of %%s (for %%s s)', p.gid, p.owner,
                               round(extract(epoch FROM clock_timestamp() - p.prepared)))) AS what
          FROM pg_locks l
          LEFT JOIN pg_stat_activity a ON a.pid = l.pid
          LEFT JOIN pg_locks x ON l.pid IS NULL AND x.virtualtransaction = l.virtualtransaction
                AND x.locktype = 'transactionid' AND x.granted AND x.pid IS NULL
          LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
         WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND l.relation = ANY (%s::oid[])
    ) x WHERE what IS NOT NULL ORDER BY since NULLS LAST LIMIT %s
"""
