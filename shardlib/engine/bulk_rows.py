"""What a bulk load is given: which table and columns, and rows in bounded portions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import Column, Table, inspect
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import Mapper

from shardlib.errors import InvalidArgument, UnsupportedOperation
from shardlib.waits import Waits

__all__ = ["RowShape", "Target", "portions"]

Take = Callable[[int], list[Any]]
"""Up to so many further rows; none at the end."""

_WAIT_S: Final = 0.1
"""A slow source gives what it has after so long."""
_STEP: Final = 64


class Target:
    """The table of a load, and how its rows name the columns.

    Args:
        target: a Table, whose rows name columns by `Column.key` or name, or a mapped class, whose rows name
            attributes.

    Raises:
        InvalidArgument: neither.
        UnsupportedOperation: the class is spread over several tables.
    """

    def __init__(self, target: Any) -> None:
        self._constants: dict[str, Any] = {}
        self._names: dict[str, Column[Any]]
        if isinstance(target, Table):
            self.table: Table = target
            self._names = {column.name: column for column in target.columns} | dict(target.columns.items())
            return
        try:
            mapper = inspect(target)
        except NoInspectionAvailable:
            mapper = None
        if not isinstance(mapper, Mapper):
            raise InvalidArgument("table", target, "a sqlalchemy Table, or a mapped class")
        table = mapper.local_table
        if len(mapper.tables) != 1 or not isinstance(table, Table):
            raise UnsupportedOperation(
                f"class {mapper.class_.__name__} is spread over {len(mapper.tables)} tables",
                "load each of its tables by itself: Class.__table__",
            )
        self.table = table
        self._names = {
            attribute.key: column
            for attribute in mapper.column_attrs
            for column in attribute.columns[:1]
            if isinstance(column, Column) and column.table is table
        }
        self._constants = _of_mapper(mapper)

    def shape(self, names: Sequence[str], at: str) -> RowShape:
        """The columns of a load whose rows give these names.

        Args:
            names: of columns, or attributes of a mapped class.
            at: what gave them, for messages.

        Raises:
            InvalidArgument: an unknown name, one given twice, or none.
            UnsupportedOperation: a missing column has a default that only an INSERT statement can apply.
        """
        columns = []
        for name in names:
            column = self._names.get(name)
            if column is None:
                known = ", ".join(self._names)
                raise InvalidArgument(at, name, f"the columns of {self.table.fullname!r} are {known}")
            columns.append(column)
        if not columns or len(set(columns)) != len(columns):
            raise InvalidArgument(at, list(names), "at least one column, and none of them twice")
        return RowShape(self.table, names, columns, self._constants)


def _of_mapper(mapper: Mapper[Any]) -> dict[str, Any]:
    """What the ORM writes by itself: the class's place in its hierarchy, and the first version of a row."""
    found: dict[str, Any] = {}
    if isinstance(mapper.polymorphic_on, Column) and mapper.polymorphic_identity is not None:
        found[str(mapper.polymorphic_on.key)] = mapper.polymorphic_identity
    if mapper.version_id_col is not None and callable(mapper.version_id_generator):
        found[str(mapper.version_id_col.key)] = mapper.version_id_generator(None)
    return found


