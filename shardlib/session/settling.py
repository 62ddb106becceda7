"""The recovery of two-phase commits: parts that are prepared and whose session is gone, and decisions left behind.

Whoever finds a prepared part asks its decider: it first *writes* `abort` there unless a verdict is there already,
so a session that is merely slow finds its own decision refused instead of overruled.
(Presumed abort with the last-agent optimisation: Gray and Reuter, "Transaction Processing", 1993, chapter 10.)

A session deletes its decision once all its parts are committed. What it leaves behind goes here, by this rule: **a
decision may go only when nobody can need it any more.**

- `commit` is needed while a part is prepared anywhere: without it, that part would be aborted. All parts were
  prepared before the decision was written. So the decisions are read first, then the newest topology from the
  catalog, then the prepared parts of every shard of it. A decision goes if none of its parts was seen, and only if
  every shard answered: one that does not answer may hold a part. A shard that has left the cluster holds none: its
  gates could not have been closed under a prepared transaction.
- `abort` is needed, besides, while its session could still write `commit` in its place. It would do that in a
  transaction of the decider that began before the part was prepared; so `abort` stays while such an old one runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.abc import PQGen

from shardlib.dsn import scrub
from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError
from shardlib.fence.gate import check_control
from shardlib.shard.connect import explain
from shardlib.topology import Shard, Topology
from shardlib.waits import ThreadWaits, Waits

__all__ = ["Settled", "gid_of", "settle", "settle_parts"]

T = TypeVar("T")

_log = logging.getLogger("shardlib.twophase")
_PREFIX: Final = "shardlib"
_SIDE_BY_SIDE: Final = 16
_FORGET_MAX: Final = 10_000
"""Decisions of one shard that one call looks at."""
_ABORT_STAYS_S: Final = 60.0
"""How long `abort` stays at least. By so much, too, may the decider's clock be set back and the rule still hold."""

_CONTROL = """
    SELECT pg_is_in_recovery(), schema_version, cluster_id, shard_id FROM shardlib.control"""
_PARTS = """
    SELECT gid, prepared <= now() - make_interval(secs => %s) FROM pg_prepared_xacts
     WHERE database = current_database() AND gid LIKE %s"""
# A backend that this role may not look at shows no xact_start; its locks show that it is in a transaction.
_DECIDED = """
    SELECT txid FROM shardlib.decision AS decided
     WHERE decided_at <= now() - make_interval(secs => %(older)s)
       AND (verdict = 'commit'
            OR decided_at <= now() - make_interval(secs => %(stays)s)
               AND NOT EXISTS (
                   SELECT FROM pg_locks JOIN pg_stat_activity AS backend USING (pid)
                    WHERE locktype = 'virtualxid' AND pid <> pg_backend_pid() AND datname = current_database()
                      AND (xact_start IS NULL
                           OR xact_start <= decided.decided_at + make_interval(secs => %(stays)s))))
     LIMIT %(most)s"""


def gid_of(txid: str, decider: str, shard: str) -> str:
    """The global id of one shard's part: it names the decider, so that anybody can settle it."""
    return f"{_PREFIX}:{txid}:{decider}:{shard}"


def _names(gid: str) -> tuple[str, str]:
    """The transaction and the decider that a global id names; empty where it names none."""
    _, txid, decider, *_ = (*gid.split(":"), "", "")
    return txid, decider


@dataclass(frozen=True, slots=True)
class Settled:
    """A prepared transaction that was left in doubt, and how it ended; or a shard that could not be looked at."""

    shard: str
    gid: str
    """Its global id. Empty: the shard could not be looked at, and what is in doubt there is not known."""
    verdict: str
    """`commit` or `abort`; `pending` if it is in doubt still."""
    reason: str = ""
    """Of one that is `pending`: why."""
    remedy: str = ""
    """Of one that is `pending`: what to do."""


class _Why(NamedTuple):
    reason: str
    remedy: str


@dataclass(slots=True)
class _Visit:
    shard: Shard
    entries: list[Settled] = field(default_factory=list)
    decided: list[str] = field(default_factory=list)
    """Decisions of this shard that may go, if no part of them is left anywhere."""


