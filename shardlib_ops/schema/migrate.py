"""The migrations of one shard, run by Alembic. Blocking, for a process of its own: Alembic's context is a module.

Each shard is changed in one transaction, where the application's `env.py` does not ask Alembic for another way. A
statement waits for a lock for a second at most, since everybody who comes to the table after it waits behind it; then
the transaction lets go of everything, and is begun anew a little later.
"""

from __future__ import annotations

import io
import random
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg import errors as pg
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from shardlib.dsn import Dsn, scrub
from shardlib_ops.reshard.schema.revision import VERSION_SCHEMA, VERSION_TABLE
from shardlib_ops.schema.env import ATTRIBUTE, Handed
from shardlib_ops.schema.order import Answer, Order

__all__ = ["carry_out"]

_CONNECT_S: Final = 10
_PAUSE_FIRST_S: Final = 0.2
_PAUSE_MAX_S: Final = 3.0
_APPLICATION: Final = "shardlib schema"
_TURN: Final = 0x5348_4152_444D_4947
"""Advisory lock of a shard's database: whoever was paused, and woke up when another was at work, waits."""
_GIVE_UP: Final = """
    DO $$ BEGIN
        SET LOCAL client_connection_check_interval = '2s';
    EXCEPTION WHEN invalid_parameter_value THEN
        NULL;  -- a server on a system that cannot tell
    END $$
"""
"""A statement whose client is gone is ended, and its locks are let go."""
_BLOCKED: Final = (pg.LockNotAvailable, pg.DeadlockDetected)
_CALLS: Final = "shardlib_ops.schema"
_UNCHANGED_ENV: Final = (
    "let it call shardlib: `from shardlib_ops.schema import run_migrations`, and `if not run_migrations(metadata):` "
    "before what it does now"
)
_HOLDERS: Final = """
    SELECT a.pid, coalesce(a.usename, ''), coalesce(a.application_name, ''), coalesce(a.state, ''),
           extract(epoch FROM now() - a.xact_start)::float8
      FROM pg_stat_activity a
     WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.xact_start IS NOT NULL
       AND EXISTS (SELECT FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                    WHERE l.pid = a.pid AND l.granted AND c.relkind IN ('r', 'p') AND c.relnamespace <> 11)
     ORDER BY a.xact_start LIMIT 3
"""


def carry_out(config: str, order: Order) -> Answer:
    """Do what is ordered; whatever goes wrong is in the answer, without secrets.

    Args:
        config: path of `alembic.ini`.
        order: what to do.
    """
    try:
        if order.do == "heads":
            return Answer(revisions=_meant(Config(config), order.target))
        if order.do == "sql":
            return Answer(sql=_sql(config, order))
        return _patiently(config, order)
    except _Wrong as wrong:
        return Answer(error=str(wrong), kind=wrong.kind, way_out=wrong.way_out)
    except CommandError as error:
        way_out = "run it where all the migration files are that the shards have had, or `schema stamp`"
        return Answer(error=" ".join(str(error).split()), kind="files", way_out=way_out)
    except Exception as error:  # noqa: BLE001 - the application's own code runs here: it is told, and stops the change
        return Answer(error=_told(config, order, error), kind="failed")


class _Wrong(Exception):  # noqa: N818 - it is an answer
    def __init__(self, kind: str, problem: str, way_out: str = "") -> None:
        super().__init__(problem)
        self.kind, self.way_out = kind, way_out


def _meant(config: Config, target: str) -> tuple[str, ...]:
    """The revisions that a name such as `heads` means, after the files are seen to be fit.

    Raises:
        CommandError: there are no such files, or no such revision.
        _Wrong: `env.py` would migrate another database.
    """
    scripts = ScriptDirectory.from_config(config)
    env = Path(scripts.env_py_location)
    if not env.is_file() or _CALLS not in env.read_text(encoding="utf-8"):
        raise _Wrong(
            "files", f"{env} does not call shardlib, so that it would migrate a database of its own", _UNCHANGED_ENV
        )
    return tuple(sorted(script.revision for script in scripts.get_revisions(target) if script is not None))


def _sql(config: str, order: Order) -> str:
    written, given = io.StringIO(), Config(config)
    given.output_buffer = written
    given.attributes[ATTRIBUTE] = handed = Handed(None)
    command.upgrade(given, order.target if order.start is None else f"{order.start}:{order.target}", sql=True)
    _require_used(handed)
    return written.getvalue().strip()


