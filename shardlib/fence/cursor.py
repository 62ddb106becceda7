"""Cursors that leave the end of a transaction to the session."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.abc import PQGen

from shardlib.errors import UnsupportedOperation
from shardlib.fence.control import ending_statement, plain_start, undoes_savepoint

__all__ = ["AsyncFencedCursor", "AsyncFencedServerCursor", "FencedCursor", "FencedServerCursor"]


class _Guarded:
    """What the cursor classes share: the session alone ends a transaction."""

    def _start_query(self, query: Any = None) -> PQGen[None]:
        inner: Any = super()
        connection: Any = self._conn  # type: ignore[attr-defined]
        if query is not None and not (query.__class__ is str and plain_start(query)):
            _look_at(query, connection)
        connection.guarded = True
        try:
            yield from inner._start_query(query)  # noqa: SLF001 - what it overrides
        finally:
            connection.guarded = False

    def _start_copy_gen(self, statement: Any, params: Any = None) -> PQGen[None]:
        inner: Any = super()
        _look_at(statement, self._conn)  # type: ignore[attr-defined] # psycopg does not hand it to `_start_query`
        yield from inner._start_copy_gen(statement, params)  # noqa: SLF001 - what it overrides


def _look_at(query: Any, connection: Any) -> None:
    """Refuse a query that ends the transaction; note one that may give back gates."""
    if not connection.sealed:
        return
    text = _text_of(query, connection)
    escapes = connection.pgconn.parameter_status(b"standard_conforming_strings") == b"off"
    word = ending_statement(text, escapes=escapes)
    if word is not None:
        raise UnsupportedOperation(
            f"{word} as the text of a statement would leave what follows without a gate",
            "use the session's (or the connection's) commit() and rollback()",
        )
    if undoes_savepoint(text):
        connection.savepoint_undone = True


def _text_of(query: Any, connection: Any) -> str:
    if isinstance(query, str):
        return query
    if isinstance(query, bytes):
        return query.decode(connection.info.encoding, "replace")
    return str(query.as_string(connection)) if hasattr(query, "as_string") else str(query)


class FencedCursor(_Guarded, psycopg.Cursor[Any]):
    """The cursor of a blocking connection behind the fence."""


class AsyncFencedCursor(_Guarded, psycopg.AsyncCursor[Any]):
    """The cursor of an asyncio connection behind the fence."""


class FencedServerCursor(_Guarded, psycopg.ServerCursor[Any]):
    """The named cursor of a blocking connection behind the fence."""


class AsyncFencedServerCursor(_Guarded, psycopg.AsyncServerCursor[Any]):
    """The named cursor of an asyncio connection behind the fence."""
