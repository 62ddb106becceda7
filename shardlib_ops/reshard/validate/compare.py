"""Compare the two sides of a leg.

While they run, "both sides at one LSN" is unsound: a transaction is in the WAL before it is visible. So the source is
read under a snapshot that a replication slot exported, whose point in the stream is exact, and the target under a
snapshot that is taken while its applier stands still at that very point. Both snapshots then are compared at leisure.

The job's key tables say whose rows are compared, so that no list of keys has to leave a server. That the source's own
one is complete is not taken for granted: keys that it does not hold are hashed again, and those that move are compared
as well. So a key that the copy missed is found.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Final, Protocol

from psycopg import AsyncConnection, sql

from shardlib.key.composite import copy_key
from shardlib_ops.reshard.control import keys_table
from shardlib_ops.reshard.lines import line_filter, whole_lines
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.reader import Reader, find_psql, open_reader, take_snapshot
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.stream.decode import lsn_number
from shardlib_ops.reshard.stream.recent import Recent
from shardlib_ops.reshard.validate.digest import Key, KeyList, Keys, listed, load_keys
from shardlib_ops.reshard.validate.lately import compare_lately
from shardlib_ops.reshard.validate.sides import AT_ONCE, Equal, Tables, compare_keys

__all__ = ["compare_changed", "compare_closed", "compare_whole"]

_HOLD_S: Final = 60.0
_WORK_MEM: Final = "128MB"
_WHOLE_RUNNING: Final = 2_000_000
"""Rows of a table that are compared as rows of changed keys while both sides run: a few seconds."""
_WHOLE_CLOSED: Final = 200_000
"""The same while writers wait: a few tenths of a second."""


class Snapshot(Protocol):
    """A snapshot that a replication slot exported."""

    name: str
    lsn: str


class Still(Protocol):
    """An applier that stands still."""

    async def at(self, lsn: int, *, timeout_s: float) -> None:
        """Let it apply what a snapshot with the consistent point `lsn` sees, and nothing after it."""
        ...


class Held(Protocol):
    """A stream whose applier can be made to stand still."""

    recent: Recent

    def standstill(self, *, timeout_s: float) -> AbstractAsyncContextManager[Still]:
        """Inside, nothing is applied but what is asked for."""
        ...


Export = Callable[[], AbstractAsyncContextManager[Snapshot]]


async def compare_whole(link: Link, stream: Held, tables: Tables, *, export: Export) -> Equal:
    """Compare all rows of the leg's ranges.

    Args:
        link: the leg, forward.
        stream: its running stream.
        tables: what is compared.
        export: opens a snapshot at the source.

    Raises:
        Mismatch: a row is missing, too much, or different; some keys are named.
    """
    async with _both(link, stream, export) as (lsn, here, there, reader):

        async def at_source() -> Keys:
            others = await _unlisted(link, tables.origin, reader)
            if tables.shared_origin:
                return await load_keys(here, [*await _keys_at(link, here, None), *others])
            return await _joined(here, _all_keys(link), others)

        async def at_target() -> Keys:
            if tables.shared_sink:
                return await load_keys(there, await _keys_at(link, there, None))
            return _all_keys(link)

        return await compare_keys(here, there, tables, at_source, at_target, lsn)


async def compare_changed(link: Link, stream: Held, tables: Tables, *, since: str, export: Export) -> Equal:
    """Compare what changed after `since`, an LSN of the source: see `compare_closed`.

    Raises:
        Mismatch: as `compare_whole`.
    """
    number = lsn_number(since)
    stream.recent.forget(number)
    async with _both(link, stream, export, keys=False) as (lsn, here, there, _):
        keys = await _keys_at(link, there, since)
        changed = stream.recent.after(number)
        found = await compare_lately(here, there, tables, keys, lsn, changed=changed, whole=_WHOLE_RUNNING)
    return replace(found, left=stream.recent.count(lsn_number(lsn)))


async def compare_closed(
    link: Link,
    tables: Tables,
    *,
    since: str,
    origin_conn: AsyncConnection[Any],
    sink_conn: AsyncConnection[Any],
    recent: Recent | None = None,
) -> int:
    """Compare what changed after `since`, on ranges that are closed and drained; how many keys changed.

    All rows of the changed keys are compared. Those of a key that has too many for the time there is are compared as
    far as the stream was asked to change them; if not all of these are known, whole as well, however long it takes.

    Args:
        link: the leg, forward.
        tables: what is compared.
        since: LSN of the source of an earlier comparison.
        origin_conn: to the source.
        sink_conn: to the target.
        recent: of the leg's stream; None for no key but whole.

    Raises:
        Mismatch: as `compare_whole`.
    """
    changed = None if recent is None else recent.after(lsn_number(since))
    async with origin_conn.transaction(), sink_conn.transaction():
        keys = await _keys_at(link, sink_conn, since)
        if keys:
            await compare_lately(origin_conn, sink_conn, tables, keys, since, changed=changed, whole=_WHOLE_CLOSED)
        return len(keys)


@asynccontextmanager
async def _both(
    link: Link, stream: Held, export: Export, *, keys: bool = True
) -> AsyncIterator[tuple[str, AsyncConnection[Any], AsyncConnection[Any], Reader | None]]:
    """(LSN, source, target, reader of the source's keys), each in a transaction that reads the state at that LSN."""
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(await link.open_origin("compare"))
        there = await stack.enter_async_context(await link.open_sink("compare"))
        reader = None
        if keys:
            reader = await open_reader(link, "compare keys", psql=find_psql())
            stack.push_async_callback(reader.close)
        # Still before the snapshot is made: the applier must not be past its point.
        async with stream.standstill(timeout_s=_HOLD_S) as still, export() as snapshot:
            await still.at(lsn_number(snapshot.lsn), timeout_s=_HOLD_S)
            stream.recent.begin(lsn_number(snapshot.lsn))
            await there.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await there.execute("SELECT 1")  # takes the snapshot
            await here.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await here.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(snapshot.name))
            if reader is not None:
                await take_snapshot(reader, snapshot.name)
            lsn = snapshot.lsn
        for conn in (here, there):
            await conn.execute(f"SET LOCAL work_mem = '{_WORK_MEM}'".encode())
        yield lsn, here, there, reader
        for conn in (here, there):
            await conn.execute("ROLLBACK")


