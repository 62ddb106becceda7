"""Which tables are sharded and by what: read from the `info` of SQLAlchemy's tables and columns.

A column of the shard key has `info={"shard_key": True}`; several of them are a composite key in the order of
the table, or in that of the numbers given instead of True. A table that is the same on every shard has
`info={"reference": True}`. A unique constraint or index without the shard key can only hold inside each
shard; one that is meant so has `info={"per_shard": True}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Index, PrimaryKeyConstraint, Table, UniqueConstraint
from sqlalchemy.dialects.postgresql import ExcludeConstraint

from shardlib.errors import InvalidArgument, InvalidShardKey, InvalidTopology, ShardKeyRequired
from shardlib.key.columns import PartEncoder, part_encoder
from shardlib.key.composite import join_parts

__all__ = ["KeySpec", "describe"]


@dataclass(frozen=True, slots=True, eq=False)
class KeySpec:
    """How one table is placed: by the values of its key columns, or as a reference table on every shard."""

    table: str
    """Name of the table, with its schema if it has one: its key in the MetaData."""
    key_names: tuple[str, ...]
    """Names of the key columns in the database, in the order of the key; empty for a reference table."""
    column_keys: tuple[str, ...]
    """The same columns as `table.c` knows them (`Column.key`), which may differ from their names."""
    _parts: tuple[PartEncoder, ...]

    @property
    def reference(self) -> bool:
        """Whether every shard holds the same full copy."""
        return not self.key_names

    @property
    def sharded(self) -> bool:
        """Whether its rows are placed by a shard key."""
        return bool(self.key_names)

    def encode(self, values: Sequence[object]) -> bytes:
        """The key bytes of a row, from the values of its key columns as the application gives them.

        Equal to `encode_key` of what reaches the database: type decorators are applied, Enum members become
        what the column stores, a Decimal gets the column's scale.

        Args:
            values: one for each of `key_names`, in that order.

        Raises:
            InvalidShardKey: a value is NULL, of another type than the column, or PostgreSQL would change it on its
                way in (too long, too fine, in another time zone).
            ShardKeyRequired: it is a reference table.
        """
        parts = self._parts
        if len(values) != len(parts):
            if not parts:
                raise ShardKeyRequired(
                    f"{self.table!r} is a reference table and has no shard key",
                    "its rows are on every shard; ask by the key of a sharded table",
                )
            raise InvalidShardKey(values, f"{self.table!r} has a shard key of {len(parts)} columns")
        if len(parts) == 1:
            return parts[0](values[0])
        return join_parts([part(value) for part, value in zip(parts, values, strict=True)])


def describe(table: Table) -> KeySpec:
    """How a table is placed. Read once for each Table: declare it fully before it is used.

    Raises:
        ShardKeyRequired: the table says neither.
        InvalidShardKey: a column cannot be the shard key: nullable, made by the server, or of a type without a
            stable text; or the table is said to be both sharded and a reference table.
        InvalidTopology: a primary key or unique constraint does not hold the shard key, so that it could not be
            kept across shards.
    """
    found = _described.get(table)
    if found is None:
        found = _described[table] = _read(table)
    return found


_described: WeakKeyDictionary[Table, KeySpec] = WeakKeyDictionary()


def _read(table: Table) -> KeySpec:
    columns = _key_columns(table)
    reference = table.info.get("reference", False)
    if not isinstance(reference, bool):
        raise InvalidArgument('info["reference"]', reference, f"True or False (table {table.key!r})")
    if reference and columns:
        raise InvalidShardKey(
            f"{table.key}.{columns[0].name}",
            "its table is a reference table, which is the same on every shard",
        )
    if not reference and not columns:
        raise ShardKeyRequired(
            f"table {table.key!r} is neither sharded nor a reference table",
            'mark the column of its shard key with info={"shard_key": True}, or the table with '
            'info={"reference": True}',
        )
    parts = tuple(_part(table, column) for column in columns)
    if columns:
        _check_unique(table, frozenset(column.name for column in columns))
    names = tuple(column.name for column in columns)
    return KeySpec(table.key, names, tuple(column.key for column in columns), parts)


def _key_columns(table: Table) -> list[Column[Any]]:
    """The columns of the shard key, in its order."""
    marked: list[tuple[int | bool, Column[Any]]] = []
    for column in table.columns:
        mark = column.info.get("shard_key", False)
        if not isinstance(mark, int):
            raise InvalidArgument('info["shard_key"]', mark, f"True, or a position (column {table.key}.{column.name})")
        if mark is not False:
            marked.append((mark, column))
    positions = [mark for mark, _ in marked if mark is not True]
    if not positions:
        return [column for _, column in marked]
    if len(positions) != len(marked) or len(set(positions)) != len(positions):
        raise InvalidArgument(
            'info["shard_key"]',
            {column.name: mark for mark, column in marked},
            f"True for every key column of table {table.key!r}, or a different position for each",
        )
    return [column for _, column in sorted(marked, key=lambda pair: pair[0])]


def _part(table: Table, column: Column[Any]) -> PartEncoder:
    where = f"{table.key}.{column.name}"
    if column.nullable:
        raise InvalidShardKey(where, "it is nullable, and NULL belongs to no shard; declare it nullable=False")
    if column.computed is not None or (column.identity is not None and column.identity.always):
        raise InvalidShardKey(where, "the server makes its values, so they are not known before a shard is chosen")
    return part_encoder(column.type, where, deterministic=column.info.get("deterministic") is True)


def _check_unique(table: Table, key: frozenset[str]) -> None:
    """A shard sees its own rows only: what is unique must hold the whole shard key, or be meant for each shard."""
    for constraint in table.constraints:
        if isinstance(constraint, PrimaryKeyConstraint | UniqueConstraint):
            held = {column.name for column in constraint.columns}
        elif isinstance(constraint, ExcludeConstraint):
            held = {str(name) for _, name, operator in constraint._render_exprs if operator == "="}  # noqa: SLF001
        else:
            continue
        primary = isinstance(constraint, PrimaryKeyConstraint)
        if primary and not held:
            continue  # SQLAlchemy's stand-in for a table without a primary key
        if not key <= held and (primary or constraint.info.get("per_shard") is not True):
            what = "primary key" if primary else f"unique constraint {str(constraint.name or '') or sorted(held)!r}"
            _refuse(table, what, key, primary=primary)
    for index in table.indexes:
        # A key column inside an expression does not count: rows of different keys could still collide.
        if index.unique and not key <= _plain(index) and index.info.get("per_shard") is not True:
            _refuse(table, f"unique index {index.name!r}", key, primary=False)


def _plain(index: Index) -> set[str]:
    return {part.name for part in index.expressions if isinstance(part, Column)}


def _refuse(table: Table, what: str, key: frozenset[str], *, primary: bool) -> None:
    way_out = f"add {', '.join(map(repr, sorted(key)))} to it"
    if not primary:
        way_out += ', or say with info={"per_shard": True} that it need only hold inside each shard'
    raise InvalidTopology(
        f"the {what} of table {table.key!r} does not hold the whole shard key, so no shard could keep it",
        way_out,
    )
