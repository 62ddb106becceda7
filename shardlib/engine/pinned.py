"""Core connections pinned to a shard key: each transaction is fenced, and routed anew, as it begins."""

from __future__ import annotations

import time
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, Executable, TextClause, event
from sqlalchemy.schema import DDLElement

from shardlib.errors import ShardKeyMismatch, ShardUnavailable, StaleTopology
from shardlib.fence.connection import begins_without_gate, lock_gates, start
from shardlib.fence.verdict import GateClosed, Silent, lost_connection
from shardlib.key.composite import shown_key
from shardlib.route.needs import Scope
from shardlib.session.core import DEAD_MAX, Core, as_sqlalchemy, begun_by_status, check_active, is_read_only
from shardlib.session.statements import keyless_write, pinned_needs, refuse_raw
from shardlib.shard import ShardConnection
from shardlib.topology import Status, Topology

__all__ = ["PinnedEngine", "begin_pinned", "connect_pinned"]


def connect_pinned(core: Core, key: bytes) -> ShardConnection:
    """A connection to the shard that owns the key now. Its transactions begin where the key is then.

    Raises:
        ShardUnavailable, PoolTimeout: no connection could be had.
    """
    conn = _connected(core, key)
    conn.pinned = True
    pin = _Pin(core, key)
    event.listen(conn, "begin", pin.begin)
    event.listen(conn, "begin_twophase", _refuse_twophase)
    event.listen(conn, "before_execute", pin.check)
    return conn


def begin_pinned(core: Core, key: bytes) -> ShardConnection:
    """A connection in a transaction that holds the key's gate, and that can begin no further one.

    Costs less than `connect_pinned`, and is for a driver's statements: nobody looks at those of SQLAlchemy.

    Raises:
        StaleTopology, ShardUnavailable, PoolTimeout, sqlalchemy.exc.DBAPIError: it could not be begun.
    """
    conn = _connected(core, key)
    try:
        conn.begin()
        _Pin(core, key).begin(conn)
    except BaseException:
        conn.close()
        raise
    return conn


def _connected(core: Core, key: bytes) -> ShardConnection:
    core.check_open()
    shard = core.cache.current.place(core.token(key)).shard
    try:
        conn = core.pools.engine(shard.id).connect()
    except BaseException as error:
        if core.metrics is not None:
            core.metrics.failed(error, shard.id)
        raise
    conn.shard = shard
    return conn


def _refuse_twophase(conn: Connection, xid: Any) -> None:
    del conn, xid
    raise begins_without_gate()


class _Pin:
    """Keeps a connection to its key: where each transaction begins, and what it may touch."""

    __slots__ = ("_core", "_key", "_topology")

    def __init__(self, core: Core, key: bytes) -> None:
        self._core, self._key = core, key
        self._topology = core.cache.current

    def begin(self, conn: Connection) -> None:
        """See `_begin`."""
        core = self._core
        try:
            self._topology = topology = _begin(core, self._key, conn)
        except BaseException as error:
            if core.metrics is not None:
                core.metrics.failed(error)
            raise
        assert isinstance(conn, ShardConnection)  # noqa: S101 - for the type checker
        if conn.shard is not None:
            conn.hidden = topology.hidden_on(conn.shard.id)
        if core.metrics is not None:
            core.metrics.routed()
        if core.tracing:
            conn.topology_version = topology.version

    def check(self, conn: Connection, statement: Any, sets: Any, one: Any, options: Any) -> None:
        """Before a statement of SQLAlchemy's Core: is it of this key, and does it hold the gates it needs?

        Raises:
            ShardKeyMismatch: it names another key.
            ShardKeyRequired: it would write rows of other keys that share the shard.
            StaleTopology: it reads the whole shard, a part of which has left.
            UnsupportedOperation: it writes, and the shard is read-only; or it is raw SQL for all rows of a shard that
                holds rows which are not its own.
        """
        assert isinstance(conn, ShardConnection)  # noqa: S101 - for the type checker
        if not isinstance(statement, Executable) or isinstance(statement, TextClause | DDLElement):
            if options.get("all_shards"):
                refuse_raw(conn)
            return
        needs = pinned_needs(statement, sets or one or None, self._core.described)
        for key in needs.keys:
            if key != self._key:
                raise ShardKeyMismatch(shown_key(self._key), shown_key(key), "a statement")
        if needs.writes and conn.shard is not None and conn.shard.status is Status.READONLY:
            raise is_read_only(conn.shard)
        if needs.scope is not Scope.SCAN:
            return
        if needs.writes and not options.get("all_shards"):
            raise keyless_write(needs, "of every key that shares the shard")
        if conn.shard is None:
            return
        gates = self._topology.scan_gates(conn.shard.id)
        try:
            if len(gates) > 1:  # taken anew each time: a savepoint that was rolled back has let go of them
                with as_sqlalchemy(conn):
                    lock_gates(conn.driver, gates)
        except GateClosed as closed:
            raise StaleTopology(conn.shard.name, closed.gates[0], self._topology.version) from None
        conn.owned_only()


def _begin(core: Core, key: bytes, conn: Connection) -> Topology:
    """Take the key's gate where the key is now; another shard, if need be. The topology that led there.

    Raises:
        StaleTopology: no topology with an open gate came in time.
        ShardUnavailable, PoolTimeout: the shard could not be reached, is inactive, or silent.
        sqlalchemy.exc.DBAPIError: the server refused to begin for another reason, such as its `lock_timeout`.
    """
    assert isinstance(conn, ShardConnection)  # noqa: S101 - for the type checker
    topology = core.cache.current
    deadline = time.monotonic() + core.reroute_timeout_s
    attempt = dead = 0
    while True:
        place = topology.place(core.token(key))
        check_active(place.shard)
        stays = conn.shard is not None and conn.shard.id == place.shard.id and not conn.invalidated
        if not stays or conn.outdated(place.shard.primary):
            _move(conn, core.pools.engine(place.shard.id))
        conn.shard = place.shard
        try:
            start(conn.driver, (place.gate,), core.start_limit_s)
            begun_by_status(place.shard, conn, core.start_limit_s)
        except GateClosed as closed:
            topology = core.newer(topology, closed, place.shard.name, deadline, attempt)
            attempt += 1
        except Silent as error:
            raise core.fell_silent(place.shard, conn, error) from None
        except psycopg.Error as error:
            if not lost_connection(error):
                with as_sqlalchemy(conn):
                    raise
            dead += 1
            if dead > DEAD_MAX:
                raise ShardUnavailable(place.shard.name, "its connections are lost as they begin") from error
            _move(conn, core.pools.engine(place.shard.id))
        else:
            return topology


def _move(conn: ShardConnection, engine: Engine) -> None:
    """Go on with another driver's connection, at the isolation level (and so on) that was asked for."""
    conn.move_to(engine)
    dialect: Any = conn.dialect
    known = dialect.connection_characteristics
    chosen = {name: value for name, value in conn.get_execution_options().items() if name in known}
    if chosen:
        dialect.set_connection_execution_options(conn, chosen)


class PinnedEngine(Engine):
    """What SQLAlchemy's asyncio connection takes its connection from: the key's shard at that moment."""

    def __init__(self, core: Core, key: bytes) -> None:
        self._core, self._key = core, key
        shard = core.cache.current.place(core.token(key)).shard
        model = core.pools.engine(shard.id)
        super().__init__(model.pool, model.dialect, model.url, hide_parameters=model.hide_parameters)

    def connect(self) -> ShardConnection:
        """A pinned connection."""
        return connect_pinned(self._core, self._key)
