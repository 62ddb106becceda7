r"""Rows become the text of PostgreSQL's COPY, a column at a time.

A column of values of one type is turned into text by one pass of C code (`map(str, values)`), and escaped as one
string. What is not of a common type goes through psycopg's own text dumpers, as in a statement.
(Format: PostgreSQL, "COPY", section "Text Format".)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from types import NoneType
from typing import Any, Final
from uuid import UUID

from psycopg import Binary, adapt, postgres
from psycopg.adapt import AdaptersMap, Dumper, PyFormat, Transformer
from psycopg.pq import Format
from sqlalchemy import Boolean, Column, LargeBinary, bindparam
from sqlalchemy.engine import Dialect

from shardlib.engine.bulk_where import locate
from shardlib.errors import InvalidArgument, UnsupportedOperation

__all__ = ["ColumnText", "TableText", "block_of"]

Process = Callable[[Any], Any]

_NULL: Final = "\\N"
_BETWEEN: Final = "\0"
"""Stands between the values of a column while they are escaped as one; no text of PostgreSQL can hold it."""
_ESCAPES: Final = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))
_NEVER: Final[frozenset[type]] = frozenset()
_NEEDLESS: Final = {Boolean: frozenset({bool, NoneType}), LargeBinary: frozenset({bytes, NoneType})}
"""Types whose bind processor, for values of these types, only checks or wraps."""
_BOOLEANS: Final = {True: "t", False: "f"}


class TableText:
    """The text of rows of one table, whose values come in the order of `columns`.

    Args:
        columns: the columns that are given.
        dialect: the dialect whose bind processors and adapters an INSERT would use.

    Raises:
        UnsupportedOperation: a column's type changes values by SQL on their way in, which COPY cannot.
    """

    def __init__(self, columns: Sequence[Column[Any]], dialect: Dialect) -> None:
        dump = _Dump(dialect)
        self.columns = [ColumnText(column, dialect, dump) for column in columns]

    def lines(self, values: Sequence[Sequence[Any]], first: int) -> list[str]:
        """One line for each row, without its end.

        Args:
            values: for each column, its values.
            first: number of the first row, for messages.

        Raises:
            Whatever a column's type or psycopg raises for a value; a note tells the row and column.
        """
        texts = [column.texts(its, first) for column, its in zip(self.columns, values, strict=True)]
        return list(map("\t".join, zip(*texts, strict=True)))


class ColumnText:
    """The texts of one column's values."""

    def __init__(self, column: Column[Any], dialect: Dialect, dump: Callable[[Sequence[Any]], Iterable[str]]) -> None:
        kind = column.type
        if kind.bind_expression(bindparam("value")) is not None:
            raise UnsupportedOperation(
                f"the type of column {str(column)!r} changes values by SQL on their way in (bind_expression)",
                "load it with INSERT statements, through a session",
            )
        impl = kind.dialect_impl(dialect)
        self._name = str(column)
        self._process: Process | None = impl.bind_processor(dialect)
        self._needless = next((types for base, types in _NEEDLESS.items() if isinstance(impl, base)), _NEVER)
        self._dump = dump

    def texts(self, values: Sequence[Any], first: int) -> Sequence[str]:
        """The texts of the values, escaped, NULL as COPY writes it."""
        try:
            return self._texts(values)
        except Exception as error:
            self._locate(values, first, error)
            raise

    def _locate(self, values: Sequence[Any], first: int, error: Exception) -> None:
        for i, value in enumerate(values):
            try:
                self._texts((value,))
            except Exception as its:  # noqa: BLE001 - only asked which value it is
                if type(its) is type(error):
                    locate(error, f"row {first + i} of the load, column {self._name!r}")
                    return

    def _texts(self, values: Sequence[Any]) -> Sequence[str]:
        kinds = set(map(type, values))
        if self._process is not None and not kinds <= self._needless:
            values = list(map(self._process, values))
            kinds = set(map(type, values))
        nullable = NoneType in kinds
        kinds.discard(NoneType)
        if not kinds:
            return [_NULL] * len(values)
        if not nullable:
            return list(self._present(kinds, values))
        texts = iter(self._present(kinds, [value for value in values if value is not None]))
        return [_NULL if value is None else next(texts) for value in values]

    def _present(self, kinds: set[type], values: Sequence[Any]) -> Iterable[str]:
        if len(kinds) == 1:
            return _WRITERS.get(next(iter(kinds)), self._dump)(values)
        return [text for value in values for text in _WRITERS.get(type(value), self._dump)((value,))]


def escaped(values: Sequence[str]) -> Sequence[str]:
    r"""Texts with what COPY gives a meaning escaped: backslash, tab, line feed, carriage return.

    Raises:
        InvalidArgument: a text holds a zero character.
    """
    whole = _BETWEEN.join(values)
    if whole.count(_BETWEEN) != len(values) - 1:
        found = next(value for value in values if _BETWEEN in value)
        raise InvalidArgument("text", found, "PostgreSQL's text cannot hold a zero character")
    plain = True
    for character, instead in _ESCAPES:
        if character in whole:
            whole, plain = whole.replace(character, instead), False
    return values if plain else whole.split(_BETWEEN)


def block_of(lines: Sequence[str]) -> bytes:
    """Lines as COPY reads them.

    Raises:
        UnicodeEncodeError: a lone surrogate, which has no UTF-8.
    """
    return ("\n".join(lines) + "\n").encode()


def _by_str(values: Sequence[Any]) -> Iterable[str]:
    return map(str, values)


def _hex(values: Sequence[bytes]) -> Iterable[str]:
    return ["\\\\x" + value.hex() for value in values]


_WRITERS: Final[dict[type, Callable[[Sequence[Any]], Iterable[str]]]] = {
    str: escaped,
    int: _by_str,
    float: _by_str,
    Decimal: _by_str,
    UUID: _by_str,
    date: _by_str,
    datetime: _by_str,
    time: _by_str,
    bool: lambda values: map(_BOOLEANS.__getitem__, values),
    bytes: _hex,
    bytearray: _hex,
    memoryview: _hex,
}
"""By the exact type: a subclass may say what it likes in `__str__`."""


class _Dump:
    """Any other value: by psycopg's text dumper for its type."""

    def __init__(self, dialect: Dialect) -> None:
        adapters = AdaptersMap(dialect._psycopg_adapters_map)  # type: ignore[attr-defined]  # noqa: SLF001 - as the pools
        for kind in (bytes, bytearray, memoryview, Binary):
            adapters.register_dumper(kind, _HexDumper)
        self._transformer = Transformer(adapters)

    def __call__(self, values: Sequence[Any]) -> Iterable[str]:
        dumped = self._transformer.dump_sequence(values, [PyFormat.TEXT] * len(values))
        return escaped([_NULL if data is None else bytes(data).decode() for data in dumped])


class _HexDumper(Dumper):
    """bytea inside of arrays and ranges; psycopg's own asks a connection how to escape."""

    oid = postgres.types["bytea"].oid
    format = Format.TEXT

    def dump(self, obj: Any) -> adapt.Buffer:
        return b"\\x" + bytes(obj.obj if isinstance(obj, Binary) else obj).hex().encode()
