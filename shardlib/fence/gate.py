"""Gates in a shard's database: install, open, close within a budget, list. For whoever changes the topology.

Everything here takes a blocking psycopg connection in autocommit mode to the shard's primary, of a role that owns
the schema `shardlib`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.rows import tuple_row

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.fence.holding import LOCK_HOLDERS
from shardlib.fence.sql import MIGRATIONS, SCHEMA_VERSION

__all__ = ["OPEN_GATES", "Closing", "Holder", "close_gate", "holders", "install", "list_gates", "open_gate"]

OPEN_GATES: Final = """
    SELECT substring(relname FROM 6)::bigint FROM pg_class
     WHERE relnamespace = to_regnamespace('shardlib') AND relkind = 'r' AND relname ~ '^gate_[0-9]+$' ORDER BY 1
"""
"""SQL of the numbers of the gates that are open in a database."""

_IS_THEIRS: Final = "relname ~ '^(control|decision|gate_[0-9]+|job_[0-9]+_keys)$'"
_THEIRS: Final = f"""
    SELECT relname FROM pg_class
     WHERE relnamespace = to_regnamespace('shardlib') AND relkind = 'r' AND {_IS_THEIRS} ORDER BY 1
"""
"""The tables that an application's role reads."""
# Earlier releases granted all tables that were there, and default privileges of the owner may do so.
_TOO_MUCH: Final = f"""
    SELECT DISTINCT relname, rolname
      FROM pg_class CROSS JOIN aclexplode(relacl) AS granted JOIN pg_roles r ON r.oid = grantee
     WHERE relnamespace = to_regnamespace('shardlib') AND relkind = 'r' AND NOT {_IS_THEIRS}
       AND grantee <> relowner AND rolname = ANY (SELECT unnest(app_roles) FROM shardlib.control)
"""
"""Tables beside these that roles of applications may do something with, and which roles."""
_INSTALL_LOCK = 0x5348_4152_444C_4942  # "SHARDLIB": only one session installs at a time


@dataclass(frozen=True, slots=True)
class Holder:
    """A transaction that holds a gate, and so keeps it from closing."""

    pid: int | None
    """Backend, None for a prepared transaction."""
    gid: str | None
    """Global id of a prepared transaction."""
    user: str
    application: str
    state: str
    age_s: float
    """Seconds since the transaction began (or was prepared), by the server's clock."""
    wait_event: str | None = None


@dataclass(frozen=True, slots=True)
class Closing:
    """How an attempt to close a gate ended."""

    closed: bool
    attempts: int
    elapsed_s: float
    holders: tuple[Holder, ...] = ()
    """Who held the gate when the budget ended; empty if it closed."""
    lsn: str | None = None
    """WAL flush position read after the commit of the drop; None if it did not close."""


def install(conn: psycopg.Connection[Any], *, cluster_id: str, shard_id: str, roles: Sequence[str] = ()) -> None:
    """Create or upgrade the schema `shardlib` in a shard's database; idempotent, also when run at once twice.

    Args:
        conn: autocommit connection to the shard's primary.
        cluster_id: identity of the cluster, as in the topology.
        shard_id: id of the shard that this database is.
        roles: the application's roles, which get USAGE on the schema, SELECT on its control row, the gates and the key
            tables of jobs, and what two-phase commit needs. The owner needs no grant.

    Raises:
        InvalidTopology: the database belongs to another cluster or shard, or its schema is newer than this library.
    """
    with conn.transaction(), conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute("SET LOCAL lock_timeout = '10s'")
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_INSTALL_LOCK,))
        cursor.execute("CREATE SCHEMA IF NOT EXISTS shardlib")
        found = _control_row(cursor)
        version = 0
        if found is not None:
            version = check_control(found, cluster_id=cluster_id, shard_id=shard_id, shard_name=shard_id)
        for migration in MIGRATIONS[version:]:
            cursor.execute(migration.encode())
        if found is None:
            cursor.execute(
                "INSERT INTO shardlib.control (schema_version, cluster_id, shard_id) VALUES (%s, %s, %s)",
                (SCHEMA_VERSION, cluster_id, shard_id),
            )
        elif version < SCHEMA_VERSION:
            cursor.execute("UPDATE shardlib.control SET schema_version = %s", (SCHEMA_VERSION,))
        if roles:
            cursor.execute(
                "UPDATE shardlib.control SET app_roles ="
                " (SELECT array_agg(DISTINCT r) FROM unnest(app_roles || %s::text[]) AS r)",
                (list(roles),),
            )
            cursor.execute(_THEIRS.encode())
            theirs = sql.SQL(", ").join(sql.Identifier("shardlib", name) for (name,) in cursor.fetchall())
            for role in roles:
                who = sql.Identifier(role)
                cursor.execute(sql.SQL("GRANT USAGE ON SCHEMA shardlib TO {}").format(who))
                cursor.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(theirs, who))
                cursor.execute(sql.SQL("GRANT INSERT, DELETE ON shardlib.decision TO {}").format(who))
        cursor.execute(_TOO_MUCH.encode())
        for name, role in cursor.fetchall():
            table, who = sql.Identifier("shardlib", name), sql.Identifier(role)
            cursor.execute(sql.SQL("REVOKE ALL ON {} FROM {}").format(table, who))


