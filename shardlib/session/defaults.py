"""Defaults of shard keys that Python gives, such as `default=uuid.uuid4`.

SQLAlchemy calls the default of a column while it compiles the INSERT, when the row's shard is chosen already. So that
of a key is called before, and its value put in the row as if the application had given it.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Table
from sqlalchemy.sql.dml import Insert

from shardlib.errors import ShardKeyRequired
from shardlib.route.needs import Describe
from shardlib.route.target import MISSING, Target, sets_of

__all__ = ["default_of", "has_default", "with_defaults"]

_KEYS: WeakKeyDictionary[Table, bool] = WeakKeyDictionary()
"""Whether Python gives a default to some column of a table's shard key."""


class _NoRow:
    """Stands where SQLAlchemy hands the row to a default that looks at it: the row is not there yet."""

    def __init__(self, column: Column[Any]) -> None:
        self._column = column

    def __getattr__(self, name: str) -> Any:
        raise ShardKeyRequired(
            f"the default of the shard key {str(self._column)!r} looks at the rest of its row, which is not there yet",
            "give the key in the row, or use a default that needs nothing",
        )


def has_default(column: Column[Any]) -> bool:
    """Whether Python knows the default of a column without the database."""
    default = column.default
    return default is not None and (default.is_scalar or default.is_callable)


def default_of(column: Column[Any]) -> Any:
    """Call the default of a column that has one; what it raises comes through.

    Raises:
        ShardKeyRequired: it looks at the rest of its row.
    """
    default: Any = column.default
    return default.arg(_NoRow(column)) if default.is_callable else default.arg


def with_defaults(statement: Any, parameters: Any, describe: Describe) -> tuple[Any, Any]:
    """Give the rows of an INSERT that leave a key column to its default the value of the default.

    Args:
        statement: any statement; another than an INSERT of rows is returned as it is.
        parameters: given beside it.
        describe: tells how a table is placed.

    Returns:
        The statement and the parameters to run in their place.

    Raises:
        ShardlibError: as `default_of`, and as for a table that cannot be written to.
    """
    if not isinstance(statement, Insert) or statement.select is not None:
        return statement, parameters
    if not _concerns(statement.table, describe):
        return statement, parameters
    target = Target(statement, describe)
    if statement._multi_values:
        filled = statement._generate()
        filled._multi_values = tuple([_filled(target, row, {}) for row in group] for group in statement._multi_values)
        return filled, parameters
    fixed: Mapping[Any, Any] = statement._values or {}
    sets = sets_of(parameters)
    if not sets or sets == ({},):
        missing = _filled(target, {}, fixed)
        return (statement.values(missing), parameters) if missing else (statement, parameters)
    rows = [_filled(target, given, fixed) for given in sets]
    return statement, rows[0] if isinstance(parameters, Mapping) else rows


def _concerns(table: Any, describe: Describe) -> bool:
    if not isinstance(table, Table):
        return True
    plain: Table = table._deannotate(clone=False) if table._annotations else table
    found = _KEYS.get(plain)
    if found is None:
        names = describe(plain).key_names
        found = _KEYS[plain] = any(column.name in names and has_default(column) for column in plain.c)
    return found


def _filled(target: Target, row: Any, fixed: Mapping[Any, Any]) -> Any:
    """A row with the defaults that it and the fixed values leave to the key; a row without names gives all it has."""
    if not isinstance(row, Mapping):
        return row
    filled = dict(row)
    for position, column in enumerate(target.columns):
        given = target.find(row, position) is not MISSING or target.find(fixed, position) is not MISSING
        if not given and has_default(column):
            filled[target.names[position][0]] = default_of(column)
    return filled
