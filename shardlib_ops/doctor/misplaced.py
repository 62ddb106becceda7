"""Rows on a shard whose key another shard owns: the application does not see them. Looked for by sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib.key.composite import join_parts
from shardlib.ring import merge_ranges
from shardlib.ring.ranges import ranges_contain
from shardlib.token import hash_of
from shardlib.topology import Shard
from shardlib_ops.doctor.finding import Finding, Severity
from shardlib_ops.doctor.view import View
from shardlib_ops.reshard.rows import TableShape, read_shapes
from shardlib_ops.reshard.shape import present

__all__ = ["misplaced"]

_SHOWN: Final = 3
_WHOLE_TIMES: Final = 4
"""A table of so many samples is read from its start: pages drawn at random would give too few rows of it."""


async def misplaced(conn: AsyncConnection[Any], shard: Shard, view: View) -> list[Finding]:
    """Whether the keys of some rows of each table belong here. The token is computed anew from the key's text."""
    topology, found = view.topology, []
    token = hash_of(topology.hash_function)
    # Copies that a job brings, or has not deleted yet, are where they should be.
    moving = merge_ranges([part for job in view.jobs_of(shard.id) for leg in job.legs for part in leg.ranges])
    sharded = [table for table in topology.tables if not table.reference]
    for shape in await read_shapes(conn, await present(conn, sharded)):
        looked, wrong = 0, dict[str, str]()
        rows = await _sampled(conn, shape, view.limits.sample_rows)
        for row in rows:
            parts = [part for part in row if part is not None]
            if len(parts) < len(row):
                continue
            looked += 1
            place = token(join_parts([part.encode() for part in parts]))
            owner = topology.ring.owner_of(place)
            if owner != shard.id and not ranges_contain(moving, place):
                wrong[" / ".join(parts)] = topology.shard_by_id(owner).name
        if wrong:
            shown = ", ".join(f"{key!r} (of shard {name!r})" for key, name in list(wrong.items())[:_SHOWN])
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            found.append(
                Finding(
                    Severity.ERROR,
                    "misplaced",
                    f"shard {shard.name!r}",
                    f"of {looked} rows of table {shape.table.fullname!r} that were looked at, some have keys "
                    f"that other shards own: {shown}{more}",
                    "the application does not see them: find out who wrote past shardlib, then bring them to their "
                    "shard by hand, or delete them here",
                )
            )
    return found


async def _sampled(conn: AsyncConnection[Any], shape: TableShape, wanted: int) -> Sequence[tuple[str | None, ...]]:
    row = await (await conn.execute("SELECT reltuples::float8 FROM pg_class WHERE oid = %s", (shape.oid,))).fetchone()
    estimate = 0.0 if row is None else float(row[0])
    keys = sql.SQL(", ").join(shape.key_texts())
    sample: sql.Composable = sql.SQL("")
    if estimate > wanted * _WHOLE_TIMES:
        sample = sql.SQL(" TABLESAMPLE SYSTEM ({})").format(sql.Literal(min(100.0, 200.0 * wanted / estimate)))
    query = sql.SQL("SELECT {} FROM {} AS t{} LIMIT {}").format(keys, shape.name, sample, sql.Literal(wanted))
    return await (await conn.execute(query)).fetchall()
