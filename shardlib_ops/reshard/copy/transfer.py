"""The rows of a leg go to its target, chunk by chunk, several at a time, each in a transaction of its own."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib.errors import InvalidArgument
from shardlib_ops.reshard.copy.chunks import Chunk, chunks_of
from shardlib_ops.reshard.copy.keys import Key, blocks_of, leg_keys, locks_awaited, share
from shardlib_ops.reshard.copy.plan import KEYS_MAX, Part, Way, copied_tables, key_list, measure, way_of
from shardlib_ops.reshard.copy.snapshot import ExportedSnapshot
from shardlib_ops.reshard.copy.writer import forget_places, write_down, writing_rows
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.reader import LOCK_MS, Reader, find_psql, open_reader, take_snapshot
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.together import together

__all__ = ["CHUNK_BYTES", "Copied", "copy_tables"]

CHUNK_BYTES: Final = 16 << 20
"""How much of a table, as it is stored at the source, goes in one transaction."""


@dataclass(frozen=True, slots=True)
class Copied:
    """How far the copy of a table is.

    Attributes:
        table: its full name.
        rows: that have arrived.
        bytes: of COPY data written for them.
        fraction: of the table's blocks that were read, 0 to 1; 1 when it is written down as whole.
    """

    table: str
    rows: int
    bytes: int
    fraction: float


@dataclass(slots=True)
class _Table:
    way: Way
    chunks_total: int
    chunks_done: int = 0
    rows: int = 0
    bytes: int = 0

    @property
    def name(self) -> str:
        return self.way.shape.table.fullname


@dataclass(slots=True)
class _Work:
    table: _Table
    part: Part
    chunk: Chunk


class _Pace:
    """Spreads bytes over time, for all workers together."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._per_s = bytes_per_s
        self._free_at = 0.0

    async def spend(self, count: int) -> None:
        if self._per_s is None:
            return
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + count / self._per_s
        if (wait_s := self._free_at - now - count / self._per_s) > 0:
            await asyncio.sleep(wait_s)


async def copy_tables(
    link: Link,
    shapes_origin: Sequence[TableShape],
    shapes_sink: Sequence[TableShape],
    snapshot: ExportedSnapshot,
    *,
    workers: int = 2,
    chunk_bytes: int = CHUNK_BYTES,
    throttle: Callable[[], Awaitable[None]] | None = None,
    bytes_per_s: float | None = None,
    on_progress: Callable[[Copied], None] | None = None,
    psql: Path | None = None,
    use_psql: bool = True,
) -> int:
    """Copy the leg's rows of all tables that are not written down as copied.

    `collect_keys` has run under the same snapshot, and `empty_half_copied` before it. When the last chunk of a table
    has committed, the table is written down in `shardlib.copied` with the snapshot's LSN.

    With few distinct keys the server picks the rows by a list of them, and they pass through unread. With many, all
    rows are read and sieved by their tokens. They go in the binary form where both sides have the same built-in types.

    Args:
        link: the leg, forward.
        shapes_origin: the tables at the origin.
        shapes_sink: the same tables at the sink, in the same order.
        snapshot: whose rows are copied; it must stay open until this returns.
        workers: how many chunks are copied at the same time; each has a connection to both sides.
        chunk_bytes: about how much of a table, as it is stored, is copied in one transaction.
        throttle: awaited before each chunk; may wait, and may raise to end the copy.
        bytes_per_s: limit of the COPY data written, of all workers together.
        on_progress: told after each chunk that has committed.
        psql: program to read with; the one that is found if None.
        use_psql: False to read through libpq alone.

    Returns:
        How many rows were copied.

    Raises:
        InvalidArgument: a number is not positive.
        InvalidTopology: a table of the sink lacks a column.
        Blocked: somebody has locked a table for long.
        Lost: the sink's disk is full.
        ShardUnavailable: a server did not answer.
        psycopg.Error: of a server; SQLSTATE SL001 if a later runner holds the job.
    """
    for name, value in (("workers", workers), ("chunk_bytes", chunk_bytes), ("bytes_per_s", bytes_per_s)):
        if value is not None and value <= 0:
            raise InvalidArgument(name, value, "more than 0")
    async with AsyncExitStack() as stack:
        stack.enter_context(locks_awaited(link))
        here = await link.open_origin("copy plan")
        stack.push_async_callback(here.close)
        there = await link.open_sink("copy plan")
        stack.push_async_callback(there.close)
        done = await copied_tables(there, link)
        pairs = [
            (origin, sink)
            for origin, sink in zip(shapes_origin, shapes_sink, strict=True)
            if origin.table.fullname not in done
        ]
        if not pairs:
            return 0
        keys = await leg_keys(there, link, limit=KEYS_MAX)
        same_version = here.info.server_version // 10_000 == there.info.server_version // 10_000
        # Nobody may rewrite or truncate a table while places in it are numbers of blocks.
        await here.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        await here.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(snapshot.name))
        await here.execute(f"SET LOCAL lock_timeout = {LOCK_MS}".encode())
        lock = share([origin for origin, _ in pairs])
        await here.execute(lock)
        work: deque[_Work] = deque()
        tables: list[_Table] = []
        for origin, sink in pairs:
            way = way_of(origin, sink, listed=keys is not None, same_version=same_version)
            parts = [] if keys == [] else await measure(here, origin)
            cut = [
                (part, chunk)
                for part in parts
                for chunk in chunks_of(part.blocks, part.total_bytes, chunk_bytes, block_bytes=part.block_bytes)
            ]
            table = _Table(way, len(cut))
            tables.append(table)
            work.extend(_Work(table, part, chunk) for part, chunk in cut)
        job = _Job(link, snapshot, lock, keys, work, throttle, _Pace(bytes_per_s), on_progress)
        for table in tables:
            if not table.chunks_total:
                await job.whole(there, table)
        program = (psql or find_psql()) if use_psql else None
        count = min(workers, len(work))
        await together(job.worker(number, program) for number in range(count))
        await here.execute("COMMIT")
        await forget_places(there, link, count)
        return sum(table.rows for table in tables)


