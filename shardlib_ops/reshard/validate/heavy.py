"""Keys with too many rows to be compared whole in the time there is: found by counting no further than that many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.validate.digest import Key, KeyList, listed
from shardlib_ops.reshard.validate.sides import AT_ONCE

__all__ = ["Weight", "by_index", "weigh"]

_SMALL_BYTES: Final = 16 << 20
_INDEXED: Final = frozenset({"text", "character varying", "smallint", "integer", "bigint", "uuid"})


@dataclass(frozen=True, slots=True)
class Weight:
    """What comparing some keys in one table takes.

    Attributes:
        indexed: whether an index leads from a key to its rows.
        heavy: those of the keys that have too many rows.
    """

    indexed: bool
    heavy: frozenset[Key]


async def by_index(conn: AsyncConnection[Any], on: bool) -> None:
    """In this transaction, look rows up through an index, whatever the statistics say of the keys on average."""
    value = "off" if on else "on"
    await conn.execute(f"SET LOCAL enable_seqscan = {value}".encode())
    await conn.execute(f"SET LOCAL enable_hashjoin = {value}".encode())
    await conn.execute(f"SET LOCAL enable_mergejoin = {value}".encode())


async def weigh(
    conn: AsyncConnection[Any], shapes: Sequence[TableShape], keys: KeyList, *, rows: int
) -> Mapping[str, Weight]:
    """Which keys have too many rows, by the table's full name.

    Args:
        conn: in a transaction.
        shapes: the tables, as they are there.
        keys: which are to be compared.
        rows: that may be compared in each table, all keys together: of one key, no more than its even share.
    """
    share = max(1, rows // max(1, len(keys)))
    found: dict[str, Weight] = {}
    for shape in shapes:
        size, indexed = await _facts(conn, shape)
        if not indexed:
            # To find any key's rows is to read all of the table.
            found[shape.table.fullname] = Weight(False, frozenset() if size <= _SMALL_BYTES else frozenset(keys))
            continue
        await by_index(conn, True)
        await conn.execute(b"SET LOCAL enable_bitmapscan = off")  # it would not stop at the limit
        heavy: set[Key] = set()
        for at in range(0, len(keys), AT_ONCE):
            relation, same, parameters = listed(keys[at : at + AT_ONCE]).of(shape)
            query = sql.SQL(
                "SELECT k.k, k.more FROM {} WHERE"
                " (SELECT count(*) FROM (SELECT FROM {} AS t WHERE {} LIMIT {}) AS x) > {}"
            ).format(relation, shape.name, same, share + 1, share)
            cursor = await conn.execute(query, parameters)
            heavy.update((k, tuple(more)) for k, more in await cursor.fetchall())
        await conn.execute(b"SET LOCAL enable_bitmapscan = on")
        await by_index(conn, False)
        found[shape.table.fullname] = Weight(True, frozenset(heavy))
    return found


async def _facts(conn: AsyncConnection[Any], shape: TableShape) -> tuple[int, bool]:
    """(bytes of a table, partitions included; whether an index begins with its shard key)."""
    first = shape.table.key[0]
    row = await (await conn.execute(_FACTS, {"oid": shape.oid, "column": first})).fetchone()
    assert row is not None  # noqa: S101 - a SELECT of two expressions
    base = next(column.base for column in shape.columns if column.name == first)
    return int(row[0]), bool(row[1]) and base in _INDEXED


# Keys are compared as the default collation does: an index of another one does not lead to them.
_FACTS: Final = """
    SELECT coalesce((SELECT sum(pg_relation_size(relid)) FROM pg_partition_tree(%(oid)s::oid)),
                    pg_relation_size(%(oid)s::oid)),
           EXISTS (SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
                     JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                    WHERE i.indrelid = %(oid)s::oid AND a.attname = %(column)s AND m.amname = 'btree'
                      AND i.indisvalid AND i.indpred IS NULL
                      AND i.indcollation[0] IN (0, 'pg_catalog."default"'::regcollation))
"""
