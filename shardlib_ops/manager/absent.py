"""Whether shard keys have rows: one that has none is often one that was mistyped."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, sql

from shardlib.dsn import scrub
from shardlib.errors import ShardUnavailable
from shardlib.key.composite import SEPARATOR
from shardlib.token import hash_of
from shardlib.topology import Topology
from shardlib_ops.reshard.connect import connect
from shardlib_ops.reshard.rows import TableShape, read_shapes
from shardlib_ops.reshard.shape import present
from shardlib_ops.reshard.together import together

__all__ = ["absent_notes", "keys_without_rows"]

_LOOK_S: Final = 30.0
_SHOWN: Final = 20
"""So many keys are named one by one."""


async def keys_without_rows(topology: Topology, keys: Mapping[bytes, object]) -> list[object]:
    """Those of some keys that no row of any sharded table has, on the shard that owns each.

    Args:
        topology: the present one.
        keys: key bytes -> what the caller calls the key.

    Raises:
        ShardUnavailable: a shard did not answer within 30 s, or refused to.
    """
    token = hash_of(topology.hash_function)
    owned: dict[str, list[bytes]] = {}
    for key in keys:
        owned.setdefault(topology.ring.owner_of(token(key)), []).append(key)
    found = set().union(*await together(_on_shard(topology, shard, part) for shard, part in owned.items()))
    return [value for key, value in keys.items() if key not in found]


def absent_notes(absent: Sequence[object]) -> tuple[str, ...]:
    """What a plan says of keys without rows: one line a key, as far as there is room."""
    shown = [
        f"no row has the key {key!r}: look whether it is spelled right; a key without rows is placed all the same"
        for key in absent[:_SHOWN]
    ]
    more = len(absent) - len(shown)
    return (*shown, *([f"{more} more of the keys have no row either"] if more else ()))


async def _on_shard(topology: Topology, shard_id: str, keys: Sequence[bytes]) -> set[bytes]:
    """Those of the keys that have a row there."""
    shard = topology.shard(shard_id)
    found: set[bytes] = set()
    try:
        async with (
            asyncio.timeout(_LOOK_S),
            await connect(shard.primary, shard=shard.name, application="shardlib check") as conn,
        ):
            # A shard that never got rows may lack tables.
            sharded = [table for table in topology.tables if not table.reference]
            for shape in await read_shapes(conn, await present(conn, sharded)):
                found |= await _in_table(conn, shape, [key for key in keys if key not in found])
    except TimeoutError:
        raise ShardUnavailable(shard.name, f"whether keys have rows was not known within {_LOOK_S:g} s") from None
    except psycopg.Error as error:
        raise ShardUnavailable(shard.name, scrub(str(error).strip(), shard.primary.reveal())) from None
    return found


async def _in_table(conn: AsyncConnection[Any], shape: TableShape, keys: Sequence[bytes]) -> set[bytes]:
    """Those of the keys that a row of this table has.

    The values are compared first, for an index on them, then the texts: 007 is the number 7, and another key.
    """
    texts = shape.key_texts()
    parts = [
        sql.SQL('t.{} = %s AND ({}) COLLATE pg_catalog."default" = %s').format(sql.Identifier(column), text)
        for column, text in zip(shape.table.key, texts, strict=True)
    ]
    query = sql.SQL("SELECT FROM {} AS t WHERE {} LIMIT 1").format(shape.name, sql.SQL(" AND ").join(parts))
    found = set()
    for key in keys:
        values = key.decode().split(SEPARATOR.decode())
        if len(values) != len(parts):
            continue  # a key of more, or fewer, columns
        try:
            rows = await conn.execute(query, [value for value in values for _ in range(2)])
        except (psycopg.DataError, psycopg.errors.UndefinedFunction):
            continue  # no value of the columns' types
        if rows.rowcount:
            found.add(key)
    return found
