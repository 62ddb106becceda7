"""Writes on several shards, committed together.

The last of the writing shards (by id) is the *decider*. The others are prepared (`PREPARE TRANSACTION`); then the
decider commits its own part together with a row in `shardlib.decision`: that one commit is the decision, durable
before anybody acts on it. Then the others are committed (`COMMIT PREPARED`), and the decision is deleted.

What a session leaves behind, parts in doubt and decisions, is settled by anybody: see `settling`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal
from uuid import uuid4

import psycopg
from psycopg import errors as pg
from psycopg import sql
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.util import await_only

from shardlib.errors import UnsupportedOperation
from shardlib.fence.connection import AsyncFencedConnection, FencedConnection, drive
from shardlib.session.core import Core, as_sqlalchemy
from shardlib.session.settling import gid_of, settle_parts
from shardlib.session.unit import Leg, Unit
from shardlib.topology import Topology

__all__ = ["TwoPhase"]

_log = logging.getLogger("shardlib.twophase")
_FINISH_S: Final = 5.0
"""How long one answer is waited for, in what follows the decision or takes it back."""
_DECIDE: Final = sql.SQL("""
    INSERT INTO shardlib.decision (txid, verdict) VALUES ({}, 'commit');
    SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'
""")
"""The others commit as soon as the decision is acknowledged: a crash of its server must not take it back."""


def _command(driver: FencedConnection | AsyncFencedConnection, command: sql.Composed | sql.SQL) -> None:
    drive(driver, driver.message(command.as_bytes(driver)))


def _command_in_time(driver: FencedConnection | AsyncFencedConnection, command: sql.Composed | sql.SQL) -> None:
    """`_command`, within `_FINISH_S`: a frozen server closes no connection.

    Raises:
        psycopg.errors._WaitTimeout: no answer in time; the connection is closed.
        psycopg.Error: as `_command`.
    """
    try:
        answer: Any = driver.wait(driver.message(command.as_bytes(driver)), timeout=_FINISH_S)
        if driver.is_async:
            await_only(answer)
    except pg._WaitTimeout:  # noqa: SLF001 - what psycopg raises
        driver.pgconn.finish()
        raise


class TwoPhase:
    """Carries the transactions of one session through prepare, decision and commit."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._txid = ""
        self._decider: Leg | None = None
        self._prepared: list[Leg] = []

    def prepare(self, unit: Unit) -> None:
        """Prepare all writing shards but the decider, and write the decision into the decider's transaction.

        Raises:
            UnsupportedOperation: a server has `max_prepared_transactions = 0`.
            sqlalchemy.exc.DBAPIError: a shard refused; what was prepared has been rolled back.
        """
        if len(unit.writes) < 2:
            return
        decider = unit.decider
        others = [unit.legs[shard_id] for shard_id in sorted(unit.writes) if shard_id != decider.shard.id]
        self._txid, self._decider = uuid4().hex, decider
        try:
            self._core.waits.run_all([partial(self._prepare, leg) for leg in others])
            with as_sqlalchemy(decider.connection):
                _command(decider.connection.driver, _DECIDE.format(self._txid))
        except DBAPIError as error:
            self.abort()
            if isinstance(error.orig, pg.ObjectNotInPrerequisiteState):
                raise UnsupportedOperation(
                    "a shard has prepared transactions switched off", "set max_prepared_transactions on its server"
                ) from error
            raise
        except BaseException:
            self.abort()
            raise

    def _prepare(self, leg: Leg) -> None:
        # Noted before it is sent: if the answer is lost, the part is settled as if it had been prepared.
        self._prepared.append(leg)
        driver = leg.connection.driver
        command = sql.SQL("PREPARE TRANSACTION {}").format(self._gid(leg))
        with as_sqlalchemy(leg.connection):
            drive(driver, driver.prepare_transaction(command.as_bytes(driver)))

    def _gid(self, leg: Leg) -> str:
        assert self._decider is not None  # noqa: S101 - set before the first part is prepared
        return gid_of(self._txid, self._decider.shard.id, leg.shard.id)

    def finish(self) -> None:
        """After the decision is durable: commit the prepared parts.

        A part whose connection is lost is asked for once more on a new one. If that fails too, or a shard does not
        answer in time, the part is left to `settle`: the transaction is committed all the same.
        """
        decider = self._decider
        if decider is None:
            return
        silent = self._end_parts("COMMIT")
        resolved = not self._prepared or self.resolve()
        self._decider = None
        if silent or not resolved:
            _log.warning("transaction %s is decided (commit) but not yet visible on every shard", self._txid)
            return
        forget = sql.SQL(
            "BEGIN; SET LOCAL synchronous_commit = 'off'; DELETE FROM shardlib.decision WHERE txid = {}; COMMIT"
        ).format(self._txid)
        try:
            _command_in_time(decider.connection.driver, forget)
        except psycopg.Error as error:
            _log.info("the decision of transaction %s stays until it is settled: %s", self._txid, type(error).__name__)

    def abort(self) -> None:
        """Before the decision was asked for: roll the prepared parts back."""
        self._end_parts("ROLLBACK")
        # What has lost its connection. No server has decided to commit, so any topology will do.
        self._resolve(lambda: self._core.cache.current)

    def _end_parts(self, verb: Literal["COMMIT", "ROLLBACK"]) -> list[Leg]:
        """End the prepared parts, side by side. Those whose connection is lost stay in `_prepared`.

        Returns:
            Those whose shard does not answer: not asked for again, which would take as long, but left to `settle`.
        """
        silent: list[Leg] = []

        def end(leg: Leg) -> None:
            answer = self._act(leg, verb)
            if answer == "silent":
                silent.append(leg)
            if answer != "lost":
                self._prepared.remove(leg)  # not before: if this is interrupted, `resolve` carries on

        self._core.waits.run_all([partial(end, leg) for leg in self._prepared])
        return silent

    def resolve(self) -> bool:
        """The transaction ended and parts of it are still prepared: let the decider's record decide.

        Its COMMIT may have been refused, never sent, or have had no answer, or what follows it was interrupted; in
        each case the verdict written at the decider is the truth, and `abort` is written there first if there is
        none. False if a part, the decider, or the catalog (which tells where they are now) does not answer.
        """
        return self._resolve(self._core.refresh)

    def _resolve(self, newest: Callable[[], Topology]) -> bool:
        decider, prepared = self._decider, self._prepared
        if decider is None:
            return True
        parts = [(leg.shard, self._gid(leg)) for leg in prepared]
        self._decider, self._prepared = None, []
        return self._core.waits.call(settle_parts, newest, parts, _FINISH_S)

    def _act(self, leg: Leg, verb: Literal["COMMIT", "ROLLBACK"]) -> Literal["ended", "lost", "silent"]:
        command = sql.SQL("{} PREPARED {}").format(sql.SQL(verb), self._gid(leg))
        try:
            _command_in_time(leg.connection.driver, command)
        except pg.UndefinedObject:
            return "ended"  # it never got as far as being prepared, or somebody settled it already
        except pg._WaitTimeout:  # noqa: SLF001 - of `_command_in_time`
            _log.warning("%s PREPARED: no answer of shard %s within %g s", verb, leg.shard.name, _FINISH_S)
            return "silent"
        except (psycopg.Error, SQLAlchemyError) as error:  # SQLAlchemy's, of a connection that was given up
            _log.info("%s PREPARED on %s: %s", verb, leg.shard.name, type(error).__name__)
            return "lost"
        return "ended"
