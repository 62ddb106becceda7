"""One SQLAlchemy dialect for all shards of an engine, so that a statement is compiled once and used on each."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, Final

from psycopg.pq import TransactionStatus
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg, PGDialectAsync_psycopg
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool.base import _AdhocProxiedConnection
from sqlalchemy.sql.compiler import COLLECT_CARTESIAN_PRODUCTS
from sqlalchemy.util import LRUCache

from shardlib.errors import InvalidArgument
from shardlib.route.hidden import OwnedOnlyCompiler

__all__ = ["SharedDialect", "close_now"]

_TWINS_MAX: Final = 16
_IDLE: Final = TransactionStatus.IDLE


def close_now(driver_connection: Any) -> None:
    """Close a psycopg connection, blocking or asyncio, from any thread and without an event loop.

    psycopg's asynchronous `close` awaits nothing: its first step is its last.
    """
    closing = driver_connection.close()
    if closing is None:
        return
    try:
        closing.send(None)
    except StopIteration:
        return
    closing.close()
    raise RuntimeError("psycopg's AsyncConnection.close() waits; this release of psycopg is not supported")


class _OwnedOnly:
    """A dialect that has twins of itself whose statements leave out rows which a shard holds but does not own."""

    hidden_jobs: tuple[int, ...] = ()
    """The jobs whose rows are left out."""

    def without_rows_of(self, jobs: tuple[int, ...]) -> Any:
        """The twin for these jobs. SQLAlchemy keeps compiled statements by dialect, so it has its own."""
        twins: LRUCache[tuple[int, ...], Any] = self.__dict__.setdefault("_twins", LRUCache(_TWINS_MAX))
        twin: Any = twins.get(jobs)
        if twin is None:
            twin = copy(self)
            twin.hidden_jobs, twin.statement_compiler = jobs, OwnedOnlyCompiler
            twins[jobs] = twin
        return twin


class _BlockingDialect(_OwnedOnly, PGDialect_psycopg):
    supports_statement_cache = True


class _AsyncioDialect(_OwnedOnly, PGDialectAsync_psycopg):
    """Closes at once: a cancelled task, or the garbage collector, cannot leave a connection half closed."""

    supports_statement_cache = True
    has_terminate = True

    def do_rollback(self, dbapi_connection: Any) -> None:
        # By far most need no answer and so no step of the event loop: a cancellation that meets one as connections are
        # given back leaves the others of the session checked out.
        driver = dbapi_connection.driver_connection
        unheard = getattr(driver, "roll_back_unheard", None)
        if (unheard is None or not unheard()) and driver.pgconn.transaction_status != _IDLE:
            dbapi_connection.rollback()

    def do_close(self, dbapi_connection: Any) -> None:
        close_now(dbapi_connection.driver_connection)

    def do_terminate(self, dbapi_connection: Any) -> None:
        close_now(dbapi_connection.driver_connection)


class SharedDialect:
    """The dialect object, and its setting up from the first server that answers.

    HSTORE values travel as text: the type has another number in each database, and psycopg's adapters are
    shared.
    """

    def __init__(self, is_async: bool, options: Mapping[str, Any]) -> None:
        kind: Any = _AsyncioDialect if is_async else _BlockingDialect
        arguments = {
            "dbapi": kind.import_dbapi(),
            "compiler_linting": COLLECT_CARTESIAN_PRODUCTS,
            "use_native_hstore": False,
            **options,
        }
        try:
            self.dialect: Any = kind(**arguments)
        except TypeError as error:
            raise InvalidArgument("dialect_options", sorted(options), str(error)) from None
        self._ready = False

    @property
    def adapters(self) -> Any:
        """Psycopg's adapters as the dialect wants them: the `context` of each new connection."""
        return self.dialect._psycopg_adapters_map  # noqa: SLF001 - what create_connect_args would pass

    def set_up(self, engine: Engine, connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        """Listener of the pool's connect event: read the server's settings once for all shards.

        Connections opened at the same moment may each do it: what they write is the same.
        """
        if self._ready:
            return
        inner = Connection(
            engine,
            connection=_AdhocProxiedConnection(connection, record),
            _has_events=False,
            _allow_revalidate=False,
            _allow_autobegin=False,
        )
        dialect: Dialect = self.dialect
        dialect.initialize(inner)
        if not inner.invalidated and not inner.closed:
            dialect.do_rollback(inner.connection)
        self._ready = True
