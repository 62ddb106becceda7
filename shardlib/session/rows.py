"""Rows that a flush writes without an object: those of many-to-many tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["RowByRow"]


class RowByRow:
    """Stands where SQLAlchemy expects an engine and its connection, and sends each row to the shard of its key."""

    __slots__ = ("_write",)

    def __init__(self, write: Callable[[Any, Any], int]) -> None:
        self._write = write

    def execute(self, statement: Any, parameters: Any = None) -> _Met:
        """As `Connection.execute` of a write; the answer tells no more than the number of rows."""
        return _Met(self._write(statement, parameters))


class _Met:
    """What SQLAlchemy asks of the answer to a write."""

    __slots__ = ("rowcount",)

    def __init__(self, rowcount: int) -> None:
        self.rowcount = rowcount

    def supports_sane_multi_rowcount(self) -> bool:
        """PostgreSQL's drivers count one statement at a time, and psycopg adds them up."""
        return self.rowcount >= 0
