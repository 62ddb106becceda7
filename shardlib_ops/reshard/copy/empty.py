"""What a killed runner left half copied goes, before it is copied anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib_ops.reshard.copy.chunks import chunks_of
from shardlib_ops.reshard.copy.keys import Key, leg_keys
from shardlib_ops.reshard.copy.plan import copied_tables, measure
from shardlib_ops.reshard.copy.writer import forget_places, writing_rows
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import TableShape

__all__ = ["empty_half_copied"]

_BATCH_BYTES: Final = 32 << 20
_KEYS: Final = "shardlib_leg_keys"


async def empty_half_copied(link: Link, shapes_sink: Sequence[TableShape]) -> None:
    """Delete the leg's rows at its sink from the tables that are not written down as copied; idempotent.

    Every row that a copy wrote has its key in the key table, which was committed before. Rows of other legs, of other
    jobs and of the shard itself have other keys.

    Args:
        link: the leg, forward.
        shapes_sink: the tables at the sink.

    Raises:
        ShardUnavailable: the sink did not answer.
        psycopg.Error: of the server; SQLSTATE SL001 if a later runner holds the job.
    """
    conn = await link.open_sink("empty")
    try:
        done = await copied_tables(conn, link)
        rest = [shape for shape in shapes_sink if shape.table.fullname not in done]
        keys = await leg_keys(conn, link) if rest else None
        if keys:
            await _load(conn, keys)
            for shape in rest:
                await _empty(conn, link, shape)
            await forget_places(conn, link, workers=1)
    finally:
        await conn.close()


async def _load(conn: AsyncConnection[Any], keys: Sequence[Key]) -> None:
    name = sql.Identifier(_KEYS)
    await conn.execute(sql.SQL("CREATE TEMP TABLE {} (k text NOT NULL, more text[] NOT NULL)").format(name))
    async with conn.cursor().copy(sql.SQL("COPY pg_temp.{} FROM STDIN").format(name)) as copy:
        for k, more in keys:
            await copy.write_row((k, list(more)))
    await conn.execute(sql.SQL("ANALYZE pg_temp.{}").format(name))


async def _empty(conn: AsyncConnection[Any], link: Link, shape: TableShape) -> None:
    for part in await measure(conn, shape):
        statement = sql.SQL("DELETE FROM ONLY {} AS t USING pg_temp.{} AS k WHERE {} AND {}")
        for chunk in chunks_of(part.blocks, part.total_bytes, _BATCH_BYTES, block_bytes=part.block_bytes):
            async with writing_rows(conn, link, 0):
                # In each batch every key is looked for: a nested loop over them is what must not happen.
                await conn.execute("SET LOCAL enable_nestloop = off")
                await conn.execute(
                    statement.format(
                        part.name,
                        sql.Identifier(_KEYS),
                        sql.SQL(chunk.condition()),
                        shape.matches(),
                    )
                )