def _require_used(handed: Handed) -> None:
    if not handed.used:
        raise _Wrong("files", "env.py did not call run_migrations, so nothing was done on the shard", _UNCHANGED_ENV)


def _patiently(config: str, order: Order) -> Answer:
    deadline, pause_s = time.monotonic() + order.lock_wait_s, _PAUSE_FIRST_S
    while True:
        try:
            with _connected(order) as connection:
                return Answer(revisions=_migrated(config, order, connection))
        except (DBAPIError, psycopg.Error) as error:
            cause = _cause(error)
            if isinstance(cause, _BLOCKED):
                if time.monotonic() + pause_s < deadline:
                    time.sleep(pause_s * (0.5 + random.random()))  # noqa: S311 - jitter
                    pause_s = min(pause_s * 2, _PAUSE_MAX_S)
                    continue
                raise _Wrong("locked", _why_locked(order, cause), "end them, or run it again later") from error
            if isinstance(cause, psycopg.OperationalError) and (cause.sqlstate or "08").startswith(("08", "57P")):
                told = scrub(" ".join(str(cause).split()), order.dsn)
                raise _Wrong(
                    "away",
                    f"its primary does not answer: {told}",
                    "run `schema apply` again when it does: it looks first what is done",
                ) from error
            raise


def _migrated(config: str, order: Order, connection: Connection) -> tuple[str, ...]:
    given = Config(config)
    given.attributes[ATTRIBUTE] = handed = Handed(connection)
    if order.do == "stamp":
        command.stamp(given, order.target, purge=True)
    else:
        command.upgrade(given, order.target)
    _require_used(handed)
    with connection.begin():
        found = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_SCHEMA}.{VERSION_TABLE} ORDER BY 1")
        return tuple(str(row[0]) for row in found)


@contextmanager
def _connected(order: Order) -> Iterator[Connection]:
    """A connection whose transactions wait for a lock within the limit, and for their turn on this shard."""
    conninfo = Dsn(order.dsn).conninfo(
        connect_timeout=_CONNECT_S, application_name=_APPLICATION, keepalives_idle=10, keepalives_interval=5
    )
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo), poolclass=NullPool)

    def begun(connection: Connection) -> None:
        # What has to run outside of a transaction waits for all older ones by its nature, and holds up nobody.
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql(_GIVE_UP)
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(order.lock_timeout_s * 1000)}")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_TURN})")

    event.listen(engine, "begin", begun)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _cause(error: DBAPIError | psycopg.Error) -> psycopg.Error:
    cause = error.orig if isinstance(error, DBAPIError) else error
    return cause if isinstance(cause, psycopg.Error) else psycopg.Error(str(cause))


def _why_locked(order: Order, cause: psycopg.Error) -> str:
    said = str(cause).partition("\n")[0]
    problem = f"a lock could not be had within {order.lock_wait_s:g} s ({said})"
    try:
        conninfo = Dsn(order.dsn).conninfo(connect_timeout=_CONNECT_S, application_name=_APPLICATION)
        with psycopg.connect(conninfo, autocommit=True) as conn:
            found: list[Any] = conn.execute(_HOLDERS).fetchall()
    except psycopg.Error as error:
        return f"{problem}; who holds it is not known: {scrub(str(error).partition(chr(10))[0], order.dsn)}"
    shown = [
        f"process {pid} of {user} ({application or 'no application name'}, {state}, for {age_s:.0f} s)"
        for pid, user, application, state, age_s in found
    ]
    return f"{problem}; the oldest transactions there are: {', '.join(shown) or 'none any more'}"


def _told(config: str, order: Order, error: Exception) -> str:
    """An error of a migration: in which revision, and what was said."""
    cause: BaseException = _cause(error) if isinstance(error, DBAPIError) else error
    said = scrub(" ".join(str(cause).split()), order.dsn)
    where = ""
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    try:
        for script in ScriptDirectory.from_config(Config(config)).walk_revisions():
            if script.path in files:
                where = f"revision {script.revision} ({Path(script.path).name}): "
    except CommandError:
        where = ""  # the files themselves are what is wrong, which the message says
    return f"{where}{type(cause).__name__}: {said}"
