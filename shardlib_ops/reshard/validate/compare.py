"""Compare the two sides of a leg.

While they run, "both sides at one LSN" is unsound: a transaction is in the WAL before it is visible. So the source is
read under a snapshot that a replication slot exported, whose point in the stream is exact, and the target under a
snapshot that is taken while its applier stands still at that very point. Both snapshots then are compared at leisure.

What is moved is found on the source by hashing its keys again, not by a list that the copy has made: a key that the
copy missed is found.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from psycopg import AsyncConnection, sql

from shardlib_ops.reshard.control import keys_table
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.validate.digest import KeyList, digests, key_digests, load_keys
from shardlib_ops.reshard.world import Mismatch

__all__ = ["Equal", "compare_changed", "compare_closed", "compare_whole"]

_HOLD_S: Final = 60.0
_SHOWN: Final = 5
_LISTED_MAX: Final = 5_000
_FETCH: Final = 20_000


@dataclass(frozen=True, slots=True)
class Equal:
    """The sides are equal.

    Attributes:
        lsn: of the source: changes of transactions that committed before it are covered.
        keys: how many keys were compared.
        rows: how many rows.
    """

    lsn: str
    keys: int
    rows: int


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

    def standstill(self, *, timeout_s: float) -> AbstractAsyncContextManager[Still]:
        """Inside, nothing is applied but what is asked for."""
        ...


Export = Callable[[], AbstractAsyncContextManager[Snapshot]]


async def compare_whole(
    link: Link, stream: Held, origin: Sequence[TableShape], sink: Sequence[TableShape], *, export: Export
) -> Equal:
    """Compare all rows of the leg's ranges.

    Args:
        link: the leg, forward.
        stream: its running stream.
        origin: the tables at the source.
        sink: the tables at the target.
        export: opens a snapshot at the source.

    Raises:
        Mismatch: a row is missing, too much, or different; some keys are named.
    """
    async with _both(link, stream, export) as (lsn, here, there, reader):
        keys = _moved(link, origin, reader)
        listed = [key async for key in keys]
        return await _compare(here, there, origin, sink, listed, lsn, known=await _keys_at(link, there, None))


async def compare_changed(
    link: Link,
    stream: Held,
    origin: Sequence[TableShape],
    sink: Sequence[TableShape],
    *,
    since: str,
    export: Export,
) -> Equal:
    """Compare the rows of keys that changed after `since`, an LSN of the source.

    Raises:
        Mismatch: as `compare_whole`.
    """
    async with _both(link, stream, export) as (lsn, here, there, _):
        return await _compare(here, there, origin, sink, await _keys_at(link, there, since), lsn)


async def compare_closed(
    link: Link,
    origin: Sequence[TableShape],
    sink: Sequence[TableShape],
    *,
    since: str,
    origin_conn: AsyncConnection[Any],
    sink_conn: AsyncConnection[Any],
) -> int:
    """Compare the rows of keys that changed after `since`, on ranges that are closed and drained; how many keys.

    Raises:
        Mismatch: as `compare_whole`.
    """
    async with origin_conn.transaction(), sink_conn.transaction():
        keys = await _keys_at(link, sink_conn, since)
        # Writers wait: a few keys go along with the query, without a table of their own.
        equal = not keys
        if keys and len(keys) <= _LISTED_MAX:
            here, there = await together([digests(origin_conn, origin, keys), digests(sink_conn, sink, keys)])
            equal = here == there
        if not equal:
            await _compare(origin_conn, sink_conn, origin, sink, keys, since)
        return len(keys)


@asynccontextmanager
async def _both(
    link: Link, stream: Held, export: Export
) -> AsyncIterator[tuple[str, AsyncConnection[Any], AsyncConnection[Any], AsyncConnection[Any]]]:
    """(LSN, source, target, source again), each in a transaction that reads the state at that LSN."""
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(await link.open_origin("compare"))
        there = await stack.enter_async_context(await link.open_sink("compare"))
        reader = await stack.enter_async_context(await link.open_origin("compare keys"))
        # Still before the snapshot is made: the applier must not be past its point.
        async with stream.standstill(timeout_s=_HOLD_S) as still, export() as snapshot:
            await still.at(_lsn(snapshot.lsn), timeout_s=_HOLD_S)
            await there.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await there.execute("SELECT 1")  # takes the snapshot
            for conn in (here, reader):
                await conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                await conn.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(snapshot.name))
            lsn = snapshot.lsn
        for conn in (here, there):
            await conn.execute("SET LOCAL work_mem = '64MB'")
        yield lsn, here, there, reader
        for conn in (here, there, reader):
            await conn.execute("ROLLBACK")


def _lsn(text: str) -> int:
    high, _, low = text.partition("/")
    return int(high, 16) << 32 | int(low, 16)


async def _moved(
    link: Link, shapes: Sequence[TableShape], conn: AsyncConnection[Any]
) -> AsyncIterator[tuple[str, tuple[str, ...]]]:
    """The distinct keys of the leg's ranges at the source, hashed anew."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    moves = link.moves
    for shape in shapes:
        first, rest = shape.key_parts()
        query = sql.SQL("SELECT DISTINCT {}, {} FROM {} AS t").format(first, rest, shape.name)
        async with conn.cursor(name="shardlib_keys") as cursor:
            cursor.itersize = _FETCH
            await cursor.execute(query)
            async for k, more in cursor:
                if moves("\0".join((k, *more)).encode()) and (key := (k, tuple(more))) not in seen:
                    seen.add(key)
                    yield key


