"""Delete the rows that a shard holds and does not serve any more, while its clients go on with theirs.

The rows go in the order in which they lie on disk, a few blocks in each transaction and so many in a second, so that
the WAL, the replicas and the other writers bear it. Nothing is looked up by an index of the table: what a block holds
is looked up in the job's key table.

It may be stopped and begun again at any point: what is gone is gone, and the blocks are only looked at again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TokenRange, merge_ranges
from shardlib.ring.ranges import ranges_contain
from shardlib.token import hash_of
from shardlib_ops.reshard.control import claimed, keys_table
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.locks import lock_holders
from shardlib_ops.reshard.rows import TableShape, same_key
from shardlib_ops.reshard.world import Blocked

__all__ = ["purge"]

_PASSES: Final = 5
_FETCH: Final = 20_000

_SETTINGS: Final = (
    # The application's triggers and foreign keys did their work when the rows were written.
    "SET session_replication_role = replica",
    # A batch that a crash loses is deleted again.
    "SET synchronous_commit = off",
    # A policy would hide rows; better an error.
    "SET row_security = off",
    "SET jit = off",
    # What is left is counted by a hash of the keys: each row's key is computed once.
    "SET enable_nestloop = off",
)


async def purge(
    link: Link,
    shapes: Sequence[TableShape],
    *,
    ranges: Sequence[TokenRange] | None = None,
    rows_per_s: int = 20_000,
    blocks: int = 32,
    lock_s: float = 10.0,
    pause: Callable[[], Awaitable[None]] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Delete every row whose key is in the job's key table from the sink of a link; how many there were.

    Each transaction checks the claim and writes the link's position, which lets it pass the guard. Deleted is what the
    key table says, of all of the job's legs of that shard.

    Args:
        link: its sink is the side to be emptied: `reverse` for a leg's source, `forward` for its target.
        shapes: the sharded tables, as they are at the sink.
        ranges: what the keys of the key table may be of: the ranges of all of the job's legs of that shard. None for
            those of the link, which is right where the shard has one leg.
        rows_per_s: how many rows go in a second, at most.
        blocks: how many blocks of 8 KiB are looked at in one transaction.
        lock_s: seconds to wait for a lock that somebody holds on a row.
        pause: awaited between batches; may take its time, and may raise.
        on_progress: told how many rows are deleted so far, after each batch.

    Raises:
        InvalidTopology: a key of the key table is outside the ranges, so that its rows may be served here. Nothing is
            deleted.
        InvalidArgument: `rows_per_s` or `blocks` is less than 1, or `lock_s` less than a millisecond.
        Blocked: somebody holds a lock on rows, or goes on writing such rows; it is named.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job; the server went away.
        ShardUnavailable: no server.
    """
    for name, value in (("rows_per_s", rows_per_s), ("blocks", blocks)):
        if value < 1:
            raise InvalidArgument(name, value, "at least 1")
    if lock_s < 0.001:
        raise InvalidArgument("lock_s", lock_s, "seconds, at least 0.001")
    conn = await link.open_sink("purge")
    try:
        for setting in _SETTINGS:
            await conn.execute(setting.encode())
        await conn.execute(f"SET lock_timeout = {round(lock_s * 1000)}")
        await _check_keys(conn, link, link.ranges if ranges is None else ranges)
        work = _Purge(conn, link, rows_per_s, blocks, lock_s, pause, on_progress)
        for shape in shapes:
            await work.empty(shape)
        return work.deleted
    finally:
        await conn.close()


async def _check_keys(conn: AsyncConnection[Any], link: Link, ranges: Sequence[TokenRange]) -> None:
    """A key that stays here must not be in the key table: hash each of them again."""
    token, merged = hash_of(link.hash_function), merge_ranges(ranges)
    async with conn.transaction(), conn.cursor(f"keys_{link.runner.job:d}") as cursor:
        cursor.itersize = _FETCH
        await cursor.execute(sql.SQL("SELECT k, more FROM {}").format(keys_table(link.runner.job)))
        async for k, more in cursor:
            key = "\0".join((k, *more)).encode()
            if not ranges_contain(merged, token(key)):
                raise InvalidTopology(
                    f"key {(k, *more)!r} is in the key table of job {link.runner.job} on shard {link.sink.name!r}, but "
                    "its token is in none of the job's ranges; nothing was deleted",
                    "find out how it got there: its rows are served by this shard, or by one unknown to the job",
                )


