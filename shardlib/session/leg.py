"""The part of a transaction that runs on one shard: its connection, the gates it holds, and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from psycopg import IsolationLevel
from sqlalchemy.exc import SQLAlchemyError

from shardlib.errors import CommitOutcomeUnknown
from shardlib.fence.connection import drive
from shardlib.session.core import as_sqlalchemy
from shardlib.shard import ShardConnection
from shardlib.topology import Shard

__all__ = ["Leg"]

_log = logging.getLogger("shardlib.session")
_HAS_WRITTEN: Final = b"SELECT 1 WHERE pg_catalog.txid_current_if_assigned() IS NOT NULL"


class Leg:
    """The part of a transaction that runs on one shard."""

    __slots__ = ("_gates", "at_begin", "connection", "listened", "shard")

    def __init__(self, shard: Shard, connection: ShardConnection, gates: tuple[int, ...]) -> None:
        self.shard, self.connection = shard, connection
        self.at_begin = frozenset(gates)
        self._gates = self.at_begin
        self.listened = False
        """Whether listeners of `after_begin` were given the connection, of a transaction on several shards."""

    @property
    def gates(self) -> frozenset[int]:
        """The gates that are certainly held: without those that went with a savepoint, whoever rolled it back."""
        if len(self._gates) != len(self.at_begin):
            driver = self.connection.driver
            if driver.savepoint_undone:
                self.savepoint_ended()
        return self._gates

    def took(self, gates: Iterable[int]) -> None:
        """Gates that were locked just now."""
        self.connection.driver.savepoint_undone = False
        self._gates = self._gates.union(gates)

    def savepoint_ended(self) -> None:
        """Forget gates taken since the transaction began: PostgreSQL lets go of them with a savepoint."""
        self._gates = self.at_begin

    @property
    def locks_to_the_end(self) -> bool:
        """Whether row locks taken here must outlast the writes on other shards.

        A serializable transaction may fail as it commits, and so is committed before them.
        """
        return self.connection.locks and self.connection.driver.isolation_level != IsolationLevel.SERIALIZABLE

    def send(self, command: bytes) -> None:
        """Send a command whose rows do not matter; errors are SQLAlchemy's."""
        driver = self.connection.driver
        with as_sqlalchemy(self.connection):
            drive(driver, driver.message(command))

    @property
    def shared(self) -> bool:
        """Whether somebody else has had the connection, and may have written by text that nobody has read."""
        return self.listened or self.connection.handed_out

    def may_have_written(self) -> bool:
        """Whether something was written here, or locked: the server is asked where somebody else could do so."""
        if not self.shared:
            return False
        driver = self.connection.driver
        with as_sqlalchemy(self.connection):
            return drive(driver, driver.one_row(_HAS_WRITTEN)) is not None

    def end_read(self) -> None:
        """Commit what was only read. A connection lost meanwhile is no unknown outcome: there is nothing to lose."""
        driver = self.connection.driver
        driver.only_read = not self.may_have_written()
        try:
            self.connection._commit_impl()  # noqa: SLF001 - keeps SQLAlchemy's errors
        finally:
            driver.only_read = False
            self.connection.ended = True

    def let_go(self) -> bool:
        """Commit what was only read, after the writes are committed: nothing that happens here undoes them.

        False if rows are lost, or may be, that somebody else has written.
        """
        try:
            self.end_read()
        except (SQLAlchemyError, CommitOutcomeUnknown) as error:
            _log.info("shard %s, only read, failed after the commit: %s", self.shard.name, type(error).__name__)
            self.connection.given_up = True
            if not self.connection.invalidated:
                self.connection.invalidate(error)
            return not self.shared
        return True
