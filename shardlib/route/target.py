"""The table that a write goes to, and the values that its rows give for the shard key."""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper
from sqlalchemy.sql.cache_key import CacheKey
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import BindParameter, ClauseElement, Null

from shardlib.errors import ShardKeyRequired, UnsupportedOperation
from shardlib.route.needs import Describe, TableKey
from shardlib.route.plans import Given, Parameters
from shardlib.route.values import Supplied

__all__ = ["GIVE_VALUE", "MISSING", "Target", "grouped", "key_of_row", "known", "sets_of"]

GIVE_VALUE = "give the value itself: it decides which shard the row goes to, before any server is asked"


class Target:
    """The table that a statement writes, and how its key columns may be named."""

    def __init__(self, statement: UpdateBase, describe: Describe) -> None:
        table: Any = statement.table
        while not isinstance(table, Table):
            inner = getattr(table, "element", None)
            if inner is None:
                raise UnsupportedOperation(f"a write to {table} cannot be routed", "write to a Table or a mapped class")
            table = inner
        self.table: Table = table._deannotate(clone=False) if table._annotations else table
        self.key: TableKey = describe(self.table)
        if self.key.reference:
            raise UnsupportedOperation(
                f"{self.table.fullname!r} is a reference table: a write to one shard would make the copies differ",
                "write it with engine.bulk_load, which writes every shard",
            )
        by_name = {column.name: column for column in self.table.c}
        self.columns: tuple[Column[Any], ...] = tuple(by_name[name] for name in self.key.key_names)
        subject = statement._propagate_attrs.get("plugin_subject")
        self._mapper = subject.mapper if subject is not None and hasattr(subject, "mapper") else None
        self.names = tuple(self._names(column) for column in self.columns)

    def _names(self, column: Column[Any]) -> tuple[str, ...]:
        mapper = self._mapper
        if isinstance(mapper, Mapper) and column in mapper._columntoproperty:
            return tuple(dict.fromkeys((mapper.get_property_by_column(column).key, column.key)))
        return (column.key,)

    @property
    def mapped(self) -> bool:
        """Whether the statement names a mapped class."""
        return self._mapper is not None

    def find(self, row: Mapping[Any, Any], position: int) -> Any:
        """Return what a row says of a key column: a value, an expression, or MISSING."""
        for name in self.names[position]:
            if name in row:
                return row[name]
        wanted = hash(self.columns[position])
        for key, value in row.items():
            if isinstance(key, str):
                continue
            plain = key.__clause_element__() if hasattr(key, "__clause_element__") else key
            if hash(plain) == wanted:
                return value
        return MISSING


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def sets_of(parameters: Parameters) -> Sequence[Given]:
    """The parameters as a sequence of sets."""
    if parameters is None:
        return ()
    return (parameters,) if isinstance(parameters, Mapping) else parameters


def known(value: Any, supplied: Supplied, cache_key: CacheKey | None) -> Any:
    """The value of a bound parameter or plain value; MISSING for an expression of SQL."""
    if isinstance(value, Null):
        return None
    if not isinstance(value, BindParameter):
        return MISSING if isinstance(value, ClauseElement) or hasattr(value, "__clause_element__") else value
    if value.key in supplied.given:
        return supplied.given[value.key]
    if cache_key is not None:
        for original, current in zip(cache_key.bindparams, supplied.extracted, strict=True):
            if original.key == value.key:
                return current.effective_value
    return MISSING if value.required else value.effective_value


def grouped(rows: Mapping[bytes, list[int]]) -> Mapping[bytes, tuple[int, ...]]:
    """Freeze the rows of each key."""
    return {key: tuple(indexes) for key, indexes in rows.items()}


def key_of_row(target: Target, row: Mapping[Any, Any], given: Given, where: str) -> bytes:
    """Key bytes of a row to write.

    Raises:
        ShardKeyRequired: the row leaves a key column to SQL, to a default, or out.
    """
    values = []
    for position, column in enumerate(target.columns):
        value = target.find(row, position)
        name = f"{target.table.fullname}.{column.key}"
        if value is MISSING:
            default = column.default is not None or column.server_default is not None
            what = (
                f"leaves the shard key {name!r} to its default"
                if default
                else f"has no value for the shard key {name!r}"
            )
            raise ShardKeyRequired(f"{where} of a write {what}", GIVE_VALUE)
        found = known(value, Supplied((), given), None)
        if found is MISSING:
            raise ShardKeyRequired(
                f"{where} of a write gives the shard key {name!r} as an expression or an empty parameter",
                GIVE_VALUE,
            )
        values.append(found)
    return target.key.encode(tuple(values))