def settle(
    topology: Topology, *, older_than_s: float, timeout_s: float = 5.0, newest: Callable[[], Topology] | None = None
) -> list[Settled]:
    """Finish the prepared transactions that lost their session. Safe to run anywhere, any number of times at once.

    Blocking; opens its own connections, to 16 shards at a time. A shard that does not answer, and a part that cannot
    be settled, hold up none of the others: each is an entry of the answer. A part whose decider cannot be reached
    stays as it is. Then deletes the decisions that nobody can need any more, if every shard answered.

    Settles by the newest topology alone: by an older one it could ask, and write `abort`, where the decider was before
    its primary changed.

    Args:
        topology: the cluster as far as it is known.
        older_than_s: seconds since it was prepared, by the shard's clock; younger ones are left to their session.
        timeout_s: seconds to connect, and for each statement.
        newest: asks the catalog for the topology. If it does not answer, nothing is settled. None: `topology` is the
            newest, and no decision is deleted.

    Returns:
        One entry for each transaction in doubt, and for each shard that could not be looked at.
    """
    if newest is not None:
        try:
            topology = newest()
        except ShardlibError as error:
            why = _unknown(error)
            return [_pending(shard, "", why) for shard in topology.shards]
    # This thread works as well.
    with closing(ThreadWaits(_SIDE_BY_SIDE - 1)) as waits:
        visits = waits.run_all([partial(_visit, topology, shard, older_than_s, timeout_s) for shard in topology.shards])
        if newest is not None:
            _forget(waits, visits, timeout_s, newest)
    return [entry for visit in visits for entry in visit.entries]


def settle_parts(newest: Callable[[], Topology], parts: Sequence[tuple[Shard, str]], timeout_s: float) -> bool:
    """Settle these parts of one transaction, each on a new connection, side by side; whether none is in doubt now.

    By the topology that `newest` reads; if that raises a `ShardlibError`, all of them stay in doubt.
    """
    if not parts:
        return True
    try:
        topology = newest()
    except ShardlibError as error:
        for shard, gid in parts:
            _pending(shard, gid, _unknown(error))
        return False
    now = {shard.id: shard for shard in topology.shards}
    with closing(ThreadWaits(_SIDE_BY_SIDE - 1)) as waits:
        found = waits.run_all(
            [partial(_settle_part, topology, now.get(shard.id, shard), gid, timeout_s) for shard, gid in parts]
        )
    return all(found)


def _settle_part(topology: Topology, shard: Shard, gid: str, timeout_s: float) -> bool:
    try:
        with _connect(topology, shard, timeout_s) as conn:
            entry = _settle_one(topology, shard, conn, gid, timeout_s, {})
    except Exception as error:  # noqa: BLE001 - logged, whatever it is: the transaction may be decided already
        entry = _pending(shard, gid, _why(shard, error))
    return entry is None or entry.verdict != "pending"


def _visit(topology: Topology, shard: Shard, older_than_s: float, timeout_s: float) -> _Visit:
    visit = _Visit(shard)
    left: list[str] | None = None
    silent: dict[str, _Why] = {}
    while left is None or left:
        try:
            with _connect(topology, shard, timeout_s) as conn:
                if left is None:
                    left = [gid for gid, is_old in _parts(conn, older_than_s) if is_old]
                while left and not conn.closed:
                    entry = _settle_one(topology, shard, conn, left.pop(0), timeout_s, silent)
                    if entry is not None:
                        visit.entries.append(entry)
                if not conn.closed:
                    ages = {"older": older_than_s, "stays": _ABORT_STAYS_S, "most": _FORGET_MAX}
                    visit.decided = [str(txid) for (txid,) in conn.execute(_DECIDED, ages).fetchall()]
        except Exception as error:  # noqa: BLE001 - an entry of the answer, whatever it is: the others go on
            why = _why(shard, error)
            visit.entries += [_pending(shard, gid, why) for gid in left or [""]]
            break
    return visit


def _parts(conn: _Patient, older_than_s: float) -> list[tuple[str, bool]]:
    found = conn.execute(_PARTS, (older_than_s, f"{_PREFIX}:%")).fetchall()
    return [(str(gid), bool(is_old)) for gid, is_old in found]