@dataclass(slots=True)
class _Job:
    """What the workers of one copy share."""

    link: Link
    snapshot: ExportedSnapshot
    lock: sql.Composed
    keys: list[Key] | None
    work: deque[_Work]
    throttle: Callable[[], Awaitable[None]] | None
    pace: _Pace
    on_progress: Callable[[Copied], None] | None
    lists: dict[int, str] = field(default_factory=dict)

    async def worker(self, number: int, psql: Path | None) -> None:
        """Copy chunks until there are none left."""
        async with AsyncExitStack() as stack:
            sink = await self.link.open_sink("copy")
            stack.push_async_callback(sink.close)
            await sink.execute("SET client_encoding = 'UTF8'")
            reader = await open_reader(self.link, "copy", psql=psql)
            stack.push_async_callback(reader.close)
            await take_snapshot(reader, self.snapshot.name)
            # At once: later it could stand in a queue behind somebody who waits for the lock of the plan above.
            await reader.run(self.lock)
            # A chunk is read by its place: a parallel plan would read the whole table for each.
            for setting in ("max_parallel_workers_per_gather = 0", "enable_seqscan = off"):
                await reader.run(sql.SQL("SET LOCAL {}").format(sql.SQL(setting)))
            while True:
                if self.throttle is not None:
                    await self.throttle()
                if not self.work:
                    return
                item = self.work.popleft()
                await self._chunk(number, reader, sink, item)

    def _listed(self, parts: int) -> str | None:
        if self.keys is None:
            return None
        if parts not in self.lists:
            self.lists[parts] = key_list(self.keys, parts)
        return self.lists[parts]

    async def _chunk(self, number: int, reader: Reader, sink: AsyncConnection[Any], item: _Work) -> None:
        table, way = item.table, item.table.way
        sieve, size = way.sieve(self.link), 0
        query = way.read(item.part, item.chunk.condition(), self._listed(len(way.shape.table.key)))
        async with writing_rows(sink, self.link, number):
            cursor = sink.cursor()
            async with cursor.copy(way.write()) as copy, aclosing(blocks_of(self.link, reader, query)) as blocks:
                async for block in blocks:
                    if data := sieve.feed(block):
                        await self.pace.spend(len(data))
                        await copy.write(data)
                        size += len(data)
                if data := sieve.finish():
                    await copy.write(data)
                    size += len(data)
        table.rows += cursor.rowcount
        table.bytes += size
        table.chunks_done += 1
        if table.chunks_done == table.chunks_total:
            await self.whole(sink, table)
        else:
            self._tell(table)

    async def whole(self, sink: AsyncConnection[Any], table: _Table) -> None:
        """Every chunk of the table has committed."""
        await write_down(sink, self.link.runner, self.link.number, table.name, self.snapshot.lsn, table.rows)
        self._tell(table)

    def _tell(self, table: _Table) -> None:
        if self.on_progress is not None:
            fraction = table.chunks_done / table.chunks_total if table.chunks_total else 1.0
            self.on_progress(Copied(table.name, table.rows, table.bytes, fraction))