def _all_keys(link: Link) -> Keys:
    return Keys(keys_table(link.runner.job))


async def _joined(conn: AsyncConnection[Any], known: Keys, others: KeyList) -> Keys:
    """Some keys, and others that are not among them."""
    if not others:
        return known
    more = listed(others) if len(others) <= AT_ONCE else await load_keys(conn, others)
    both = sql.SQL("(SELECT k, more FROM {} UNION ALL SELECT k, more FROM {} AS o)")
    return Keys(both.format(known.relation, more.relation), more.parameters)


async def _unlisted(link: Link, shapes: Sequence[TableShape], reader: Reader | None) -> list[Key]:
    """The leg's keys at the source that are not in its key table, found by hashing all keys that are not in it."""
    assert reader is not None  # noqa: S101 - opened for a whole comparison
    found: dict[Key, None] = {}
    for shape in shapes:
        parts = len(shape.table.key)
        keep = line_filter(link.ranges, link.hash_function, parts)
        pending: list[bytes] = []
        async for block in reader.blocks(_others(link, shape)):
            for line in keep(whole_lines(pending, block)):
                first, *rest = copy_key(line.split(b"\t")).decode().split("\0")
                found[first, tuple(rest)] = None
    return list(found)


def _others(link: Link, shape: TableShape) -> sql.Composed:
    """COPY of the key texts, a column for each part, of rows whose key is not in the source's key table."""
    return sql.SQL(
        "COPY (SELECT {} FROM {} AS t WHERE {} AND NOT EXISTS (SELECT FROM {} AS k WHERE {})) TO STDOUT"
    ).format(
        sql.SQL(", ").join(shape.key_texts()),
        shape.name,
        sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(sql.Identifier("t", part)) for part in shape.table.key),
        keys_table(link.runner.job),
        shape.matches(),
    )


async def _keys_at(link: Link, conn: AsyncConnection[Any], since: str | None) -> list[Key]:
    """The leg's keys in a side's key table: all, or those changed at or after an LSN."""
    query = sql.SQL("SELECT k, more FROM {}").format(keys_table(link.runner.job))
    if since is not None:
        query += sql.SQL(" WHERE lsn >= {}").format(since)
    moves = link.moves
    return [
        (k, tuple(more))
        for k, more in await (await conn.execute(query)).fetchall()
        if moves("\0".join((k, *more)).encode())
    ]
