"""What a job must know of a table to move its rows: columns, identity, and how a row names its shard key in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib.errors import InvalidTopology
from shardlib.key.sql import key_text
from shardlib.topology import Table

__all__ = ["Column", "Identity", "TableShape", "read_shapes", "same_key"]


class Identity(StrEnum):
    """What the stream tells of a row before it was changed (`REPLICA IDENTITY`)."""

    KEY = "key"
    """The primary key, or a unique index chosen for it."""
    FULL = "full"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Column:
    """A column as PostgreSQL has it.

    Attributes:
        name: unquoted.
        type: `format_type(oid, typmod)`, such as `character varying(20)`.
        base: type without modifier, of a domain its base type, `enum` for an enum; see `shardlib.key.sql`.
        generated: computed by the server, so it is neither copied nor applied.
        not_null: whether NULL is refused.
    """

    name: str
    type: str
    base: str
    generated: bool
    not_null: bool


@dataclass(frozen=True)
class TableShape:
    """A table of the cluster as it is in one database.

    Attributes:
        table: as the catalog knows it.
        oid: of this database alone.
        columns: in their order, without dropped ones, generated ones included.
        primary_key: its columns' names, empty without one.
        identity: what changes tell of the old row.
        identity_columns: names of the columns of the old row that the stream carries (all for `full`).
    """

    table: Table
    oid: int
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    identity: Identity
    identity_columns: tuple[str, ...]

    @cached_property
    def name(self) -> sql.Identifier:
        """The table, quoted and with its schema."""
        return sql.Identifier(self.table.schema or "public", self.table.name)

    @cached_property
    def stored(self) -> tuple[Column, ...]:
        """The columns that hold a value of their own: what is copied and applied."""
        return tuple(column for column in self.columns if not column.generated)

    @cached_property
    def key_at(self) -> tuple[int, ...]:
        """Where the parts of the shard key are among `stored`."""
        names = [column.name for column in self.stored]
        return tuple(names.index(part) for part in self.table.key)

    def key_texts(self, alias: str = "t") -> list[sql.SQL]:
        """SQL of the canonical texts of the parts of a row's key. `alias` is the table's name in the statement."""
        bases = {column.name: column.base for column in self.columns}
        return [sql.SQL(key_text(sql.Identifier(alias, part).as_string(), bases[part])) for part in self.table.key]

    def key_parts(self, alias: str = "t") -> tuple[sql.Composed, sql.Composed]:
        """SQL of the key of a row: (`k`, `more`) of a key table. `alias` is the table's name in the statement."""
        texts = self.key_texts(alias)
        rest = sql.SQL("ARRAY[{}]::text[]").format(sql.SQL(", ").join(texts[1:]))
        return sql.Composed([texts[0]]), rest

    def matches(self, alias: str = "t", keys: str = "k") -> sql.Composed:
        """SQL: the row of `alias` has the key of the key table's row `keys`.

        Compared byte by byte, as the key table's index does, whatever the collation of a column takes as equal.
        """
        first, rest = self.key_parts(alias)
        return same_key(first, rest, keys)

    def column_list(self, alias: str | None = None) -> sql.Composed:
        """The stored columns, quoted, with commas."""
        return sql.SQL(", ").join(
            sql.Identifier(column.name) if alias is None else sql.Identifier(alias, column.name)
            for column in self.stored
        )


def same_key(first: sql.Composable, rest: sql.Composable, keys: str = "k") -> sql.Composed:
    """SQL: these two are the key of the key table's row `keys`. The collation of a database is always deterministic."""
    return sql.SQL(
        '{keys}.k = ({first}) COLLATE pg_catalog."default" AND {keys}.more = ({rest}) COLLATE pg_catalog."default"'
    ).format(keys=sql.Identifier(keys), first=first, rest=rest)


async def read_shapes(conn: AsyncConnection[Any], tables: Sequence[Table]) -> tuple[TableShape, ...]:
    """The shapes of these tables in a database, in the order given.

    Raises:
        InvalidTopology: a table, or a column of its shard key, is not there.
    """
    return tuple([await _read(conn, table) for table in tables])


async def _read(conn: AsyncConnection[Any], table: Table) -> TableShape:
    schema = table.schema or "public"
    found = await (await conn.execute(_TABLE, (table.name, schema))).fetchone()
    if found is None:
        raise InvalidTopology(
            f"table {table.fullname!r} is not in database {conn.info.dbname!r}",
            "run engine.create_all(metadata), which makes it on every shard",
        )
    oid, identity, primary, identified = found
    columns = [Column(*row) for row in await (await conn.execute(_COLUMNS, (oid,))).fetchall()]
    names = {column.name for column in columns}
    for part in table.key:
        if part not in names:
            raise InvalidTopology(
                f"table {table.fullname!r} has no column {part!r}, which the catalog has recorded as its shard key",
                "bring the table back to what the application declares",
            )
    every = tuple(column.name for column in columns if not column.generated)
    return TableShape(
        table=table,
        oid=oid,
        columns=tuple(columns),
        primary_key=tuple(primary),
        identity=Identity(identity),
        identity_columns=every if identity == "full" else tuple(identified),
    )


_TABLE: Final = """
    SELECT c.oid,
           CASE WHEN c.relreplident = 'f' THEN 'full'
                WHEN c.relreplident = 'i' THEN CASE WHEN r.oid IS NULL THEN 'nothing' ELSE 'key' END
                WHEN c.relreplident = 'd' AND p.oid IS NOT NULL THEN 'key'
                ELSE 'nothing' END,
           coalesce((SELECT array_agg(a.attname::text ORDER BY x.n)
                       FROM unnest(p.conkey) WITH ORDINALITY x(attnum, n)
                       JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = x.attnum), '{}'),
           coalesce((SELECT array_agg(a.attname::text ORDER BY x.n)
                       FROM unnest(CASE WHEN c.relreplident = 'i' THEN r.indkey::int2[] ELSE p.conkey END)
                            WITH ORDINALITY x(attnum, n)
                       JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = x.attnum), '{}')
      FROM pg_class c
      LEFT JOIN pg_constraint p ON p.conrelid = c.oid AND p.contype = 'p'
      LEFT JOIN (SELECT i.indrelid AS oid, i.indkey FROM pg_index i WHERE i.indisreplident) r ON r.oid = c.oid
     WHERE c.relname = %s AND c.relnamespace = to_regnamespace(quote_ident(%s)) AND c.relkind IN ('r', 'p')
"""

_COLUMNS: Final = """
    SELECT a.attname::text, format_type(a.atttypid, a.atttypmod),
           CASE WHEN b.typtype = 'e' THEN 'enum' ELSE format_type(b.oid, NULL) END,
           a.attgenerated <> '', a.attnotnull
      FROM pg_attribute a
      JOIN pg_type t ON t.oid = a.atttypid
      CROSS JOIN LATERAL (
          WITH RECURSIVE up AS (
              SELECT t.oid, t.typtype, t.typbasetype
              UNION ALL
              SELECT d.oid, d.typtype, d.typbasetype FROM up JOIN pg_type d ON d.oid = up.typbasetype
               WHERE up.typtype = 'd'
          ) SELECT oid, typtype FROM up WHERE typtype <> 'd'
      ) b
     WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
     ORDER BY a.attnum
"""
