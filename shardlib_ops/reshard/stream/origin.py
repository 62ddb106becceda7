"""What a stream asks of its origin before it starts: the slot for itself, and the tables as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection

from shardlib_ops.reshard.control import claimed
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.stream.faults import SchemaChanged, SlotLost
from shardlib_ops.reshard.stream.slot import slot_state

__all__ = ["columns_of", "take_slot"]

_FREED_MS: Final = 5_000


async def take_slot(origin: AsyncConnection[Any], link: Link) -> int:
    """End whoever reads the leg's slot now, an earlier run of ours.

    Returns:
        LSN: what the slot was told last.

    Raises:
        SlotLost: it is not there, or no more changes come from it.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job: then the reader is not ours to end.
    """
    async with origin.transaction():
        await origin.execute(claimed(link.runner))
        state = await slot_state(origin, link.slot)
        if state is not None and state.active_pid is not None:
            await origin.execute("SELECT pg_terminate_backend(%s, %s)", (state.active_pid, _FREED_MS))
    if state is None or state.lost is not None:
        why = "it is not there" if state is None else state.lost
        raise SlotLost(
            f"slot {link.slot!r} of shard {link.origin.name!r} cannot be read: {why}", "the copy has to start anew"
        )
    return state.confirmed


async def columns_of(
    conn: AsyncConnection[Any], shapes: Sequence[TableShape], shard: str
) -> dict[tuple[str, str], list[tuple[str, int, int]]]:
    """The stored columns of the origin's tables, as the stream announces them; checked against the shapes."""
    found: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for shape in shapes:
        place = (shape.table.schema or "public", shape.table.name)
        rows = await (await conn.execute(_COLUMNS, (place[1], place[0]))).fetchall()
        if {name: kind for name, kind, _, _ in rows} != {column.name: column.type for column in shape.stored}:
            raise SchemaChanged(
                f"the columns of table {shape.table.fullname!r} of shard {shard!r} are not those that the job started"
                " with",
                "cancel the job and start it again with the new tables, or undo the change and run it again",
            )
        found[place] = [(name, oid, modifier) for name, _, oid, modifier in rows]
    return found


_COLUMNS: Final = """
    SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.atttypid, a.atttypmod
      FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
     WHERE c.relname = %s AND c.relnamespace = to_regnamespace(quote_ident(%s)) AND c.relkind IN ('r', 'p')
       AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
     ORDER BY a.attnum
"""
