"""Which keys of some token ranges have rows in a database already."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib.key.composite import join_parts
from shardlib_ops.reshard.control import keys_table
from shardlib_ops.reshard.rows import TableShape

__all__ = ["SHOWN", "keys_present"]

SHOWN: Final = 5
"""So many keys are named to the operator."""
_BATCH: Final = 5_000


async def keys_present(
    conn: AsyncConnection[Any],
    shapes: Sequence[TableShape],
    moves: Callable[[bytes], bool],
    *,
    job: int,
    limit: int = SHOWN,
) -> list[tuple[str, tuple[str, ...]]]:
    """Keys whose rows would be among those that a job brings: (table, key parts).

    Keys in the job's own key table, if it is there, are the job's and are left out. Reads each table's keys once,
    until it has found `limit` of them.

    Args:
        conn: where to look; not in a transaction.
        shapes: the sharded tables there.
        moves: whether key bytes are of the ranges.
        job: the job's number.
        limit: how many to look for.
    """
    name = keys_table(job)
    row = await (await conn.execute("SELECT to_regclass(%s) IS NOT NULL", (name.as_string(),))).fetchone()
    ours = name if row is not None and row[0] else None
    found: list[tuple[str, tuple[str, ...]]] = []
    for shape in shapes:
        async for parts in _keys(conn, shape, ours):
            if moves(join_parts([part.encode() for part in parts])):
                found.append((shape.table.fullname, parts))
                if len(found) >= limit:
                    return found
    return found


async def _keys(
    conn: AsyncConnection[Any], shape: TableShape, ours: sql.Identifier | None
) -> AsyncIterator[tuple[str, ...]]:
    first, rest = shape.key_parts()
    query = sql.SQL("SELECT DISTINCT {first}, {rest} FROM {table} AS t").format(
        first=first, rest=rest, table=shape.name
    )
    if ours is not None:
        query += sql.SQL(" WHERE NOT EXISTS (SELECT FROM {ours} AS k WHERE {same})").format(
            ours=ours, same=shape.matches()
        )
    async with conn.transaction(), conn.cursor(name="shardlib_keys") as cursor:
        await cursor.execute(query)
        while rows := await cursor.fetchmany(_BATCH):
            for one, more in rows:
                if one is not None and None not in more:
                    yield (one, *more)