def _control_row(cursor: psycopg.Cursor[Any]) -> tuple[int, str, str] | None:
    cursor.execute("SELECT to_regclass('shardlib.control') IS NOT NULL")
    if not _one(cursor)[0]:
        return None
    cursor.execute("SELECT schema_version, cluster_id, shard_id FROM shardlib.control")
    row = cursor.fetchone()
    return None if row is None else (row[0], row[1], row[2])


def check_control(found: tuple[int, str, str], *, cluster_id: str, shard_id: str, shard_name: str) -> int:
    """The schema version of a shard's control row, if it is the right shard of the right cluster.

    Raises:
        InvalidTopology: the schema is newer than this library, or the database is another shard or cluster.
    """
    version, found_cluster, found_shard = found
    if version > SCHEMA_VERSION:
        raise InvalidTopology(
            f"the schema shardlib in shard {shard_name!r} has version {version}, newer than the {SCHEMA_VERSION} "
            "that this shardlib knows",
            "upgrade the shardlib of this application",
        )
    if found_cluster != cluster_id or found_shard != shard_id:
        raise InvalidTopology(
            f"the database of shard {shard_name!r} says that it is shard {found_shard!r} of cluster {found_cluster!r}, "
            f"not {shard_id!r} of {cluster_id!r}",
            "the DSN in the catalog leads to the wrong database; correct it before anything is written there",
        )
    return version


def open_gate(conn: psycopg.Connection[Any], number: int, *, check: str | None = None) -> None:
    """Create a gate; idempotent. Publish a topology that names it only after this returns.

    Args:
        conn: autocommit connection to the shard's primary.
        number: the gate.
        check: a statement that goes first in the same transaction, and fails if this may not be done.

    Raises:
        InvalidArgument: `number` is not a positive integer.
    """
    name = _gate(number)
    with conn.transaction(), conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute("SET LOCAL lock_timeout = '10s'")
        if check is not None:
            cursor.execute(check.encode())
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_INSTALL_LOCK,))
        cursor.execute(sql.SQL("CREATE TABLE IF NOT EXISTS {} ()").format(name))
        cursor.execute("SELECT unnest(app_roles) FROM shardlib.control")
        for (role,) in cursor.fetchall():
            cursor.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(name, sql.Identifier(role)))


