"""One statement with `$1` parameters on a routed connection, its rows as the texts that PostgreSQL sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final

from psycopg import errors as pg
from psycopg import generators, pq
from psycopg.abc import PQGen

from shardlib.errors import InvalidArgument
from shardlib.fence.cursor import AsyncFencedCursor

__all__ = ["Chunk", "TextCursor"]

_STOP_S: Final = 5.0

_ROWS: frozenset[int] = frozenset({pq.ExecStatus.TUPLES_CHUNK, pq.ExecStatus.SINGLE_TUPLE, pq.ExecStatus.TUPLES_OK})
_COPY: frozenset[int] = frozenset({pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH})


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a result, or its end.

    Attributes:
        result: libpq's; `get_value(row, column)` is the text, None for NULL.
        last: nothing follows; `changed` is known.
        changed: rows that the statement has selected or changed, by its command tag; None if the tag has no number.
    """

    result: pq.abc.PGresult
    last: bool
    changed: int | None = None


class TextCursor(AsyncFencedCursor):
    """A cursor that neither adapts parameters nor loads rows.

    The rows come in chunks, so that a result is never held whole.
    """

    async def parameter_types(self, query: str) -> list[int]:
        """The types that the server gives the parameters, by their oids: a round trip that runs nothing.

        Raises:
            psycopg.Error: the server does not understand the statement.
        """
        return await self._conn.wait(self._describe(query))

    def _describe(self, query: str) -> PQGen[list[int]]:
        yield from self._start_query(query)
        pgconn = self._pgconn
        pgconn.send_prepare(b"", query.encode())
        self._checked((yield from generators.execute(pgconn))[-1])
        pgconn.send_describe_prepared(b"")
        described = self._checked((yield from generators.execute(pgconn))[-1])
        return [described.param_type(number) for number in range(described.nparams)]

    async def texts(self, query: str, params: Sequence[bytes | None], *, rows: int) -> AsyncGenerator[Chunk, None]:
        """Run a statement, and give its rows, at most so many at once.

        Leaving early cancels the statement at the server; its transaction is to be rolled back then.

        Raises:
            InvalidArgument: it is a COPY.
            psycopg.Error: what the server answers.
        """
        await self._conn.wait(self._send(query, params, rows))
        done = False
        try:
            while (result := await self._conn.wait(self._fetch())) is not None:
                yield Chunk(result, last=result.status not in _ROWS or result.status == pq.ExecStatus.TUPLES_OK,
                            changed=result.command_tuples)  # fmt: skip
            done = True
        except pg.Error:
            done = True  # `_fetch` has read everything before it raised
            raise
        finally:
            if not done and not self._conn.closed:
                await self._stop()

    async def _stop(self) -> None:
        """Cancel the statement at the server; a server that does not react to it loses the connection."""
        try:
            async with asyncio.timeout(_STOP_S):
                await self._conn.cancel_safe(timeout=_STOP_S)
                await self._conn.wait(self._drain())
        except (TimeoutError, pg.Error):
            self._conn.pgconn.finish()

    def _send(self, query: str, params: Sequence[bytes | None], rows: int) -> PQGen[None]:
        yield from self._start_query(query)
        pgconn = self._pgconn
        # With no types given, the server decides them; and this message takes one statement only.
        pgconn.send_query_params(query.encode(), params)
        if rows > 1 and pq.version() >= 170000:
            pgconn.set_chunked_rows_mode(rows)
        else:
            pgconn.set_single_row_mode()
        yield from generators.send(pgconn)

    def _fetch(self) -> PQGen[pq.abc.PGresult | None]:
        result: pq.abc.PGresult | None = yield from generators.fetch(self._pgconn)
        if result is None:
            return None
        if result.status in _COPY:
            self._pgconn.finish()  # nobody is going to speak COPY with it
            raise InvalidArgument("query", "COPY", "a statement that returns rows or changes them")
        if result.status not in _ROWS and result.status != pq.ExecStatus.COMMAND_OK:
            yield from self._drain()
            self._checked(result)
        return result

    def _drain(self) -> PQGen[None]:
        while (yield from generators.fetch(self._pgconn)) is not None:
            pass

    def _checked(self, result: pq.abc.PGresult) -> pq.abc.PGresult:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise pg.error_from_result(result, encoding=self._conn.info.encoding)
        return result
