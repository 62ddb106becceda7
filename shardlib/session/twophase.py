"""Writes on several shards, committed together.

The last of the writing shards (by id) is the *decider*. The others are prepared (`PREPARE TRANSACTION`); then the
decider commits its own part together with a row in `shardlib.decision`: that one commit is the decision, durable
before anybody acts on it. Then the others are committed (`COMMIT PREPARED`).

Whoever finds a prepared transaction whose session is gone asks the decider: it first *writes* `abort` there unless
a verdict is there already, so a session that is merely slow finds its own decision refused instead of overruled.
(Presumed abort with the last-agent optimisation: Gray and Reuter, "Transaction Processing", 1993, chapter 10.)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from uuid import uuid4

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.abc import PQGen
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from shardlib.errors import InvalidTopology, UnsupportedOperation
from shardlib.fence.connection import AsyncFencedConnection, FencedConnection, drive
from shardlib.session.core import Core, as_sqlalchemy
from shardlib.session.unit import Leg, Unit
from shardlib.topology import Shard, Topology
from shardlib.waits import ThreadWaits

__all__ = ["Settled", "TwoPhase", "settle"]

T = TypeVar("T")

_log = logging.getLogger("shardlib.twophase")
_PREFIX = "shardlib"
_FINISH_S = 5.0
_SIDE_BY_SIDE = 16


def gid_of(txid: str, decider: str, shard: str) -> str:
    """The global id of one shard's part: it names the decider, so that anybody can settle it."""
    return f"{_PREFIX}:{txid}:{decider}:{shard}"