async def _keys_at(link: Link, conn: AsyncConnection[Any], since: str | None) -> KeyList:
    """The leg's keys in the target's key table: all, or those changed at or after an LSN."""
    query = sql.SQL("SELECT k, more FROM {}").format(keys_table(link.runner.job))
    if since is not None:
        query += sql.SQL(" WHERE lsn >= {}").format(since)
    moves = link.moves
    return [
        (k, tuple(more))
        for k, more in await (await conn.execute(query)).fetchall()
        if moves("\0".join((k, *more)).encode())
    ]


async def _compare(
    here: AsyncConnection[Any],
    there: AsyncConnection[Any],
    origin: Sequence[TableShape],
    sink: Sequence[TableShape],
    keys: KeyList,
    lsn: str,
    *,
    known: KeyList | None = None,
) -> Equal:
    """Compare the rows of `keys` on two connections.

    Args:
        here: the source, in a transaction.
        there: the target, in a transaction.
        origin: the tables at the source.
        sink: the tables at the target.
        keys: whose rows.
        lsn: what they were read at.
        known: the target's key list, if `keys` are those of the source: each of them must be in it, or it would not
            be hidden and not be deleted; and rows of others at the target are too much.
    """
    every = keys
    if known is not None:
        if missing := set(keys) - set(known):
            raise Mismatch(f"{len(missing)} keys of the source are not in the target's key table: {_named(missing)}")
        every = known
    await together([load_keys(here, every), load_keys(there, every)])
    left, right = await together([digests(here, origin), digests(there, sink)])
    if left == right:
        return Equal(lsn, len(every), sum(rows for rows, _ in left.values()))
    differ = sorted(at for at in left.keys() | right.keys() if left.get(at) != right.get(at))
    shapes = {shape.table.fullname: (shape, other) for shape, other in zip(origin, sink, strict=True)}
    told: list[str] = []
    for table in dict.fromkeys(name for name, _ in differ):
        buckets = [bucket for name, bucket in differ if name == table]
        ours = await key_digests(here, shapes[table][0], buckets)
        theirs = await key_digests(there, shapes[table][1], buckets)
        wrong = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
        counts = (sum(rows for rows, _ in ours.values()), sum(rows for rows, _ in theirs.values()))
        told.append(f"table {table!r}: {len(wrong)} keys ({counts[0]} rows here, {counts[1]} there): {_named(wrong)}")
    raise Mismatch("source and target differ: " + "; ".join(told))


def _named(keys: Sequence[tuple[str, tuple[str, ...]]] | set[tuple[str, tuple[str, ...]]]) -> str:
    shown = [repr(key[0] if not key[1] else (key[0], *key[1])) for key in sorted(keys)[:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(keys) > _SHOWN else "")