def _settle_one(
    topology: Topology, shard: Shard, conn: _Patient, gid: str, timeout_s: float, silent: dict[str, _Why]
) -> Settled | None:
    """Settle one part; None if somebody else did meanwhile, and how is not known.

    `silent`: the deciders that did not answer so far; none of them is waited for twice.
    """
    verdict = _ask(topology, gid, timeout_s, silent)
    if isinstance(verdict, _Why):
        return _pending(shard, gid, verdict)
    if verdict is None:
        return None
    verb = "COMMIT" if verdict == "commit" else "ROLLBACK"
    try:
        conn.execute(sql.SQL("{} PREPARED {}").format(sql.SQL(verb), gid))
    except pg.UndefinedObject:
        # Its session, or another settler, was faster. It may have deleted a decision to commit before we asked.
        return Settled(shard.name, gid, verdict) if verdict == "commit" else None
    except Exception as error:  # noqa: BLE001 - an entry of the answer, whatever it is: the others go on
        reason, remedy = _why(shard, error)
        return _pending(shard, gid, _Why(f"{verb} PREPARED failed: {reason}", remedy))
    _log.info("settled %s on shard %s: %s", gid, shard.name, verdict)
    return Settled(shard.name, gid, verdict)


def _ask(topology: Topology, gid: str, timeout_s: float, silent: dict[str, _Why]) -> str | _Why | None:
    """The verdict of the decider that a global id names, or why there is none."""
    txid, decider_id = _names(gid)
    if decider_id in silent:
        return silent[decider_id]
    try:
        decider = topology.shard_by_id(decider_id)
    except KeyError:
        return _Why(
            f"its global id names the decider {decider_id!r}, which is no shard of this cluster",
            "find out who prepared it (pg_prepared_xacts), then end it by hand: COMMIT PREPARED or ROLLBACK PREPARED",
        )
    try:
        return _verdict(topology, decider, txid, timeout_s)
    except Exception as error:  # noqa: BLE001 - an entry of the answer, whatever it is: the others go on
        reason, remedy = _why(decider, error)
        why = silent[decider_id] = _Why(f"its decider, shard {decider.name!r}, gives no verdict: {reason}", remedy)
        return why


def _verdict(topology: Topology, decider: Shard, txid: str, timeout_s: float) -> str | None:
    """The decider's verdict, `abort` if it had none. None: it was deleted just now, so no part of it is left."""
    with _connect(topology, decider, timeout_s) as conn:
        insert = "INSERT INTO shardlib.decision (txid, verdict) VALUES (%s, 'abort') ON CONFLICT DO NOTHING"
        conn.execute(insert, (txid,))
        found = conn.execute("SELECT verdict FROM shardlib.decision WHERE txid = %s", (txid,)).fetchone()
    return None if found is None else str(found[0])


def _pending(shard: Shard, gid: str, why: _Why) -> Settled:
    what = gid or "what is in doubt"
    _log.warning("%s stays as it is on shard %s: %s; %s", what, shard.name, why.reason, why.remedy)
    return Settled(shard.name, gid, "pending", why.reason, why.remedy)


def _unknown(error: ShardlibError) -> _Why:
    """Why nothing is settled while the newest topology cannot be had."""
    return _Why(
        f"the catalog does not tell where the primaries are now: {error}",
        "settle again once it answers; engines with two-phase sessions do so by themselves",
    )


def _why(shard: Shard, error: Exception) -> _Why:
    """What stands in the way on this shard, without secrets, and the way out."""
    if isinstance(error, InvalidArgument):
        return _Why(
            str(error),
            f"correct the DSN of shard {shard.name!r} in the catalog, or set what it refers to for this process",
        )
    if isinstance(error, InvalidTopology):
        return _Why(error.problem, error.way_out)
    if isinstance(error, pg.UndefinedTable | pg.InvalidSchemaName):
        return _Why(
            _text(shard, error),
            f"correct the DSN of shard {shard.name!r} in the catalog if it leads elsewhere, or install its schema: "
            "engine.create_all",
        )
    if isinstance(error, pg.InsufficientPrivilege):
        return _Why(_text(shard, error), "settle as the role that prepared it, or as a superuser")
    if isinstance(error, psycopg.Error) and error.sqlstate is None:
        text, _ = explain(error, shard.primary)
        return _Why(text, "settle again once the shard answers; engines with two-phase sessions do so by themselves")
    return _Why(_text(shard, error), f"look at the log of the server of shard {shard.name!r}, then settle again")