def _command(driver: FencedConnection | AsyncFencedConnection, command: sql.Composed | sql.SQL) -> None:
    drive(driver, driver.message(command.as_bytes(driver)))


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
        *others, decider = (unit.legs[shard_id] for shard_id in sorted(unit.writes))
        self._txid, self._decider = uuid4().hex, decider
        try:
            self._core.waits.run_all([partial(self._prepare, leg) for leg in others])
            decision = sql.SQL("INSERT INTO shardlib.decision (txid, verdict) VALUES ({}, 'commit')")
            with as_sqlalchemy(decider.connection):
                _command(decider.connection.driver, decision.format(self._txid))
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

        A part whose connection is lost is asked for once more on a new one; if that fails too, it is left to `settle`.
        """
        decider = self._decider
        if decider is None:
            return
        while self._prepared and self._act(self._prepared[-1], "COMMIT"):
            self._prepared.pop()  # not before: if this is interrupted, `resolve` carries on
        if self._prepared and not self.resolve():
            _log.warning("transaction %s is decided (commit) but not yet visible on every shard", self._txid)
            return
        self._decider = None
        forget = sql.SQL(
            "BEGIN; SET LOCAL synchronous_commit = 'off'; DELETE FROM shardlib.decision WHERE txid = {}; COMMIT"
        ).format(self._txid)
        try:
            _command(decider.connection.driver, forget)
        except psycopg.Error as error:
            _log.info("the decision of transaction %s stays behind: %s", self._txid, type(error).__name__)

    def abort(self) -> None:
        """Before the decision was asked for: roll the prepared parts back."""
        self._prepared = [leg for leg in self._prepared if not self._act(leg, "ROLLBACK")]
        self.resolve()  # what has lost its connection

    def resolve(self) -> bool:
        """The transaction ended and parts of it are still prepared: let the decider's record decide.

        Its COMMIT may have been refused, never sent, or have had no answer, or what follows it was interrupted; in
        each case the verdict written at the decider is the truth, and `abort` is written there first if there is
        none. False if a part, or the decider, does not answer.
        """
        decider, prepared = self._decider, self._prepared
        if decider is None:
            return True
        parts = [(leg.shard, self._gid(leg)) for leg in prepared]
        self._decider, self._prepared = None, []
        return self._core.waits.call(_settle_parts, self._core.cache.current, parts)

    def _act(self, leg: Leg, verb: str) -> bool:
        command = sql.SQL("{} PREPARED {}").format(sql.SQL(verb), self._gid(leg))
        try:
            _command(leg.connection.driver, command)
        except pg.UndefinedObject:
            return True  # it never got as far as being prepared, or somebody settled it already
        except (psycopg.Error, SQLAlchemyError) as error:  # SQLAlchemy's, of a connection that was given up
            _log.info("%s PREPARED on %s: %s", verb, leg.shard.name, type(error).__name__)
            return False
        return True


@dataclass(frozen=True, slots=True)
class Settled:
    """A prepared transaction that was left in doubt, and how it ended."""

    shard: str
    gid: str
    verdict: str
    """`commit` or `abort`; `pending` if its decider did not answer."""


def settle(topology: Topology, *, older_than_s: float, timeout_s: float = 5.0) -> list[Settled]:
    """Finish the prepared transactions that lost their session. Safe to run anywhere, any number of times at once.

    Blocking; opens its own connections, to 16 shards at a time. A shard that does not answer holds up none of the
    others. A part whose decider cannot be reached stays as it is.

    Args:
        topology: the cluster.
        older_than_s: seconds since it was prepared, by the shard's clock; younger ones are left to their session.
        timeout_s: seconds to connect, and for each statement.

    Returns:
        One entry for each transaction in doubt.
    """
    # This thread works as well.
    with closing(ThreadWaits(_SIDE_BY_SIDE - 1)) as waits:
        found = waits.run_all(
            [partial(_settle_shard, topology, shard, older_than_s, timeout_s) for shard in topology.shards]
        )
    return [settled for of_shard in found for settled in of_shard]


def _settle_shard(topology: Topology, shard: Shard, older_than_s: float, timeout_s: float) -> list[Settled]:
    done: list[Settled] = []
    silent: set[str] = set()
    try:
        with _connect(shard, timeout_s) as conn:
            rows = conn.execute(
                "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() AND gid LIKE %s"
                " AND prepared <= now() - make_interval(secs => %s)",
                (f"{_PREFIX}:%", older_than_s),
            ).fetchall()
            for (gid,) in rows:
                done.append(_settle_one(topology, shard, conn, gid, timeout_s, silent))
    except psycopg.Error as error:
        _log.warning("in-doubt transactions of shard %s: %s", shard.name, type(error).__name__)
    return done


def _settle_parts(topology: Topology, parts: Sequence[tuple[Shard, str]]) -> bool:
    settled = True
    silent: set[str] = set()
    for shard, gid in parts:
        try:
            with _connect(shard, _FINISH_S) as conn:
                settled &= _settle_one(topology, shard, conn, gid, _FINISH_S, silent).verdict != "pending"
        except psycopg.Error as error:
            settled = False
            _log.warning("%s is in doubt on shard %s until it answers: %s", gid, shard.name, type(error).__name__)
    return settled


class _Patient(psycopg.Connection[tuple[object, ...]]):
    """A connection that waits for each answer within a limit of its own: a frozen server keeps no limit of its."""

    patience_s: float = 5.0

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, self.patience_s if timeout is None else timeout)
        except pg._WaitTimeout:  # noqa: SLF001 - psycopg asks its callers to convert it
            self.pgconn.finish()
            raise psycopg.OperationalError(f"no answer within {self.patience_s:g} s") from None


def _connect(shard: Shard, timeout_s: float) -> _Patient:
    conn = _Patient.connect(
        # Nothing that PgBouncer would refuse: no startup options.
        shard.primary.conninfo(connect_timeout=max(2, round(timeout_s)), application_name="shardlib settle"),
        autocommit=True,
        prepare_threshold=None,
    )
    conn.patience_s = timeout_s
    return conn


def _settle_one(
    topology: Topology, shard: Shard, conn: _Patient, gid: object, timeout_s: float, silent: set[str]
) -> Settled:
    """Settle one part. `silent`: the deciders that did not answer so far; none of them is waited for twice."""
    _, txid, decider_id, *_ = (*str(gid).split(":"), "", "")
    if decider_id in silent:
        return Settled(shard.name, str(gid), "pending")
    try:
        with _connect(topology.shard(decider_id), timeout_s) as decider:
            decider.execute(
                "INSERT INTO shardlib.decision (txid, verdict) VALUES (%s, 'abort') ON CONFLICT DO NOTHING", (txid,)
            )
            found: Sequence[object] | None = decider.execute(
                "SELECT verdict FROM shardlib.decision WHERE txid = %s", (txid,)
            ).fetchone()
    except (psycopg.Error, InvalidTopology) as error:
        silent.add(decider_id)
        _log.warning("the decider of %s does not answer, or is not of this cluster: %s", gid, type(error).__name__)
        return Settled(shard.name, str(gid), "pending")
    verdict = str(found[0]) if found else "pending"
    if verdict != "pending":
        verb = "COMMIT" if verdict == "commit" else "ROLLBACK"
        try:
            conn.execute(sql.SQL("{} PREPARED {}").format(sql.SQL(verb), str(gid)))
        except pg.UndefinedObject:
            pass  # its session, or another settler, was faster
        _log.info("settled %s on shard %s: %s", gid, shard.name, verdict)
    return Settled(shard.name, str(gid), verdict)
