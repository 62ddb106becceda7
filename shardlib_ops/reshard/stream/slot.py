"""Publications and replication slots of a job: made, looked at, dropped. Each step may be done again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib.errors import ShardUnavailable
from shardlib.topology import Table
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import claimed, publication
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.stream.decode import lsn_number
from shardlib_ops.reshard.stream.faults import SlotBlocked

__all__ = [
    "SlotState",
    "create_publication",
    "create_slot",
    "drop_publication",
    "drop_slot",
    "slot_state",
    "who_blocks_a_slot",
]

_LOCK_S: Final = 10
_DROP_S: Final = 30.0
_PAUSE_FIRST_S: Final = 0.01
_PAUSE_MAX_S: Final = 0.5
_NAMED_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class SlotState:
    """A replication slot as its server sees it.

    Attributes:
        confirmed: LSN up to which its reader has everything; 0 if unknown.
        wal_status: `reserved`, `extended`, `unreserved`, `lost`; None if unknown.
        lost: why no more changes come from it, None if they do.
        retained_bytes: WAL that the server keeps for it.
        active_pid: the process that sends it to somebody; None if nobody reads.
    """

    confirmed: int
    wal_status: str | None
    lost: str | None
    retained_bytes: int
    active_pid: int | None


async def create_publication(conn: AsyncConnection[Any], runner: Runner, tables: Sequence[Table]) -> None:
    """Publish all changes of these tables under the job's name; one that differs is brought to it.

    A partitioned table is published as one table; a TRUNCATE of a single partition is then not in the stream.

    Raises:
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    name = sql.Identifier(publication(runner.job))
    wanted = sql.SQL(", ").join(sql.Identifier(table.schema or "public", table.name) for table in tables)
    options = sql.SQL("publish = 'insert, update, delete, truncate', publish_via_partition_root = true")
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = '{_LOCK_S}s'")
        await conn.execute(claimed(runner))
        row = await (await conn.execute(_PUBLISHED, (publication(runner.job),))).fetchone()
        if row is None:
            await conn.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH ({})").format(name, wanted, options))
            return
        whole, listed = row
        if sorted(map(tuple, listed)) != sorted((table.schema or "public", table.name) for table in tables):
            await conn.execute(sql.SQL("ALTER PUBLICATION {} SET TABLE {}").format(name, wanted))
        if not whole:
            await conn.execute(sql.SQL("ALTER PUBLICATION {} SET ({})").format(name, options))


async def drop_publication(conn: AsyncConnection[Any], runner: Runner) -> None:
    """Drop the job's publication, if it is there. Its slots must be gone: their readers would fail without it."""
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = '{_LOCK_S}s'")
        await conn.execute(claimed(runner))
        await conn.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(publication(runner.job))))


_PUBLISHED: Final = """
    SELECT p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate AND p.pubviaroot,
           coalesce((SELECT array_agg(ARRAY[n.nspname::text, c.relname::text])
                       FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid
                       JOIN pg_namespace n ON n.oid = c.relnamespace
                      WHERE r.prpubid = p.oid), '{}')
      FROM pg_publication p WHERE p.pubname = %s
"""


async def create_slot(link: Link, *, timeout_s: float) -> str:
    """Make the slot of a leg at its origin, without a snapshot.

    The server waits for every transaction that is open anywhere on it, so that none is seen by halves.

    Returns:
        Its consistent point: the stream holds exactly the transactions whose commit record begins at or after it. Of a
        slot that was there, up to where its reader has confirmed.

    Raises:
        SlotBlocked: `timeout_s` seconds are over; it names the transactions that were waited for. There is no slot.
        ShardUnavailable: no server.
    """
    conn = await link.open_origin("slot")
    try:
        await conn.execute(claimed(link.runner))
        state = await slot_state(conn, link.slot)
        if state is not None:
            found = await conn.execute(
                "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s", (link.slot,)
            )
            row = await found.fetchone()
            if row is not None and row[0] is not None and state.lost is None:
                return str(row[0])
            await drop_slot(conn, link.slot)  # it never became consistent, or cannot be read any more
        await conn.execute(f"SET statement_timeout = {max(1, round(timeout_s * 1000))}")
        try:
            made = await conn.execute(
                "SELECT lsn::text FROM pg_create_logical_replication_slot(%s, 'pgoutput')", (link.slot,)
            )
            row = await made.fetchone()
        except pg.QueryCanceled:
            await conn.execute("SET statement_timeout = 0")
            holders = await who_blocks_a_slot(conn, older_than_s=timeout_s)
            raise SlotBlocked(link.origin.name, link.slot, timeout_s, holders) from None
        assert row is not None  # noqa: S101 - a function without FROM gives one row
        return str(row[0])
    finally:
        await conn.close()


