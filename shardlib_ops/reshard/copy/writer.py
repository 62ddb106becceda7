"""What writes moved rows into the sink: transactions that the shard itself refuses to a runner that lost its job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from psycopg import AsyncConnection

from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import claimed
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.room import no_room

__all__ = ["forget_places", "write_down", "writing_rows"]


@asynccontextmanager
async def writing_rows(conn: AsyncConnection[Any], link: Link, worker: int) -> AsyncIterator[None]:
    """A transaction that may write rows of the leg at its sink.

    It touches a row of `shardlib.position`, by which guards of moved rows know the resharder. It is not the leg's own:
    the workers would wait for each other until the end of their transactions.

    What it writes counts only when `write_down` has committed, so it need not be on the disk before.

    Raises:
        Lost: the sink's disk is full.
    """
    with no_room(link.sink.name):
        async with _writing(conn, link, worker):
            yield


@asynccontextmanager
async def _writing(conn: AsyncConnection[Any], link: Link, worker: int) -> AsyncIterator[None]:
    async with conn.transaction():
        await conn.execute(claimed(link.runner))
        await conn.execute(
            "INSERT INTO shardlib.position AS p VALUES (%s, %s, %s, '0/0')"
            " ON CONFLICT (job, leg, direction) DO UPDATE SET lsn = p.lsn",
            (link.runner.job, _place(link, worker), link.direction),
        )
        await conn.execute("SET LOCAL session_replication_role = replica")
        await conn.execute("SET LOCAL synchronous_commit = off")
        yield


def _place(link: Link, worker: int) -> int:
    # Legs count from 1, so that these are nobody's position in a stream.
    return -(link.number * 1000 + worker)


async def forget_places(conn: AsyncConnection[Any], link: Link, workers: int) -> None:
    """Remove the rows that `writing_rows` touched."""
    async with conn.transaction():
        await conn.execute(claimed(link.runner))
        await conn.execute(
            "DELETE FROM shardlib.position WHERE job = %s AND direction = %s AND leg = ANY(%s)",
            (link.runner.job, link.direction, [_place(link, worker) for worker in range(workers)]),
        )


async def write_down(conn: AsyncConnection[Any], runner: Runner, leg: int, table: str, lsn: str, rows: int) -> None:
    """Write down that a table is whole under the snapshot of `lsn`.

    Its commit is on the disk when this returns, and with it all chunks, which committed before it on the same server.
    """
    async with conn.transaction():
        await conn.execute(claimed(runner))
        await conn.execute("SET LOCAL synchronous_commit = on")
        await conn.execute(
            "INSERT INTO shardlib.copied (job, leg, table_name, lsn, rows) VALUES (%s, %s, %s, %s, %s)",
            (runner.job, leg, table, lsn, rows),
        )
