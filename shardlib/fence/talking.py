"""Talking with the server below psycopg's cursors: simple messages, and a ROLLBACK whose answer nobody waits for."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import generators, pq
from psycopg.abc import PQGen

__all__ = ["FATAL", "IDLE", "INERROR", "IN_TRANSACTION", "Talking"]

IDLE: Final = pq.TransactionStatus.IDLE
INERROR: Final = pq.TransactionStatus.INERROR
IN_TRANSACTION: Final = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)
FATAL: Final = pq.ExecStatus.FATAL_ERROR


if TYPE_CHECKING:
    _Base = psycopg.Connection[Any]
else:
    _Base = object


class Talking(_Base):
    """A part of psycopg's blocking and asyncio connections alike: what talks is a generator, which `drive` runs."""

    shard_name: str = "?"
    sealed: bool = False
    """Once set, a transaction starts only with the gates of `arm`. Unset while the driver sets a connection up."""
    primary_only: bool = True
    """Whether a replica refuses as if its gates were closed: an old primary may have become one."""
    pooled: bool = False
    """Whether PgBouncer is between: what the server reported at the login need not be true of the one that serves now,
    so each start of a transaction asks it."""
    rolling_back: bool = False
    """Whether a ROLLBACK was sent whose answer nobody has read yet."""

    def message(self, command: bytes) -> PQGen[bytes]:
        """Send one simple-query message, of any number of statements, whose rows do not matter.

        Returns:
            The command tag of the last one.

        Raises:
            psycopg.Error: the first error that the server answers.
        """
        yield from self._ready()
        self.pgconn.send_query(command)
        tag = b""
        for result in (yield from generators.execute(self.pgconn)):
            if result.status == FATAL:
                raise self._error(result)
            tag = result.command_status or b""
        return tag

    def _ready(self) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        self._check_connection_ok()

    def one_row(self, query: bytes) -> Generator[Any, Any, tuple[str, ...] | None]:
        """The first row of a query as text, or None if there is none, or no such table or schema."""
        yield from self._ready()
        self.pgconn.send_query(query)
        results = yield from generators.execute(self.pgconn)
        answer = results[-1]
        if answer.status == FATAL:
            error = self._error(answer)
            if isinstance(error, pg.UndefinedTable | pg.InvalidSchemaName):
                return None
            raise error
        if answer.ntuples == 0:
            return None
        return tuple((answer.get_value(0, column) or b"").decode() for column in range(answer.nfields))

    def _error(self, result: pq.abc.PGresult) -> psycopg.Error:
        return pg.error_from_result(result, encoding=self.info.encoding)

    def roll_back_unheard(self) -> bool:
        """Send ROLLBACK without waiting for its answer; False if this transaction needs the usual way.

        The answer carries nothing: the server lets go of locks and gates as it reads the message, and a connection
        that is lost now is found so by whoever uses it next. What comes next on the connection reads it first.
        """
        if self.rolling_back:
            return True  # nothing was sent since: SQLAlchemy rolls back a second time as it gives a connection back
        pgconn = self.pgconn
        if not self.sealed or self._pipeline or self._tpc or self._num_transactions:
            return False
        if pgconn.transaction_status not in IN_TRANSACTION:
            return False
        # psycopg lets go of what it has prepared in a transaction that is rolled back; so does this.
        forget = b"; DEALLOCATE ALL" if self._prepared.clear() else b""
        self._prepared._to_flush.clear()  # noqa: SLF001 - it goes along in the same message
        pgconn.send_query(b"ROLLBACK" + forget)
        pgconn.flush()
        self.rolling_back = True
        return True

    def hear_rollback(self) -> None:
        """Read the answer of a ROLLBACK as far as it has arrived, without waiting.

        Raises:
            psycopg.OperationalError: the connection was lost.
        """
        pgconn = self.pgconn
        pgconn.consume_input()
        while not pgconn.is_busy():
            if pgconn.get_result() is None:
                self.rolling_back = False
                return

    def _rolled_back(self) -> PQGen[None]:
        """Read the answer of a ROLLBACK to its end."""
        results = yield from generators.fetch_many(self.pgconn)
        self.rolling_back = False
        for result in results:
            if result.status == FATAL:
                raise self._error(result)

    def _check_intrans_gen(self, attribute: str) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        yield from super()._check_intrans_gen(attribute)
