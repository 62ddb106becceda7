"""The distinct shard keys of the rows that move: found at the origin, written down on both sides, read again."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import claimed, keys_table
from shardlib_ops.reshard.copy.snapshot import ExportedSnapshot
from shardlib_ops.reshard.lines import line_filter, whole_lines
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.reader import LOCK_MS, Reader, find_psql, open_reader, take_snapshot
from shardlib_ops.reshard.room import no_room
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.world import Blocked

__all__ = ["Key", "blocks_of", "collect_keys", "leg_keys", "locks_awaited", "share"]

Key = tuple[str, tuple[str, ...]]
"""Text of the first part of a shard key, and those of the others."""

_FETCH: Final = 20_000
_SHARED: Final = 2
_TELL_EVERY: Final = 100_000
_NEW: Final = "shardlib_new_keys"


async def collect_keys(
    link: Link,
    shapes: Sequence[TableShape],
    snapshot: ExportedSnapshot,
    *,
    on_progress: Callable[[int], None] | None = None,
    psql: Path | None = None,
    use_psql: bool = True,
) -> int:
    """Write the keys of the leg's rows into the job's key tables of both sides, before any row arrives.

    Rows are hidden at the sink by that table, so it is committed first. A key that is there already stays as it is.

    Args:
        link: the leg, forward.
        shapes: the tables at the origin.
        snapshot: whose rows count.
        on_progress: told how many keys were found so far.
        psql: program to read with; the one that is found if None.
        use_psql: False to read through libpq alone.

    Returns:
        How many distinct keys of the leg's ranges there are in the snapshot.

    Raises:
        Blocked: somebody has locked a table for long.
        Lost: a disk is full.
        ShardUnavailable: a server did not answer.
        psycopg.Error: of the server; SQLSTATE SL001 if a later runner holds the job.
    """
    if not shapes:
        return 0
    parts = max(len(shape.table.key) for shape in shapes)
    found = 0
    for count in range(1, parts + 1):
        same = [shape for shape in shapes if len(shape.table.key) == count]
        if same:
            program = (psql or find_psql()) if use_psql else None
            with locks_awaited(link):
                found = await _collect(link, same, count, snapshot, program, found, on_progress)
    return found


async def _collect(
    link: Link,
    shapes: Sequence[TableShape],
    parts: int,
    snapshot: ExportedSnapshot,
    psql: Path | None,
    before: int,
    on_progress: Callable[[int], None] | None,
) -> int:
    keep = line_filter(link.ranges, link.hash_function, parts)
    pending: list[bytes] = []
    found, told = before, before
    async with AsyncExitStack() as stack:
        reader = await open_reader(link, "keys", psql=psql)
        stack.push_async_callback(reader.close)
        await take_snapshot(reader, snapshot.name)
        writes: list[Callable[[bytes], Awaitable[None]]] = []
        for opened, shard in ((link.open_origin, link.origin), (link.open_sink, link.sink)):
            conn = await opened("keys")
            stack.push_async_callback(conn.close)
            writes.append(await stack.enter_async_context(_writing(conn, shard.name, link.runner, parts)))
        blocks = await stack.enter_async_context(aclosing(blocks_of(link, reader, _distinct(shapes, parts))))
        async for block in blocks:
            lines = keep(whole_lines(pending, block))
            if not lines:
                continue
            found += len(lines)
            if parts > 1:
                lines = [fields[0] + b"\t" + fields[-1] for fields in (line.split(b"\t") for line in lines)]
            text = b"\n".join(lines) + b"\n"
            for write in writes:
                await write(text)
            if on_progress is not None and found - told >= _TELL_EVERY:
                told = found
                on_progress(found)
    if on_progress is not None:
        on_progress(found)
    return found


def _distinct(shapes: Sequence[TableShape], parts: int) -> sql.Composed:
    """COPY of the distinct keys: their parts, and of a composite one the parts but the first as an array as well."""
    names = [sql.Identifier(f"p{number}") for number in range(parts)]
    # Whatever collation a column has, keys are compared by their bytes.
    each = sql.SQL(" UNION ALL ").join(
        sql.SQL("SELECT {} FROM {} AS t WHERE {}").format(
            sql.SQL(", ").join(
                sql.SQL('{} COLLATE "C" AS {}').format(text, name)
                for text, name in zip(shape.key_texts(), names, strict=True)
            ),
            shape.name,
            sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(sql.Identifier("t", at)) for at in shape.table.key),
        )
        for shape in shapes
    )
    # In the order of an index of texts, so that the key tables' indexes grow at one end.
    columns = sql.SQL(", ").join(names)
    if parts > 1:
        columns += sql.SQL(", ARRAY[{}]").format(sql.SQL(", ").join(names[1:]))
    return sql.SQL("COPY (SELECT {} FROM (SELECT DISTINCT * FROM ({}) AS a) AS d ORDER BY {}) TO STDOUT").format(
        columns, each, sql.SQL(", ").join(names)
    )


@asynccontextmanager
async def _writing(
    conn: AsyncConnection[Any], shard: str, runner: Runner, parts: int
) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    """A transaction that adds keys at a shard, given as lines of text COPY."""
    with no_room(shard):
        async with _adding(conn, runner, parts) as write:
            yield write


@asynccontextmanager
async def _adding(
    conn: AsyncConnection[Any], runner: Runner, parts: int
) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    name = keys_table(runner.job)
    columns = sql.SQL("k" if parts == 1 else "k, more")
    async with conn.transaction():
        await conn.execute(claimed(runner))
        row = await (await conn.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(name))).fetchone()
        into: sql.Composable = name
        repeated = row is not None and row[0]
        if repeated:
            # An earlier runner, or another leg, wrote keys: COPY itself cannot step over those that are there.
            into = sql.Identifier("pg_temp", _NEW)
            await conn.execute(
                sql.SQL("CREATE TEMP TABLE {} (k text, more text[] DEFAULT '{{}}') ON COMMIT DROP").format(
                    sql.Identifier(_NEW)
                )
            )
        statement = sql.SQL("COPY {} ({}) FROM STDIN WITH (ENCODING 'UTF8')").format(into, columns)
        async with conn.cursor().copy(statement) as copy:
            yield copy.write
        if repeated:
            await conn.execute(
                sql.SQL("INSERT INTO {} (k, more) SELECT k, more FROM {} ON CONFLICT DO NOTHING").format(name, into)
            )


async def blocks_of(link: Link, reader: Reader, copy: sql.Composable) -> AsyncGenerator[bytes, None]:
    """As `Reader.blocks`.

    Raises:
        Lost: the disk of the origin is full: sorting takes room there.
    """
    with no_room(link.origin.name):
        async with aclosing(reader.blocks(copy)) as blocks:
            async for block in blocks:
                yield block


def share(shapes: Sequence[TableShape]) -> sql.Composed:
    """A statement that keeps others from rewriting or truncating tables until the end of the transaction."""
    return sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(sql.SQL(", ").join(shape.name for shape in shapes))


@contextmanager
def locks_awaited(link: Link) -> Iterator[None]:
    """A lock that was not to be had in time is somebody's who is in the way for now.

    Raises:
        Blocked: in its stead.
    """
    try:
        yield
    except pg.LockNotAvailable as error:
        raise Blocked(
            f"a table of shard {link.origin.name!r} or {link.sink.name!r} was locked by somebody else for more than "
            f"{LOCK_MS / 1000:g} s; wait until their statement has ended"
        ) from error


async def leg_keys(conn: AsyncConnection[Any], link: Link, *, limit: int | None = None) -> list[Key] | None:
    """The keys of the leg in a side's key table, which the legs of a job share.

    None if there are more than `limit`, or so many of other legs that looking for them takes too long.
    """
    name = keys_table(link.runner.job)
    if limit is not None:
        found = await conn.execute(
            sql.SQL("SELECT count(*) FROM (SELECT FROM {} LIMIT {}) AS k").format(name, _SHARED * limit + 1)
        )
        row = await found.fetchone()
        if row is None or row[0] > _SHARED * limit:
            return None
    listed: list[Key] = []
    moves = link.moves
    async with conn.transaction(), conn.cursor(name="shardlib_keys") as cursor:
        cursor.itersize = _FETCH
        await cursor.execute(sql.SQL("SELECT k, nullif(more, '{{}}') FROM {}").format(name))
        while batch := await cursor.fetchmany(_FETCH):
            for k, more in batch:
                if moves((k if more is None else "\0".join((k, *more))).encode()):
                    listed.append((k, () if more is None else tuple(more)))
            if limit is not None and len(listed) > limit:
                return None
    return listed
