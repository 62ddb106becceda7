"""Cursors that leave the end of a transaction to the session."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.abc import PQGen

from shardlib.errors import UnsupportedOperation
from shardlib.fence.control import ending_statement, plain_start

__all__ = ["AsyncFencedCursor", "FencedCursor"]


class _Guarded:
    """What the two cursor classes share: the session alone ends a transaction."""

    def _start_query(self, query: Any = None) -> PQGen[None]:
        inner: Any = super()
        connection: Any = self._conn  # type: ignore[attr-defined]
        if connection.sealed and query is not None and not (query.__class__ is str and plain_start(query)):
            word = ending_statement(_text_of(query, connection))
            if word is not None:
                raise UnsupportedOperation(
                    f"{word} as the text of a statement would leave what follows without a gate",
                    "use the session's (or the connection's) commit() and rollback()",
                )
        yield from inner._start_query(query)  # noqa: SLF001 - what it overrides


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
