"""A snapshot whose place in the stream of changes is known to the byte: exported by a new replication slot."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import psycopg
from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib_ops.reshard.connect import is_lost
from shardlib_ops.reshard.control import claimed
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.world import Blocked

__all__ = ["ExportedSnapshot", "export_snapshot"]

_log = logging.getLogger("shardlib.reshard.copy")

_ASK_S: Final = 5.0
_DROP_S: Final = 10.0
_PAUSE_FIRST_S: Final = 0.01
_PAUSE_MAX_S: Final = 0.5
_NAMED_MAX: Final = 5


@dataclass
class ExportedSnapshot:
    """A snapshot that transactions of the same database can take as theirs, for as long as this is open.

    Leaving the block closes the connection that keeps it, and with it a temporary slot. Transactions that have taken
    the snapshot keep it.

    Attributes:
        lsn: the consistent point: the snapshot shows exactly the transactions whose commit record begins before it,
            and the slot's stream holds exactly the others.
        name: for `SET TRANSACTION SNAPSHOT`.
        slot: name of the slot that was made with it.
        connection: replication connection that keeps it; nothing else may be run on it.
    """

    lsn: str
    name: str
    slot: str
    connection: AsyncConnection[Any]

    async def close(self) -> None:
        """Give the snapshot up."""
        await self.connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def export_snapshot(link: Link, *, slot: str, temporary: bool, timeout_s: float) -> ExportedSnapshot:
    """Make a slot at the origin of a leg, and a snapshot of the moment from which on the slot tells of changes.

    The server waits for every transaction that has written something and is still open, in any of its databases.

    Args:
        link: the leg.
        slot: name of the slot.
        temporary: the slot ends with the snapshot.
        timeout_s: limit for that wait, in seconds.

    Raises:
        Blocked: the time is over; it names the transactions that were waited for. There is no slot.
        ShardUnavailable: no answer from the server.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job; `DuplicateObject` if there is such a slot.
    """
    observer = await link.open_origin("observe")
    try:
        await observer.execute(claimed(link.runner))
        connection = await link.open_origin("snapshot", replication=True)
        try:
            return await _create(link, connection, observer, slot, temporary, timeout_s)
        except BaseException as error:
            await connection.close()
            if not temporary and not isinstance(error, pg.DuplicateObject):
                # It may have been made at the very moment that nobody waited for it any longer.
                await _drop(observer, slot)
            raise
    finally:
        await observer.close()


async def _create(
    link: Link,
    connection: AsyncConnection[Any],
    observer: AsyncConnection[Any],
    slot: str,
    temporary: bool,
    timeout_s: float,
) -> ExportedSnapshot:
    statement = sql.SQL("CREATE_REPLICATION_SLOT {} {}LOGICAL pgoutput (SNAPSHOT 'export')").format(
        sql.Identifier(slot), sql.SQL("TEMPORARY " if temporary else "")
    )
    making = asyncio.ensure_future(connection.execute(statement.as_string()))
    try:
        done, _ = await asyncio.wait({making}, timeout=timeout_s)
        if not done:
            async with asyncio.timeout(_ASK_S):
                holders = await _holders(observer, connection.info.backend_pid)
            raise Blocked(
                f"slot {slot!r} of shard {link.origin.name!r} was not ready within {timeout_s:g} s, as it waits for "
                f"{holders}; end these, or wait until they have ended"
            )
        cursor = await making
        row = await cursor.fetchone()
        assert row is not None  # noqa: S101 - the command answers with one row
        return ExportedSnapshot(lsn=str(row[1]), name=str(row[2]), slot=slot, connection=connection)
    finally:
        if not making.done():
            making.cancel()
            await asyncio.wait({making}, timeout=_ASK_S)
        if making.done() and not making.cancelled() and (late := making.exception()) is not None:
            _log.debug("making slot %r ended with %r", slot, late)


async def _holders(observer: AsyncConnection[Any], pid: int) -> str:
    """What the process that makes the slot waits for, in words."""
    found = await observer.execute(_HOLDERS, (pid, pid, _NAMED_MAX + 1))
    names = [str(row[0]) for row in await found.fetchall()]
    if not names:
        return "transactions that have ended meanwhile"
    return ", ".join(names[:_NAMED_MAX]) + (" and others" if len(names) > _NAMED_MAX else "")


# A prepared transaction has no process: the lock that is waited for leads to it.
_HOLDERS: Final = """
    SELECT what FROM (
        SELECT format('pid %%s (%%s, database %%s, %%s, for %%s s)', a.pid,
                      coalesce(nullif(a.application_name, ''), 'unnamed'), a.datname, a.state,
                      round(extract(epoch FROM clock_timestamp() - a.xact_start))) AS what, a.xact_start AS since
          FROM pg_stat_activity a WHERE a.pid = ANY (pg_blocking_pids(%s))
        UNION ALL
        SELECT format('prepared transaction %%L (database %%s, owner %%s, for %%s s)', p.gid, p.database, p.owner,
                      round(extract(epoch FROM clock_timestamp() - p.prepared))), p.prepared
          FROM pg_locks w JOIN pg_prepared_xacts p ON p.transaction = w.transactionid
         WHERE w.pid = %s AND w.locktype = 'transactionid' AND NOT w.granted
    ) x ORDER BY since LIMIT %s
"""


async def _drop(observer: AsyncConnection[Any], slot: str) -> None:
    """Drop a slot that nobody reads from, once its maker is gone; nothing to do if there is none."""
    pause = _PAUSE_FIRST_S
    try:
        async with asyncio.timeout(_DROP_S):
            while True:
                try:
                    await observer.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
                    return
                except pg.UndefinedObject:
                    return
                except pg.ObjectInUse:
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _PAUSE_MAX_S)
    except (TimeoutError, psycopg.Error) as error:
        if isinstance(error, psycopg.Error) and not is_lost(error):
            raise
        # The error that led here is the one to tell; the job drops its slots by name when it takes them up again.
        _log.warning("slot %r may be left behind: %s", slot, error)
