"""COMMIT and PREPARE TRANSACTION that tell the truth: what they report as kept is kept, or is said to be unknown."""

from __future__ import annotations

import asyncio
from typing import Final

import psycopg
from psycopg import errors as pg
from psycopg.abc import PQGen

from shardlib.errors import UnsupportedOperation
from shardlib.fence.gated import Gated
from shardlib.fence.talking import IDLE, INERROR
from shardlib.fence.verdict import commit_outcome_unknown

__all__ = ["Ending", "UnknownCommit", "has_ended", "outcome_of"]

_COMMIT_AFTER_CANCEL_S: Final = 30.0


class UnknownCommit(psycopg.OperationalError):
    """COMMIT was sent and its outcome is unknown; the engine shows it as `CommitOutcomeUnknown`.

    A driver error here, so that SQLAlchemy sees a lost connection as one and lets go of it.
    """


class Ending(Gated):
    """No commit that claims too much."""

    _unreplicated: bool = False
    only_read: bool = False
    """Set while a COMMIT is sent that has nothing to keep: one without an answer is a lost connection and no more."""

    def prepare_transaction(self, command: bytes) -> PQGen[None]:
        """Send a PREPARE TRANSACTION, and believe it only if the server says that it did so.

        Raises:
            psycopg.errors.InFailedSqlTransaction: the transaction had failed or ended. PostgreSQL answers ROLLBACK
                then, and no error: nothing would be kept, and the other shards committed.
            psycopg.OperationalError: a synchronous replica may not have it.
            psycopg.Error: any other error that the server answers.
        """
        self._unreplicated = False
        tag = yield from self.message(command)
        if tag != b"PREPARE TRANSACTION":
            raise pg.InFailedSqlTransaction(
                f"the transaction on shard {self.shard_name!r} has failed or ended and cannot be prepared; "
                "roll it back and run it again"
            )
        self.uncommitted = False  # from here on it ends by its global id
        if self._unreplicated:
            raise psycopg.OperationalError("the wait for a synchronous replica was cancelled while preparing")

    def _commit_gen(self) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        status = self.pgconn.transaction_status
        if status == IDLE:
            if self.uncommitted and self.sealed:
                raise has_ended(self.shard_name)
            return
        self._check_connection_ok()  # lost before COMMIT was sent: certainly not committed
        if status == INERROR:
            # PostgreSQL would answer COMMIT with ROLLBACK and no error: nothing would be kept, and nobody told.
            raise pg.InFailedSqlTransaction(
                "the transaction has failed and cannot be committed; roll it back and run it again"
            )
        self._unreplicated = False
        tally = None if self.only_read else self.tally
        if tally is not None:
            tally.kept += 1  # from now on it may be, whoever asks and whatever interrupts this
        try:
            yield from super()._commit_gen()
        except psycopg.Error as error:
            if commit_outcome_unknown(error):
                if self.only_read:
                    raise
                raise UnknownCommit(str(error).strip() or type(error).__name__) from error
            if tally is not None:
                tally.kept -= 1
            raise
        self.uncommitted = False
        if self._unreplicated and not self.only_read:
            raise UnknownCommit("the wait for a synchronous replica was cancelled; the primary alone has it")

    def _see_notice(self, diagnostic: pg.Diagnostic) -> None:
        if diagnostic.sqlstate == "01000" and diagnostic.source_function == "SyncRepWaitForLSN":
            self._unreplicated = True


def has_ended(shard_name: str) -> UnsupportedOperation:
    """The refusal to commit what the application has ended past the session: it was rolled back, or prepared."""
    return UnsupportedOperation(
        f"the transaction on shard {shard_name!r} has ended already",
        "end it by the session or connection alone: commit() or rollback()",
    )


async def outcome_of(running: asyncio.Future[None]) -> None:
    """Wait for a COMMIT whose caller was cancelled, within a limit; raises its error, if it has one."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _COMMIT_AFTER_CANCEL_S
    while not running.done() and (remaining := deadline - loop.time()) > 0:
        try:
            await asyncio.wait([running], timeout=remaining)
        except asyncio.CancelledError:
            continue  # cancelled once more: the outcome still matters more
    if not running.done():
        running.cancel()
        raise UnknownCommit(f"cancelled, and no answer came within {_COMMIT_AFTER_CANCEL_S:g} s after that")
    running.result()
