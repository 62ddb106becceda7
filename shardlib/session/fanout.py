"""One SELECT on several shards at once.

SQLAlchemy's ORM executes a statement for one connection and loads its rows at once, step by step. The first of the
shards' connections that it asks to execute therefore sends the same statement on all of them, side by side; the
others find their answer ready. The loading itself stays one after the other, as a session requires.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

from sqlalchemy import CursorResult

from shardlib.shard import ShardConnection
from shardlib.waits import Waits

__all__ = ["FanOut"]


class FanOut:
    """The answers of several connections to one statement. Use as a context manager around the executions.

    The statement is known by the execution option `FAN_OUT`: what else SQLAlchemy executes meanwhile (a savepoint, the
    INSERTs of an autoflush) is none of this.
    """

    def __init__(self, waits: Waits, connections: Sequence[ShardConnection]) -> None:
        self._waits, self._connections = waits, tuple(connections)
        self._answers: dict[ShardConnection, CursorResult[Any]] | None = None

    def __enter__(self) -> Self:
        for conn in self._connections:
            conn.fan_out = self
        return self

    def __exit__(self, *exc: object) -> None:
        for conn in self._connections:
            conn.fan_out = None
        for answer in (self._answers or {}).values():
            answer.close()

    def answer(self, conn: ShardConnection, statement: Any, parameters: Any, options: Any) -> CursorResult[Any]:
        """The answer of this connection; the first call sends the statement on all of them."""
        if self._answers is None:
            calls = [partial(each.execute_here, statement, parameters, options) for each in self._connections]
            self._answers = dict(zip(self._connections, self._waits.run_all(calls), strict=True))
        return self._answers.pop(conn)