def _text(shard: Shard, error: Exception) -> str:
    return scrub(f"{type(error).__name__}: {' '.join(str(error).split())}", shard.primary.reveal())


# -- decisions that nobody needs any more -------------------------------------------------------------------------


def _forget(waits: Waits, visits: Sequence[_Visit], timeout_s: float, newest: Callable[[], Topology]) -> None:
    """Delete the decisions of which no part is prepared anywhere: see the rule at the top of this module."""
    decided = [visit for visit in visits if visit.decided]
    if not decided:
        return
    try:
        topology = newest()  # after the decisions were read: it names every shard that can hold a part of them
    except ShardlibError as error:
        _log.info("decisions of two-phase commits stay until the catalog answers: %s", error)
        return
    try:
        of_shards = waits.run_all([partial(_prepared, topology, shard, timeout_s) for shard in topology.shards])
    except (psycopg.Error, ShardlibError) as error:
        _log.info("decisions of two-phase commits stay until every shard answers: %s", type(error).__name__)
        return
    needed = frozenset[str]().union(*of_shards)
    waits.run_all([partial(_delete, topology, visit, needed, timeout_s) for visit in decided])


def _prepared(topology: Topology, shard: Shard, timeout_s: float) -> frozenset[str]:
    with _connect(topology, shard, timeout_s) as conn:
        return frozenset(_names(gid)[0] for gid, _ in _parts(conn, 0.0))


def _delete(topology: Topology, visit: _Visit, needed: frozenset[str], timeout_s: float) -> None:
    done = [txid for txid in visit.decided if txid not in needed]
    if not done:
        return
    try:
        with _connect(topology, visit.shard, timeout_s) as conn:
            conn.execute("DELETE FROM shardlib.decision WHERE txid = ANY(%s)", (done,))
    except (psycopg.Error, ShardlibError) as error:
        _log.warning("decisions stay behind on shard %s: %s", visit.shard.name, _why(visit.shard, error).reason)


# -- connections --------------------------------------------------------------------------------------------------


class _Patient(psycopg.Connection[tuple[object, ...]]):
    """A connection that waits for each answer within a limit of its own: a frozen server keeps no limit of its."""

    patience_s: float = 5.0

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, self.patience_s if timeout is None else timeout)
        except pg._WaitTimeout:  # noqa: SLF001 - psycopg asks its callers to convert it
            self.pgconn.finish()
            raise psycopg.OperationalError(f"no answer within {self.patience_s:g} s") from None


def _connect(topology: Topology, shard: Shard, timeout_s: float) -> _Patient:
    """A connection to the shard's primary, and to no other database: what is asked there decides about rows.

    Raises:
        InvalidArgument: the password refers to something that is not there.
        InvalidTopology: the server is a standby, or the database is not this shard's.
        psycopg.Error: no answer.
    """
    conn = _Patient.connect(
        # Nothing that PgBouncer would refuse: no startup options.
        shard.primary.conninfo(connect_timeout=max(2, round(timeout_s)), application_name="shardlib settle"),
        autocommit=True,
        prepare_threshold=None,
    )
    conn.patience_s = timeout_s
    try:
        row = conn.execute(_CONTROL).fetchone()
        standby, version, cluster_id, shard_id = row or (False, 0, "", "")
        if standby:
            raise InvalidTopology(
                f"the server of shard {shard.name!r} is a standby, which shows no prepared transactions",
                "correct the DSN of its primary in the catalog, or promote the standby",
            )
        found = (int(str(version)), str(cluster_id), str(shard_id))
        check_control(found, cluster_id=topology.cluster_id, shard_id=shard.id, shard_name=shard.name)
    except BaseException:
        conn.close()
        raise
    return conn
