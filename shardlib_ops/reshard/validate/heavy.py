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
"""A table that is read as a whole, if there is no other way."""
_TINY_BYTES: Final = 1 << 20
"""A table in which no key is worth counting."""
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


async def by_index(conn: AsyncConnection[Any], on: bool, *, stop: bool = False) -> None:
    """In this transaction, look rows up through an index, whatever the statistics say of the keys on average.

    Args:
        conn: in a transaction.
        on: or as the server likes.
        stop: not through a bitmap either, which reads all before it gives the first.
    """
    value = "off" if on else "on"
    settings = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin")
    texts = [f"set_config('{name}', '{value}', true)" for name in settings]
    texts.append(f"set_config('enable_bitmapscan', '{'off' if stop else 'on'}', true)")
    await conn.execute(f"SELECT {', '.join(texts)}".encode())


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
    facts = await _facts(conn, shapes)
    await by_index(conn, True, stop=True)
    for shape, (size, indexed) in zip(shapes, facts, strict=True):
        heavy: set[Key] = set()
        if not indexed:
            # To find any key's rows is to read all of the table.
            heavy.update(keys if size > _SMALL_BYTES else ())
        elif size > _TINY_BYTES:
            for at in range(0, len(keys), AT_ONCE):
                heavy.update(await _more_than(conn, shape, keys[at : at + AT_ONCE], share))
        found[shape.table.fullname] = Weight(indexed, frozenset(heavy))
    await by_index(conn, False)
    return found


async def _more_than(conn: AsyncConnection[Any], shape: TableShape, keys: KeyList, count: int) -> list[Key]:
    """Those of the keys that have more rows than so many; no more of a key are counted."""
    relation, same, parameters = listed(keys).of(shape)
    query = sql.SQL(
        "SELECT k.k, k.more FROM {} WHERE (SELECT count(*) FROM (SELECT FROM {} AS t WHERE {} LIMIT {}) AS x) > {}"
    ).format(relation, shape.name, same, count + 1, count)
    return [(k, tuple(more)) for k, more in await (await conn.execute(query, parameters)).fetchall()]


async def _facts(conn: AsyncConnection[Any], shapes: Sequence[TableShape]) -> list[tuple[int, bool]]:
    """(bytes of a table, partitions included; whether an index begins with its shard key), for each."""
    firsts = [shape.table.key[0] for shape in shapes]
    cursor = await conn.execute(_FACTS, ([shape.oid for shape in shapes], firsts))
    found = []
    for shape, first, (size, leads) in zip(shapes, firsts, await cursor.fetchall(), strict=True):
        base = next(column.base for column in shape.columns if column.name == first)
        found.append((int(size), bool(leads) and base in _INDEXED))
    return found


# Keys are compared as the default collation does: an index of another one does not lead to them.
_FACTS: Final = """
    SELECT coalesce((SELECT sum(pg_relation_size(relid)) FROM pg_partition_tree(x.oid)), pg_relation_size(x.oid)),
           EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
                     JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                    WHERE i.indrelid = x.oid AND a.attname = x.name AND m.amname = 'btree'
                      AND i.indisvalid AND i.indpred IS NULL
                      AND i.indcollation[0] IN (0, 'pg_catalog."default"'::regcollation))
      FROM unnest(%s::oid[], %s::text[]) WITH ORDINALITY AS x (oid, name, n) ORDER BY x.n
"""