def close_gate(
    conn: psycopg.Connection[Any],
    number: int,
    *,
    budget_s: float,
    attempt_ms: int = 20,
    message: str | None = None,
    check: str | None = None,
    jitter: Callable[[], float] = random.random,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Closing:
    """Drop a gate: when this returns closed, no transaction holds it and none will ever again.

    Each attempt waits at most `attempt_ms` for the transactions in flight, while newcomers wait behind it; then it
    gives way for about as long, so that they are never held up for more than one attempt. The whole attempt is one
    message, so a caller that is stopped in the middle leaves nothing locked, and the drop does not wait for a
    synchronous replica while it holds the lock: a replica that may be promoted must be seen to have replayed
    `Closing.lsn` before the closing counts there.

    Args:
        conn: autocommit connection to the shard's primary.
        number: the gate. One that is closed already counts as closed.
        budget_s: seconds for all attempts together.
        attempt_ms: milliseconds of lock wait for one attempt.
        message: content of a logical decoding message (prefix `shardlib`) written in the drop's transaction.
        check: a statement that goes first in the drop's transaction, and fails if this may not be done.
        jitter: source of numbers in 0..1.
        clock: monotonic seconds.
        sleep: waits that many seconds.

    Returns:
        Closing: with the transactions that stood in the way if the budget ended first. The gate is then as before.
    """
    name = _gate(number).as_string(conn)
    emit = ""
    if message is not None:
        emit = f"SELECT pg_logical_emit_message(true, 'shardlib', {sql.Literal(message).as_string(conn)}); "
    command = (
        f"BEGIN; {f'{check}; ' if check else ''}"
        f"SET LOCAL lock_timeout = '{attempt_ms:d}ms'; SET LOCAL synchronous_commit = 'local'; "
        f"DROP TABLE IF EXISTS {name}; {emit}COMMIT"
    )
    began, attempts = clock(), 0
    while True:
        attempts += 1
        if _attempt(conn, command):
            (lsn,) = _fetch(conn, "SELECT pg_current_wal_flush_lsn()::text")[0]
            return Closing(closed=True, attempts=attempts, elapsed_s=clock() - began, lsn=lsn)
        pause = attempt_ms / 1000 * (0.5 + jitter())
        if clock() - began + pause >= budget_s:
            return Closing(closed=False, attempts=attempts, elapsed_s=clock() - began, holders=holders(conn, number))
        sleep(pause)


def _attempt(conn: psycopg.Connection[Any], command: str) -> bool:
    try:
        conn.execute(command.encode())
    except (pg.LockNotAvailable, pg.DeadlockDetected):
        conn.execute("ROLLBACK")
        return False
    except psycopg.Error:
        if not conn.closed:
            conn.execute("ROLLBACK")
        raise
    return True


def holders(conn: psycopg.Connection[Any], number: int) -> tuple[Holder, ...]:
    """The transactions that hold a gate, oldest first, prepared ones included; empty if the gate is closed."""
    rows = _fetch(
        conn,
        f"""
        SELECT l.pid, p.gid, coalesce(a.usename::text, p.owner::text), coalesce(a.application_name, ''),
               coalesce(a.state, 'prepared'),
               extract(epoch FROM now() - coalesce(a.xact_start, p.prepared))::float8, a.wait_event
          {LOCK_HOLDERS}
           AND l.mode = 'AccessShareLock'
           AND l.relation = to_regclass(%s)::oid
         ORDER BY 6 DESC NULLS LAST
        """,
        (f"shardlib.gate_{number:d}",),
    )
    return tuple(
        Holder(
            pid=pid, gid=gid, user=user or "", application=application, state=state, age_s=age or 0.0, wait_event=event
        )
        for pid, gid, user, application, state, age, event in rows
    )


def list_gates(conn: psycopg.Connection[Any]) -> tuple[int, ...]:
    """The numbers of the gates that are open in this database, rising."""
    return tuple(number for (number,) in _fetch(conn, OPEN_GATES))


def _gate(number: int) -> sql.Identifier:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InvalidArgument("gate", number, "gate numbers are positive integers")
    return sql.Identifier("shardlib", f"gate_{number:d}")


def _fetch(conn: psycopg.Connection[Any], query: str, params: Sequence[object] = ()) -> list[tuple[Any, ...]]:
    with conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(query.encode(), params)
        return cursor.fetchall()


def _one(cursor: psycopg.Cursor[Any]) -> tuple[Any, ...]:
    row = cursor.fetchone()
    if row is None:
        raise InvalidTopology("a query that always answers gave no row", "the database is damaged")
    return tuple(row)
