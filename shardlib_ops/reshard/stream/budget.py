"""A slot keeps WAL until its reader has it: watched, so that a job gives its slot up before the disk is full."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NoReturn

import psycopg
from psycopg import AsyncConnection

from shardlib.errors import ShardlibError
from shardlib_ops.reshard.connect import is_lost
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.stream.faults import SlotOverBudget
from shardlib_ops.reshard.stream.slot import SlotState, slot_state

__all__ = ["MAX_SLOT_WAL", "watch_slot"]

MAX_SLOT_WAL: Final = 16 << 30
"""WAL that a server may keep for a job's slot, unless said otherwise."""

_LOOK_S: Final = 1.0


async def watch_slot(
    link: Link, *, max_bytes: int | None, seen: Callable[[SlotState | None], None], look_s: float = _LOOK_S
) -> NoReturn:
    """Look at the slot of a leg again and again, on a connection of its own, until cancelled.

    While the server does not answer nothing is known; the stream, or the copy, finds out for itself.

    Args:
        link: the leg and the direction.
        max_bytes: WAL that the origin may keep for the slot; None: any.
        seen: told how the slot is each time; None if there is none, or it cannot be seen.
        look_s: seconds between two looks.

    Raises:
        SlotOverBudget: it keeps more.
    """
    conn: AsyncConnection[Any] | None = None
    try:
        while True:
            state = None
            try:
                if conn is None:
                    conn = await link.open_origin("slot watch")
                state = await slot_state(conn, link.slot)
            except (psycopg.Error, ShardlibError, OSError) as error:
                if not (is_lost(error) or isinstance(error, OSError)):
                    raise
                if conn is not None:
                    await conn.close()
                conn = None
            seen(state)
            if max_bytes is not None and state is not None and state.retained_bytes > max_bytes:
                raise SlotOverBudget(
                    link.origin.name, link.slot, link.number, link.direction, state.retained_bytes, max_bytes
                )
            await asyncio.sleep(look_s)
    finally:
        seen(None)
        if conn is not None:
            await conn.close()
