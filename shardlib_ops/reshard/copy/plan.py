"""What is to be copied: tables, the places where their rows lie, and in which way each goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib.errors import InvalidTopology
from shardlib_ops.reshard.copy.chunks import binary_alike
from shardlib_ops.reshard.copy.keys import Key, key_texts
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import TableShape

__all__ = ["KEYS_MAX", "Part", "Way", "copied_tables", "key_settings", "measure", "way_of"]

KEYS_MAX: Final = 100_000
"""Up to how many distinct keys the server filters by a list of them; more of them cost it more than hashing here."""

_SETTING: Final = "shardlib.moving_"


@dataclass(frozen=True, slots=True)
class Part:
    """A table, or a partition of one, that stores rows.

    Attributes:
        name: quoted, with its schema.
        blocks: its length.
        total_bytes: with what is stored beside it.
        block_bytes: of the server.
    """

    name: sql.Identifier
    blocks: int
    total_bytes: int
    block_bytes: int


_PARTS: Final = """
    SELECT n.nspname::text, c.relname::text,
           pg_relation_size(c.oid) / current_setting('block_size')::int,
           pg_table_size(c.oid), current_setting('block_size')::int
      FROM (SELECT relid FROM pg_partition_tree(%s) WHERE isleaf UNION SELECT %s::oid::regclass) x(relid)
      JOIN pg_class c ON c.oid = x.relid AND c.relkind = 'r'
      JOIN pg_namespace n ON n.oid = c.relnamespace
     ORDER BY 1, 2
"""


async def measure(conn: AsyncConnection[Any], shape: TableShape) -> list[Part]:
    """Where the rows of a table lie."""
    found = await conn.execute(_PARTS, (shape.oid, shape.oid))
    return [
        Part(sql.Identifier(schema, name), int(blocks), int(size), int(block))
        for schema, name, blocks, size, block in await found.fetchall()
    ]


async def copied_tables(conn: AsyncConnection[Any], link: Link) -> set[str]:
    """The tables of a leg that are written down as copied, by their full names."""
    found = await conn.execute(
        "SELECT table_name FROM shardlib.copied WHERE job = %s AND leg = %s", (link.runner.job, link.number)
    )
    return {str(name) for (name,) in await found.fetchall()}


@dataclass(frozen=True, slots=True)
class Way:
    """How the rows of one table go.

    Attributes:
        shape: the table at the origin.
        listed: the server filters by a list of keys; else lines are filtered here by their tokens.
        binary: in the binary form of COPY.
    """

    shape: TableShape
    listed: bool
    binary: bool

    @property
    def columns(self) -> list[str]:
        """The stored columns, the shard key first."""
        key = self.shape.table.key
        return [*key, *(column.name for column in self.shape.stored if column.name not in key)]

    def read(self, part: Part, condition: str) -> sql.Composed:
        """COPY of the rows of a part that meet a condition: those that move, or all if they are not `listed`."""
        columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in self.columns)
        source = sql.SQL("ONLY {} AS t").format(part.name)
        if self.listed:
            texts = key_texts(self.shape)
            lists = sql.SQL(", ").join(
                sql.SQL("current_setting({})::text[]").format(f"{_SETTING}{number}") for number in range(len(texts))
            )
            names = [sql.Identifier(f"k{number}") for number in range(len(texts))]
            source += sql.SQL(" JOIN unnest({}) AS k({}) ON {}").format(
                lists,
                sql.SQL(", ").join(names),
                sql.SQL(" AND ").join(
                    sql.SQL('{} COLLATE "C" = k.{}').format(text, name) for text, name in zip(texts, names, strict=True)
                ),
            )
        return sql.SQL("COPY (SELECT {} FROM {} WHERE {}) TO STDOUT{}").format(
            columns,
            source,
            sql.SQL(condition),
            sql.SQL(" WITH (FORMAT binary)" if self.binary else ""),
        )

    def write(self) -> sql.Composed:
        """COPY into the table at the sink."""
        return sql.SQL("COPY {} ({}) FROM STDIN WITH (ENCODING 'UTF8'{})").format(
            self.shape.name,
            sql.SQL(", ").join(map(sql.Identifier, self.columns)),
            sql.SQL(", FORMAT binary" if self.binary else ""),
        )


def way_of(origin: TableShape, sink: TableShape, *, listed: bool, same_version: bool) -> Way:
    """How the rows of a table go.

    Raises:
        InvalidTopology: the sink lacks a column, or computes it.
    """
    there = {column.name for column in sink.stored}
    if missing := [column.name for column in origin.stored if column.name not in there]:
        raise InvalidTopology(
            f"table {origin.table.fullname!r} has no stored column {missing[0]!r} on the target",
            "bring the table to the same columns on both shards",
        )
    return Way(origin, listed, listed and same_version and binary_alike(origin.stored, sink.stored))


def key_settings(keys: Sequence[Key], parts: int) -> list[sql.Composed]:
    """Statements that give a session the list of keys: as settings, so that it need not write anything."""
    columns = [[k for k, _ in keys], *([more[number] for _, more in keys] for number in range(parts - 1))]
    return [
        sql.SQL("SELECT set_config({}, {}, false)").format(f"{_SETTING}{number}", _array(column))
        for number, column in enumerate(columns)
    ]


def _array(texts: Sequence[str]) -> str:
    quoted = (text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return "{" + ",".join(f'"{text}"' for text in quoted) + "}"
