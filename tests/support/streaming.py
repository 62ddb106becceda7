"""A leg between the two shards of a cluster, with tables of its own: what the tests of a stream start from."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from shardlib.dsn import Dsn
from shardlib.ring import TokenRange
from shardlib.topology import Shard, Table
from shardlib_ops import LocalCluster
from shardlib_ops.reshard import control
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import read_shapes
from shardlib_ops.reshard.stream import Stream, create_publication, create_slot, drop_publication, drop_slot, lsn_number
from tests.support.versions import TwoServers

_jobs = itertools.count(1)
HALF = (TokenRange(0, (1 << 63) - 1),)


class Rig:
    """Tables on both shards, a slot, a start; `moving` and `staying` give keys of the one and the other half."""

    def __init__(
        self, cluster: LocalCluster | TwoServers, tables: Sequence[Table], ddl: str, ranges: Sequence[TokenRange] = HALF
    ):
        self.job, self.cluster = next(_jobs), cluster
        shards = [
            Shard(f"s{number}", f"shard-{number:02d}", Dsn(server.dsn))
            for number, server in enumerate(cluster.servers[:2], 1)
        ]
        self.link = Link(
            runner=Runner(self.job, 1), number=1, direction="forward", origin=shards[0], sink=shards[1],
            ranges=tuple(ranges), hash_function="murmur3", tables=tuple(tables),
        )  # fmt: skip
        self.ddl, self.tables = ddl, tuple(tables)
        self.a: AsyncConnection[Any]
        self.b: AsyncConnection[Any]
        self.new_keys: list[tuple[str, tuple[str, ...]]] = []

    async def open(self) -> None:
        self.a = await self.connect(0)
        self.b = await self.connect(1)
        for conn in (self.a, self.b):
            await conn.execute(self.ddl.encode())
            await control.claim(conn, self.link.runner)
            await control.create_keys(conn, self.link.runner)
        await create_publication(self.a, self.link.runner, self.tables)
        async with await self.link.open_origin("shapes") as conn:
            self.shapes = await read_shapes(conn, self.tables)
        start = await create_slot(self.link, timeout_s=20)
        await control.start_position(self.b, self.link.runner, 1, "forward", start)

    async def close(self) -> None:
        await drop_slot(self.a, self.link.slot)
        await drop_publication(self.a, self.link.runner)
        await self.a.close()
        await self.b.close()

    async def connect(self, side: int) -> AsyncConnection[Any]:
        shard = self.link.origin if side == 0 else self.link.sink
        return await psycopg.AsyncConnection.connect(shard.primary.reveal(), autocommit=True)

    async def keep(self, keys: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        """What a runner does with new keys."""
        self.new_keys += keys
        async with self.a.cursor() as cursor:
            await cursor.executemany(
                sql.SQL("INSERT INTO {} (k, more) VALUES (%s, %s) ON CONFLICT DO NOTHING").format(
                    control.keys_table(self.job)
                ),
                [(k, list(more)) for k, more in keys],
            )

    def stream(self, **more: Any) -> Stream:
        return Stream(self.link, self.shapes, **{"on_new_keys": self.keep, **more})

    @contextlib.asynccontextmanager
    async def running(self, stream: Stream) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(stream.run())
        try:
            yield task
        finally:
            if not task.done():  # whoever waits for the stream has seen what ended it
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled(), task.exception()

    async def end(self) -> int:
        """Where the origin's WAL ends, on its disk."""
        row = await (await self.a.execute("SELECT pg_current_wal_flush_lsn()::text")).fetchone()
        assert row is not None
        return lsn_number(row[0])

    async def drained(self, stream: Stream, timeout_s: float = 30) -> None:
        await stream.reached(await self.end(), timeout_s=timeout_s)

    def keys(self, moving: bool, stem: str = "k") -> Any:
        """Endless keys of the one half of the tokens."""
        return (key for n in itertools.count() if self.link.moves((key := f"{stem}{n}").encode()) is moving)

    async def rows(self, conn: AsyncConnection[Any], query: str) -> list[Any]:
        return list(await (await conn.execute(query.encode())).fetchall())

    async def moved(self, conn: AsyncConnection[Any], table: str, key: str = "k", columns: str = "*") -> list[str]:
        """The rows of moving keys, as text, sorted."""
        found = await self.rows(conn, f"SELECT {key}::text, ROW(x.*)::text FROM (SELECT {columns} FROM {table}) x")
        return sorted(text for value, text in found if self.link.moves(value.encode()))

    async def assert_same(self, table: str, key: str = "k") -> list[str]:
        left, right = await self.moved(self.a, table, key), await self.moved(self.b, table, key)
        assert left == right
        everything = await self.rows(self.b, f"SELECT count(*) FROM {table}")
        assert everything == [(len(right),)], "rows that do not move have arrived"
        return right

    async def key_rows(self, conn: AsyncConnection[Any]) -> set[str]:
        name = control.keys_table(self.job).as_string()
        return {row[0] for row in await self.rows(conn, f"SELECT k FROM {name}")}