class RowShape:
    """The columns of one load: those that its rows give, then those that defaults fill."""

    def __init__(
        self, table: Table, names: Sequence[str], given: Sequence[Column[Any]], constants: Mapping[str, Any]
    ) -> None:
        self.names = tuple(names)
        self.columns: tuple[Column[Any], ...] = tuple(given)
        self._fill: list[tuple[Column[Any], Callable[[Any], Any] | None, Any]] = []
        for column in table.columns:
            if column in self.columns:
                continue
            default = column.default
            if column.key in constants:
                self._fill.append((column, None, constants[column.key]))
            elif default is not None and default.is_scalar:
                self._fill.append((column, None, default.arg))  # type: ignore[attr-defined]
            elif default is not None and default.is_callable:
                self._fill.append((column, default.arg, None))  # type: ignore[attr-defined]
            elif default is not None:
                raise UnsupportedOperation(
                    f"column {str(column)!r} has a default that is an SQL expression, which COPY cannot apply",
                    "give its values in the rows, or declare it as server_default",
                )
        self.columns += tuple(column for column, _, _ in self._fill)
        self._get = [itemgetter(name) for name in self.names]
        self._wanted = set(self.names)

    def values(self, rows: Sequence[Any], first: int) -> list[Sequence[Any]]:
        """The values of the rows, for each column of `columns`.

        Args:
            rows: mappings, or sequences in the order of `names`.
            first: number of the first of them, for messages.

        Raises:
            InvalidArgument: a row has other columns.
        """
        try:
            same = set(map(len, rows)) == {len(self.names)}
            mappings = sum(isinstance(row, Mapping) for row in _one_of_each(rows))
            if same and mappings == 0 and not any(isinstance(row, str | bytes) for row in _one_of_each(rows)):
                values: list[Sequence[Any]] = list(zip(*rows, strict=True))
            elif same and mappings == len(set(map(type, rows))):
                values = [list(map(get, rows)) for get in self._get]
            else:
                raise self._wrong(rows, first)
        except (KeyError, TypeError) as error:
            raise self._wrong(rows, first) from error
        if self._fill:
            self._add_defaults(values, len(rows))
        return values

    def _add_defaults(self, values: list[Sequence[Any]], count: int) -> None:
        for _, function, constant in self._fill:
            if function is None:
                values.append([constant] * count)
            else:
                row = _RowContext(self.columns, values)
                values.append([function(row.at(i)) for i in range(count)])

    def _wrong(self, rows: Sequence[Any], first: int) -> InvalidArgument:
        shown = ", ".join(self.names)
        for i, row in enumerate(rows):
            if isinstance(row, Mapping):
                if set(row) != self._wanted:
                    return InvalidArgument(f"row {first + i}", list(row), f"all rows have the columns {shown}")
                if not isinstance(rows[0], Mapping):
                    break
            elif not isinstance(row, Sequence) or isinstance(row, str | bytes) or len(row) != len(self.names):
                return InvalidArgument(f"row {first + i}", row, f"a mapping or a tuple with the columns {shown}")
        return InvalidArgument("rows", f"{first} to {first + len(rows) - 1}", "all mappings, or all tuples")


class _RowContext:
    """What SQLAlchemy hands to a default that looks at the rest of its row."""

    def __init__(self, columns: Sequence[Column[Any]], values: Sequence[Sequence[Any]]) -> None:
        self._columns, self._values, self._row = columns[: len(values)], values, 0

    def at(self, row: int) -> _RowContext:
        self._row = row
        return self

    def get_current_parameters(self, isolate_multiinsert_groups: bool = True) -> dict[str, Any]:
        """The values of the row so far, by `Column.key`."""
        return {column.key: values[self._row] for column, values in zip(self._columns, self._values, strict=False)}

    @property
    def current_parameters(self) -> dict[str, Any]:
        """The same, as SQLAlchemy's older contexts name it."""
        return self.get_current_parameters()


def _one_of_each(rows: Sequence[Any]) -> Iterable[Any]:
    """A row of each type that occurs."""
    return dict(zip(map(type, rows), rows, strict=True)).values()


def portions(rows: Any, waits: Waits) -> Take:
    """Read an iterable, or in an engine for asyncio also an async iterable, by portions.

    Raises:
        InvalidArgument: it is none, or an async one in a blocking engine.
    """
    if waits.is_async and hasattr(rows, "__aiter__"):
        source: AsyncIterator[Any] = aiter(rows)
        return lambda count: waits.await_(_take_async(source, count))
    if not hasattr(rows, "__iter__") or isinstance(rows, str | bytes | Mapping):
        allowed = "an iterable of mappings or tuples"
        raise InvalidArgument("rows", rows, f"{allowed}, or an async one" if waits.is_async else allowed)
    iterator = iter(rows)
    return lambda count: _take(iterator, count)


def _take(rows: Iterator[Any], count: int) -> list[Any]:
    taken: list[Any] = []
    until = time.monotonic() + _WAIT_S
    while len(taken) < count:
        step = min(_STEP, count - len(taken))
        part = list(islice(rows, step))
        taken += part
        if len(part) < step or time.monotonic() > until:
            break
    return taken


async def _take_async(rows: AsyncIterator[Any], count: int) -> list[Any]:
    taken: list[Any] = []
    until = time.monotonic() + _WAIT_S
    async for row in rows:
        taken.append(row)
        if len(taken) == count or time.monotonic() > until:
            break
    return taken
