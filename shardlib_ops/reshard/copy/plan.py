"""What is to be copied: tables, the places where their rows lie, and in which way each goes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib.errors import InvalidTopology
from shardlib_ops.reshard.copy.keys import Key
from shardlib_ops.reshard.copy.sieve import BinarySieve, Pass, Sieve, TextSieve
from shardlib_ops.reshard.lines import binary_alike
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.rows import TableShape

__all__ = ["KEYS_MAX", "Part", "Way", "copied_tables", "key_list", "measure", "way_of"]

KEYS_MAX: Final = 50_000
"""Up to how many distinct keys the server filters by a list of them; more of them cost it more than hashing here."""

_BINARY_IS_TEXT: Final = ("text", "character varying")


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
        listed: the server picks the rows by a list of keys; else all are read, and sieved here by their tokens.
        binary: in the binary form of COPY.
        mark: 16 random bytes for the sieve.
    """

    shape: TableShape
    listed: bool
    binary: bool
    mark: bytes

    @property
    def columns(self) -> list[str]:
        """The stored columns, the shard key first."""
        key = self.shape.table.key
        return [*key, *(column.name for column in self.shape.stored if column.name not in key)]

    @property
    def separate_key(self) -> bool:
        """Whether the key must be sent in a column of its own, for a sieve of binary rows."""
        first = self.shape.stored[self.shape.key_at[0]]
        return len(self.shape.table.key) > 1 or first.base not in _BINARY_IS_TEXT

    def sieve(self, link: Link) -> Sieve:
        """A new one, for what `read` gives."""
        if self.listed:
            return Pass()
        if not self.binary:
            return TextSieve(link.ranges, link.hash_function, len(self.shape.table.key))
        return BinarySieve(
            self.mark,
            len(self.columns),
            separate_key=self.separate_key,
            ranges=link.ranges,
            hash_function=link.hash_function,
        )

    def read(self, part: Part, condition: str, keys: str | None) -> sql.Composed:
        """COPY of the rows of a part that meet a condition; of those, if `listed`, the rows with one of `keys`.

        Args:
            part: of the table.
            condition: SQL about `t`.
            keys: see `key_list`.
        """
        names: list[sql.Composable] = [sql.Identifier("t", name) for name in self.columns]
        where = sql.SQL("{}").format(sql.SQL(condition))
        if self.listed:
            # A constant array, which the server looks keys up in by hashing: faster than a join, and nothing that
            # would have to be written into the source first.
            assert keys is not None  # noqa: S101 - so it was decided
            where += sql.SQL(' AND ({}) COLLATE "C" = ANY ({}::text[])').format(_listed(self.shape), keys)
        elif self.binary:
            if self.separate_key:
                texts = (sql.SQL("convert_to({}, 'UTF8')").format(text) for text in self.shape.key_texts())
                names.insert(0, sql.SQL(r" || '\x00'::bytea || ").join(texts))
            names.insert(0, sql.SQL("{}::bytea").format(rf"\x{self.mark.hex()}"))
        return sql.SQL("COPY (SELECT {} FROM ONLY {} AS t WHERE {}) TO STDOUT{}").format(
            sql.SQL(", ").join(names), part.name, where, sql.SQL(" WITH (FORMAT binary)" if self.binary else "")
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
    return Way(origin, listed, same_version and binary_alike(origin.stored, sink.stored), secrets.token_bytes(16))


def _listed(shape: TableShape) -> sql.Composed:
    """SQL of a row's key as it stands in a list of keys."""
    texts = shape.key_texts()
    if len(texts) == 1:
        return sql.Composed(texts)
    return sql.SQL(" || ").join(sql.SQL("length({0}) || ':' || {0}").format(text) for text in texts)


def key_list(keys: Sequence[Key], parts: int) -> str:
    """An array of the keys that have so many parts, as PostgreSQL reads it; see `Way.read`."""
    texts = [k if parts == 1 else "".join(f"{len(part)}:{part}" for part in (k, *more)) for k, more in keys
             if len(more) == parts - 1]  # fmt: skip
    quoted = (text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return "{" + ",".join(f'"{text}"' for text in quoted) + "}"
