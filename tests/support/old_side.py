"""One shard whose rows have moved away, with tables of its own: what the tests of guard and cleanup start from."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from shardlib.dsn import Dsn
from shardlib.ring import TokenRange
from shardlib.topology import Shard, Table
from shardlib_ops import LocalCluster
from shardlib_ops.reshard import control
from shardlib_ops.reshard.connect import Runner, connect
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import TableShape, read_shapes

_jobs = itertools.count(1)

# Both ends of the tokens, and a part between: what stays is in two pieces.
RANGES = (
    TokenRange(0, (1 << 61) - 1),
    TokenRange(1 << 62, (1 << 63) + (1 << 61)),
    TokenRange((1 << 64) - (1 << 61), (1 << 64) - 1),
)


class OldSide:
    """A job's old side. `conn` is the runner's connection, `look` the test's."""

    def __init__(
        self, cluster: LocalCluster, conn: AsyncConnection[Any], look: AsyncConnection[Any], tables: Sequence[Table],
        job: int, kind: str,
    ) -> None:  # fmt: skip
        self.dsn = cluster.servers[0].dsn
        here = Shard("s1", "shard-01", Dsn(self.dsn))
        other = Shard("s2", "shard-02", Dsn(self.dsn))
        self.conn, self.look = conn, look
        self.job, self.runner, self.tables = job, Runner(job, 1), tuple(tables)
        self.shapes: tuple[TableShape, ...] = ()
        self.link = Link(
            runner=self.runner, number=1, direction="reverse", origin=other, sink=here, ranges=RANGES,
            hash_function=kind, tables=self.tables,
        )  # fmt: skip

    def linked(self, token: int) -> Link:
        """The link of another runner of the job."""
        return replace(self.link, runner=Runner(self.job, token))

    def keys(self, moving: bool, stem: str = "k") -> Iterator[str]:
        return (key for n in itertools.count() if self.link.moves((key := f"{stem}{n}").encode()) is moving)

    def some(self, moving: bool, count: int, stem: str = "k") -> list[str]:
        return list(itertools.islice(self.keys(moving, stem), count))

    def numbers(self, moving: bool, count: int) -> list[int]:
        return list(itertools.islice((n for n in itertools.count() if self.link.moves(b"%d" % n) is moving), count))

    async def fetch(self, query: str, params: Sequence[Any] | None = None) -> list[Any]:
        return list(await (await self.look.execute(query.encode(), params)).fetchall())

    async def know(self, keys: Sequence[tuple[str, ...]]) -> None:
        """These keys are in the job's key table."""
        async with self.conn.cursor() as cursor:
            await cursor.executemany(
                sql.SQL("INSERT INTO {} (k, more) VALUES (%s, %s) ON CONFLICT DO NOTHING").format(
                    control.keys_table(self.job)
                ),
                [(key[0], list(key[1:])) for key in keys],
            )

    @asynccontextmanager
    async def client(self, **more: Any) -> AsyncIterator[AsyncConnection[Any]]:
        """Somebody who has never heard of shardlib."""
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True, **more) as conn:
            yield conn


@asynccontextmanager
async def old_side(
    cluster: LocalCluster, ddl: str, *tables: tuple[str, Sequence[str]], kind: str = "murmur3"
) -> AsyncIterator[OldSide]:
    job = next(_jobs)
    declared = [Table(name, tuple(key)) for name, key in tables]
    conn = await connect(
        Dsn(cluster.servers[0].dsn), shard="shard-01", application=Runner(job, 1).application("control")
    )
    async with conn, await AsyncConnection.connect(cluster.servers[0].dsn, autocommit=True) as look:
        await look.execute(ddl.encode())
        side = OldSide(cluster, conn, look, declared, job, kind)
        side.shapes = await read_shapes(conn, declared)
        await control.claim(conn, side.runner)
        await control.create_keys(conn, side.runner)
        await control.start_position(conn, side.runner, 1, "reverse", "0/1")
        try:
            yield side
        finally:
            # One that a failed test left would hold up the next.
            for (gid,) in await side.fetch("SELECT gid FROM pg_prepared_xacts"):
                await look.execute(sql.SQL("ROLLBACK PREPARED {}").format(gid))