@dataclass(slots=True)
class _Purge:
    conn: AsyncConnection[Any]
    link: Link
    rows_per_s: int
    blocks: int
    lock_s: float
    pause: Callable[[], Awaitable[None]] | None
    on_progress: Callable[[int], None] | None
    deleted: int = 0

    async def empty(self, shape: TableShape) -> None:
        leaves = await (await self.conn.execute(_LEAVES, (shape.oid, shape.oid))).fetchall()
        for oid, schema, name in leaves:
            leaf = sql.Identifier(schema, name)
            for _ in range(_PASSES):
                # A row may be appended behind the pass by who was let in before the guard stood.
                if not await self._any_left(shape, leaf):
                    break
                await self._pass(shape, leaf, oid)
            else:
                if left := await self._left(shape, leaf):
                    raise Blocked(
                        f"{left} rows of moved keys are in table {shape.table.fullname!r} of shard "
                        f"{self.link.sink.name!r} after {_PASSES} passes: somebody writes them; the table is used by "
                        + await lock_holders(self.conn, [oid])
                    )

    async def _pass(self, shape: TableShape, leaf: sql.Identifier, oid: int) -> None:
        """Once through the table, from its first block to what is its last one now."""
        found = await self.conn.execute(
            "SELECT pg_relation_size(%s::oid) / current_setting('block_size')::bigint", (oid,)
        )
        row = await found.fetchone()
        last = 0 if row is None else int(row[0])
        began, before = time.monotonic(), self.deleted
        for first in range(0, last, self.blocks):
            try:
                self.deleted += await self._batch(shape, leaf, first)
            except pg.LockNotAvailable:
                await self.conn.execute("ROLLBACK")
                raise Blocked(
                    f"rows of moved keys in table {shape.table.fullname!r} of shard {self.link.sink.name!r} are locked "
                    f"for more than {self.lock_s:g} s; the table is used by " + await lock_holders(self.conn, [oid])
                ) from None
            if self.on_progress is not None:
                self.on_progress(self.deleted)
            if self.pause is not None:
                await self.pause()
            ahead_s = (self.deleted - before) / self.rows_per_s - (time.monotonic() - began)
            if ahead_s > 0:
                await asyncio.sleep(ahead_s)

    async def _batch(self, shape: TableShape, leaf: sql.Identifier, first: int) -> int:
        """One transaction in one message; how many rows it deleted."""
        cursor = await self.conn.execute(
            sql.SQL(
                # A key table without statistics would be read from end to end for each row.
                "BEGIN; {claimed}; {touch}; SET LOCAL enable_seqscan = off;"
                " DELETE FROM ONLY {leaf} AS t WHERE t.ctid >= {start}::tid AND t.ctid < {end}::tid AND {moved};"
                " COMMIT"
            ).format(
                claimed=claimed(self.link.runner),
                touch=self._touch(),
                leaf=leaf,
                start=f"({first:d},0)",
                end=f"({first + self.blocks:d},0)",
                # Not a join: it would be free to begin with the keys.
                moved=sql.SQL("coalesce((SELECT true FROM {keys} AS k WHERE {same}), false)").format(
                    keys=keys_table(self.link.runner.job), same=same_key(*shape.key_parts("t"))
                ),
            )
        )
        deleted = 0
        while True:
            if (cursor.statusmessage or "").startswith("DELETE"):
                deleted = cursor.rowcount
            if not cursor.nextset():
                return deleted

    def _touch(self) -> sql.Composed:
        """Write the link's row of `shardlib.position` and leave its value: what the guard looks for."""
        return sql.SQL(
            "INSERT INTO shardlib.position AS p VALUES ({job}, {leg}, {direction}, '0/0')"
            " ON CONFLICT (job, leg, direction) DO UPDATE SET lsn = p.lsn"
        ).format(job=self.link.runner.job, leg=self.link.number, direction=self.link.direction)

    async def _any_left(self, shape: TableShape, leaf: sql.Identifier) -> bool:
        found = await self.conn.execute(sql.SQL("SELECT EXISTS ({})").format(self._moved(shape, leaf, "1")))
        row = await found.fetchone()
        return row is not None and bool(row[0])

    async def _left(self, shape: TableShape, leaf: sql.Identifier) -> int:
        found = await self.conn.execute(self._moved(shape, leaf, "count(*)"))
        row = await found.fetchone()
        return 0 if row is None else int(row[0])

    def _moved(self, shape: TableShape, leaf: sql.Identifier, what: str) -> sql.Composed:
        first, rest = shape.key_parts("t")
        return sql.SQL(
            "SELECT {what} FROM (SELECT {first} AS first, {rest} AS rest FROM ONLY {leaf} AS t OFFSET 0) AS r"
            " WHERE EXISTS (SELECT FROM {keys} AS k WHERE {same})"
        ).format(
            what=sql.SQL("count(*)" if what == "count(*)" else "1"),
            first=first,
            rest=rest,
            leaf=leaf,
            keys=keys_table(self.link.runner.job),
            same=same_key(sql.SQL("r.first"), sql.SQL("r.rest")),
        )


# The tables that hold rows: the table itself, or the leaves of a partitioned one.
_LEAVES: Final = """
    SELECT c.oid, n.nspname::text, c.relname::text
      FROM (SELECT %s::oid AS oid UNION SELECT relid FROM pg_partition_tree(%s::oid)) t
      JOIN pg_class c ON c.oid = t.oid AND c.relkind = 'r'
      JOIN pg_namespace n ON n.oid = c.relnamespace
     ORDER BY c.oid
"""