async def who_blocks_a_slot(
    conn: AsyncConnection[Any], *, older_than_s: float, nobody: str = "transactions that have ended meanwhile"
) -> str:
    """The open transactions that wrote something, on the whole server, and the prepared ones: the oldest, in words."""
    found = await conn.execute(_WRITERS, (older_than_s, older_than_s, _NAMED_MAX + 1))
    names = [str(row[0]) for row in await found.fetchall()]
    if not names:
        return nobody
    return ", ".join(names[:_NAMED_MAX]) + (" and others" if len(names) > _NAMED_MAX else "")


_WRITERS: Final = """
    SELECT what FROM (
        SELECT format('pid %%s (%%s, database %%s, %%s, for %%s s)', pid,
                      coalesce(nullif(application_name, ''), 'unnamed'), datname, state,
                      round(extract(epoch FROM clock_timestamp() - xact_start))) AS what, xact_start AS since
          FROM pg_stat_activity
         WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
           AND xact_start < clock_timestamp() - make_interval(secs => %s)
        UNION ALL
        SELECT format('prepared transaction %%L (database %%s, owner %%s, for %%s s)', gid, database, owner,
                      round(extract(epoch FROM clock_timestamp() - prepared))), prepared
          FROM pg_prepared_xacts WHERE prepared < clock_timestamp() - make_interval(secs => %s)
    ) x ORDER BY since LIMIT %s
"""


async def drop_slot(conn: AsyncConnection[Any], name: str, *, runner: Runner | None = None) -> None:
    """Drop a slot, ending the process that sends it to somebody; nothing to do if there is none.

    Args:
        conn: autocommit connection to the slot's server.
        name: of the slot.
        runner: who is at work; None if the caller has seen to it that nobody else holds the job.

    Raises:
        ShardUnavailable: somebody reads from it again and again.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job: then the slot is not ours to drop.
    """
    deadline, pause = time.monotonic() + _DROP_S, _PAUSE_FIRST_S
    while True:
        try:
            async with conn.transaction():
                if runner is not None:
                    # Keeps a claim waiting until the slot is gone: a later runner makes its own after that.
                    await conn.execute(claimed(runner))
                await conn.execute(
                    "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots"
                    " WHERE slot_name = %s AND active_pid IS NOT NULL",
                    (name,),
                )
                await conn.execute("SELECT pg_drop_replication_slot(%s)", (name,))
            return
        except pg.UndefinedObject:
            return
        except pg.ObjectInUse:
            if time.monotonic() > deadline:
                raise ShardUnavailable(
                    conn.info.dbname, f"slot {name!r} is in use again each time its reader is ended"
                ) from None
        await asyncio.sleep(pause)
        pause = min(pause * 2, _PAUSE_MAX_S)


async def slot_state(conn: AsyncConnection[Any], name: str) -> SlotState | None:
    """How a slot is; None if there is none."""
    found = await conn.execute(_STATE, (name,))
    row = await found.fetchone()
    if row is None:
        return None
    confirmed, wal_status, lost, retained, active_pid = row
    return SlotState(
        confirmed=0 if confirmed is None else lsn_number(confirmed),
        wal_status=wal_status,
        lost=lost,
        retained_bytes=int(retained),
        active_pid=active_pid,
    )


# Which columns there are depends on the version: `conflicting` since 16, `invalidation_reason` since 17.
_STATE: Final = """
    SELECT s.confirmed_flush_lsn::text, s.wal_status,
           CASE WHEN to_jsonb(s) ->> 'invalidation_reason' IS NOT NULL THEN to_jsonb(s) ->> 'invalidation_reason'
                WHEN to_jsonb(s) ->> 'conflicting' = 'true' THEN 'conflict with recovery'
                WHEN s.wal_status = 'lost' THEN 'WAL it needed was removed' END,
           coalesce(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                                         ELSE pg_current_wal_lsn() END, s.restart_lsn), 0),
           s.active_pid
      FROM pg_replication_slots s WHERE s.slot_name = %s
"""
