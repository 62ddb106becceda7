"""One shard's part of a bulk load: a transaction that holds its gates, in the middle of a COPY.

Written once for both kinds of connection: what talks to the server is a generator, driven in a thread or in a
greenlet. A block is handed to the kernel and not waited for, so the servers work side by side while the next rows
are made ready; a shard that falls behind holds up the reader once its socket is full.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Generator
from typing import Any, Final, NoReturn, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg import generators
from psycopg.pq import ExecStatus
from sqlalchemy.exc import DBAPIError

from shardlib.engine.bulk_where import locate
from shardlib.errors import ShardUnavailable, StaleTopology
from shardlib.fence.connection import drive
from shardlib.fence.verdict import GateClosed, lost_connection
from shardlib.shard import ShardConnection
from shardlib.shard.patience import limited
from shardlib.topology import Shard

__all__ = ["CopyLeg"]

T = TypeVar("T")

BLOCK_BYTES: Final = 64 * 1024
"""What is collected before it is sent: a few lines alone are not worth a call of the driver."""
SEGMENT_BYTES: Final = 16 * 1024 * 1024
"""A COPY ends and the next begins after so much: a server tells what it refuses only at the end of a COPY."""
_PIECE_BYTES: Final = 128 * 1024
"""What libpq is handed at once, as by psycopg's own COPY: what it cannot take would be offered to it for ever."""
_LINE: Final = re.compile(r"^COPY .+, line (\d+)", re.MULTILINE)


class CopyLeg:
    """The transaction of a load on one shard.

    Args:
        shard: where.
        conn: a connection whose transaction has begun.
        gates: that it holds.
        command: `COPY ... FROM STDIN`.
        stall_timeout_s: the server may take no data, or owe an answer (to the end of a COPY, to a lock), for so long.
    """

    def __init__(
        self, shard: Shard, conn: ShardConnection, gates: tuple[int, ...], command: str, stall_timeout_s: float
    ) -> None:
        self.shard, self.gates = shard, frozenset(gates)
        self.rows = 0
        """Rows of this transaction."""
        self._conn, self._command, self._stall_timeout_s = conn, command, stall_timeout_s
        self._driver = conn.driver
        self._pending: list[bytes] = []
        self._pending_bytes = self._segment_bytes = 0
        self._lines = 0
        self._starts: list[int] = []
        self._numbers: list[tuple[int, array[int] | None]] = []

    def begin(self) -> None:
        """Begin the first COPY.

        While one shard ends its COPY, another may be idle for longer than the pool's connections allow.
        """
        patience = f"SET LOCAL idle_in_transaction_session_timeout = {round(self._stall_timeout_s * 1000):d}; "
        self._talk(self._copy_in(patience + self._command))

    def lock(self, gates: tuple[int, ...], version: int) -> None:
        """Take more gates, between two COPYs.

        Raises:
            StaleTopology: one is closed; the transaction can only be rolled back.
            sqlalchemy.exc.DBAPIError: the server refuses a row sent so far or the lock, or the connection was lost.
            ShardUnavailable: it was silent for too long, as while somebody else keeps a gate locked. Nothing of this
                transaction is kept.
        """
        self._end_copy()
        try:
            self._talk(self._driver.lock_more(gates))
        except GateClosed as closed:
            raise StaleTopology(self.shard.name, closed.gates[0], version) from None
        self.gates |= set(gates)
        self._talk(self._copy_in(self._command))

    def add(self, block: bytes, count: int, first: int, positions: array[int] | None) -> None:
        """Send lines, or keep them until there are enough.

        Args:
            block: whole lines.
            count: how many.
            first: number of the first row of the portion that they are of.
            positions: of the lines' rows in that portion; None for all of them.
        """
        self._starts.append(self._lines)
        self._numbers.append((first, positions))
        self._lines += count
        self.rows += count
        self._pending.append(block)
        self._pending_bytes += len(block)
        if self._pending_bytes >= BLOCK_BYTES:
            self._send()
        if self._segment_bytes >= SEGMENT_BYTES:
            self._end_copy()
            self._talk(self._copy_in(self._command))

    def finish(self) -> None:
        """Send what is left and end the COPY: afterwards the server has accepted every row.

        Raises:
            sqlalchemy.exc.DBAPIError: it refuses one, or the connection was lost.
            ShardUnavailable: it was silent for too long.
        """
        self._end_copy()

    def commit(self) -> None:
        """Commit, and give the connection back."""
        self._conn.commit()
        self._conn.close()

    def abort(self) -> None:
        """Nothing of the transaction is kept. Closes the connection: that waits for nobody."""
        if not self._conn.closed:
            self._conn.invalidate()
            self._conn.close()

    # -- talking --------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        whole = memoryview(b"".join(self._pending))
        self._segment_bytes += len(whole)
        self._pending.clear()
        self._pending_bytes = 0
        for start in range(0, len(whole), _PIECE_BYTES):
            self._talk(generators.copy_to(self._driver.pgconn, whole[start : start + _PIECE_BYTES]))

    def _end_copy(self) -> None:
        if self._pending:
            self._send()
        self._talk(generators.copy_end(self._driver.pgconn, None))
        self._segment_bytes = self._lines = 0
        self._starts.clear()
        self._numbers.clear()

    def _copy_in(self, command: str) -> Generator[Any, Any, None]:
        pgconn = self._driver.pgconn
        pgconn.send_query(command.encode())
        results = yield from generators.execute(pgconn)
        if results[-1].status != ExecStatus.COPY_IN:
            raise pg.error_from_result(results[-1])

    def _talk(self, generator: Generator[Any, Any, T]) -> T:
        try:
            return drive(self._driver, limited(generator, self._stall_timeout_s, _stalled))
        except _Stalled:
            raise ShardUnavailable(
                self.shard.name, f"it took no data and gave no answer for {self._stall_timeout_s:g} s"
            ) from None
        except psycopg.Error as error:
            raise self._explained(error) from error

    def _explained(self, error: psycopg.Error) -> Exception:
        """The driver's error as SQLAlchemy shows it, with the row's number where the server tells the line."""
        shown = DBAPIError.instance(
            self._command, None, error, psycopg.Error,
            connection_invalidated=lost_connection(error), dialect=self._conn.dialect,
        )  # fmt: skip
        found = _LINE.search(error.diag.context or "")
        what = f"row {self._row_of(int(found[1]))} of the load" if found and self._starts else "the load"
        locate(shown, f"shard {self.shard.name!r} refused {what}")
        return shown

    def _row_of(self, line: int) -> int:
        at = bisect_right(self._starts, line - 1) - 1
        first, positions = self._numbers[at]
        offset = line - 1 - self._starts[at]
        if positions is None:
            return first + offset
        return first + positions[min(offset, len(positions) - 1)]


class _Stalled(Exception):  # noqa: N818 - an answer to act on
    """One talk with the server took too long."""


def _stalled() -> NoReturn:
    raise _Stalled
