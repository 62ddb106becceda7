"""What every session and connection of one engine shares: topology, pools, and the way to a newer topology."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

import psycopg
from psycopg import errors as pg
from sqlalchemy import Table as SaTable
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import SQLAlchemyError

from shardlib.catalog import TopologyCache
from shardlib.errors import (
    CatalogUnavailable,
    InvalidArgument,
    InvalidTopology,
    ShardlibError,
    ShardUnavailable,
    StaleTopology,
    UnsupportedOperation,
)
from shardlib.fence.connection import drive_within, start
from shardlib.fence.verdict import GateClosed, Silent, lost_connection
from shardlib.key.declare import KeySpec, describe
from shardlib.shard import ShardConnection, ShardPools
from shardlib.telemetry import Metrics, blame
from shardlib.token import hash_of
from shardlib.topology import Shard, Status, Topology
from shardlib.waits import Waiter, Waits

__all__ = [
    "DEAD_MAX", "Ahead", "Core", "Needed", "as_sqlalchemy", "begun_by_status", "check_active", "core_of",
    "is_read_only",
]  # fmt: skip

Needed = dict[str, tuple[int, ...]]
"""Shard id -> numbers of the gates a transaction must hold there."""

_log = logging.getLogger("shardlib.session")

DEAD_MAX: Final = 64
"""How many dead connections of a pool are passed over for one transaction: a restarted server leaves a pool full."""
_PAUSE_FIRST_S: Final = 0.02
_PAUSE_MAX_S: Final = 0.25


@dataclass(slots=True)
class Core:
    """The shared inside of a `ShardedEngine`."""

    cache: TopologyCache
    pools: ShardPools
    waits: Waits
    reroute_timeout_s: float
    catalog_timeout_s: float
    specs: WeakKeyDictionary[SaTable, KeySpec] = field(default_factory=WeakKeyDictionary)
    _waiting: set[Waiter] = field(default_factory=set)
    token: Callable[[bytes], int] = field(init=False)
    """Key bytes to token, by the hash function that the cluster was created with."""
    start_limit_s: float = field(init=False)
    """How long a server may take to begin a transaction: as long as work that has not begun waits for its gate, and no
    shorter than it may take to connect."""
    described: Callable[[SaTable], KeySpec] = field(init=False)
    """`describe`, as one object: what extraction keeps is tied to it."""

    closed: bool = False
    """Whether the engine is disposed."""
    metrics: Metrics | None = None
    """What counts, if anybody wants to know."""
    tracing: bool = False
    """Whether spans are made, which tell more of a connection than anybody else needs."""

    def __post_init__(self) -> None:
        self.token = hash_of(self.cache.current.hash_function)
        self.described = self.describe
        self.start_limit_s = max(self.reroute_timeout_s, self.pools.options.connect_timeout_s)
        self.cache.listen(self._arrived)
        event.listen(self.pools.dialect, "handle_error", _show_read_only)

    def places(self, topology: Topology, keys: tuple[bytes, ...]) -> Needed:
        """The shards and gates that these keys need."""
        if len(keys) == 1:
            place = topology.place(self.token(keys[0]))
            return {place.shard.id: (place.gate,)}
        needed: dict[str, set[int]] = {}
        for key in keys:
            place = topology.place(self.token(key))
            needed.setdefault(place.shard.id, set()).add(place.gate)
        return {shard_id: tuple(sorted(gates)) for shard_id, gates in needed.items()}

    def describe(self, table: SaTable) -> KeySpec:
        """How a table is sharded, after making sure that the cluster knows it under the same key.

        Rows of a table that the catalog does not know would be left behind when their range moves.

        Raises:
            ShardKeyRequired: the table declares neither a shard key nor that it is a reference table.
            InvalidTopology: the catalog does not know the table, or knows it with another key.
            CatalogUnavailable: the topology in memory does not know the table, and the catalog did not answer in time.
        """
        spec = self.specs.get(table)
        if spec is None:
            spec = describe(table)
            self._check_recorded(table, spec)
            self.specs[table] = spec
        return spec

    def _check_recorded(self, table: SaTable, spec: KeySpec) -> None:
        recorded = self.cache.current.table(table.fullname)
        if recorded is None:
            try:
                recorded = self.waits.call(self.refresh).table(table.fullname)
            except CatalogUnavailable as error:
                raise CatalogUnavailable(
                    error.catalog,
                    f"{error.reason}; table {table.fullname!r} is not in the topology in memory, and only the catalog "
                    "can tell whether the cluster knows it by now",
                    error.final,
                ) from error
        if recorded is None:
            raise InvalidTopology(
                f"the cluster does not know table {table.fullname!r}",
                "run engine.create_all(metadata), or engine.register(metadata) if something else creates the tables",
            )
        if recorded.key != spec.key_names:
            raise InvalidTopology(
                f"table {table.fullname!r} is declared with shard key {spec.key_names or 'none'}, "
                f"but the cluster has recorded {recorded.key or 'none'}",
                "correct the model, or create a new table with the new key and copy the rows",
            )

    def refresh(self) -> Topology:
        """Ask the catalog now. Blocks, for `catalog_timeout_s` at most; the asyncio side calls it by `waits.call`.

        Raises:
            CatalogUnavailable: no answer in time.
        """
        return self.cache.refresh(timeout_s=self.catalog_timeout_s)

    def newer(self, topology: Topology, closed: GateClosed, shard: str, deadline: float, attempt: int) -> Topology:
        """The topology that a refused transaction should try next.

        Usually a newer one is there or comes within milliseconds: by the watch, or by asking now. While a range is
        between two shards there is none yet, so this waits, longer each time, and gives back the same one: its gate
        may also have been opened again under another number that a later version tells.

        Args:
            topology: the one that was refused.
            closed: the refusal.
            shard: name of the shard that refused.
            deadline: monotonic time in seconds after which to give up.
            attempt: how often this transaction was refused before, from 0.

        Raises:
            StaleTopology: the deadline has passed.
        """
        if self.metrics is not None:
            self.metrics.refused(shard)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise StaleTopology(shard, closed.gates[0], topology.version, final=True)
        pause = min(_PAUSE_MAX_S, _PAUSE_FIRST_S * 2**attempt, remaining) * random.uniform(0.5, 1.0)  # noqa: S311
        # Not a call in a thread: a crowd that waits would take turns in the few threads of an event loop.
        waiter = self.waits.waiter()
        self._waiting.add(waiter)
        ahead = None
        try:
            if self.cache.current.version <= topology.version:
                self.cache.ask()
                if topology.moves and not attempt:
                    ahead = self._open_ahead(topology, shard)
                waiter.wait(pause)
        finally:
            self._waiting.discard(waiter)
            if ahead is not None:
                ahead.close()
        return self.cache.current

    def _open_ahead(self, topology: Topology, shard: str) -> ShardConnection | None:
        """A connection to the shard that is about to get this one's rows, opened while there is nothing else to do.

        A switch sends many clients there at the same moment, and most of them have no connection to it yet. None if it
        is not clear where they will go, or not needed, or not to be had: whoever needs it then is told why.
        """
        takers = {move.next_owner for move in topology.moves if topology.shard_by_id(move.owner).name == shard}
        if len(takers) != 1:
            return None
        (taker,) = takers
        try:
            return self.pools.engine(taker).connect() if self.pools.cold(taker) else None
        except (ShardlibError, SQLAlchemyError) as error:
            _log.debug("no connection to %s ahead of its rows: %s", taker, error)
            return None

    def _arrived(self, topology: Topology) -> None:
        """A newer topology is there: wake who waits for one. Called by the cache."""
        del topology
        for waiter in list(self._waiting):
            waiter.wake()

    def check_open(self) -> None:
        """Raise UnsupportedOperation once the engine is disposed."""
        if self.closed:
            raise UnsupportedOperation("the engine is disposed", "make a new one")

    def begin_ahead(self, key: bytes) -> Ahead | None:
        """Begin a transaction where this key is, and leave the answer to the `connect` that will want it.

        What goes wrong is met there too, if it is ever called. None if there is nothing to begin.
        """
        shard, gate = self.cache.current.place(self.token(key))
        if self.closed or shard.status is Status.INACTIVE:
            return None
        ahead = Ahead(shard, (gate,))
        try:
            ahead.conn = self.pools.engine(shard.id).connect()
        except Exception as error:  # noqa: BLE001 - raised by `take`
            ahead.error = error
            return ahead
        ahead.conn.driver.send_begin(ahead.gates)
        return ahead

    def connect(
        self,
        shard: Shard,
        gates: tuple[int, ...],
        options: Mapping[str, Any] | None = None,
        ahead: Ahead | None = None,
    ) -> ShardConnection:
        """A connection to the shard's primary whose transaction has begun and holds the gates. One round trip.

        A pooled connection that turns out to be dead is replaced: nothing had run on it.

        Args:
            shard: where.
            gates: all that it needs to hold.
            options: execution options of the connection, set before the transaction begins.
            ahead: one that has begun already, used if it fits and given up if not.

        Raises:
            GateClosed: a gate is gone; the connection is back in its pool.
            ShardUnavailable: the shard is inactive, not reachable, or silent.
            PoolTimeout: no connection became free in time.
            sqlalchemy.exc.DBAPIError: the server refused to begin for another reason, such as its `lock_timeout`.
        """
        if self.closed:
            self.check_open()
        check_active(shard)
        engine = self.pools.engine(shard.id)
        for _ in range(DEAD_MAX):
            sent = None if ahead is None else ahead.take(shard, gates, options)
            ahead = None
            conn = engine.connect() if sent is None else sent
            try:
                if options:
                    conn = conn.execution_options(**options)
                conn.begin()
                if sent is None:
                    start(conn.driver, gates, self.start_limit_s)
                else:
                    drive_within(conn.driver, conn.driver.begin(), self.start_limit_s)
                begun_by_status(shard, conn, self.start_limit_s)
            except (GateClosed, UnsupportedOperation):
                conn.close()
                raise
            except Silent as error:
                refusal = self.fell_silent(shard, conn, error)
                conn.close()
                raise refusal from None
            except psycopg.Error as error:
                try:
                    if not lost_connection(error):
                        with as_sqlalchemy(conn):
                            raise
                finally:
                    conn.invalidate(error)
                    conn.close()
                continue
            except BaseException as error:
                conn.invalidate(error)
                conn.close()
                raise
            conn.shard = shard
            return conn
        raise ShardUnavailable(shard.name, f"{DEAD_MAX} connections in turn were lost as they began a transaction")

    def fell_silent(self, shard: Shard, conn: ShardConnection, error: Silent) -> ShardUnavailable:
        """Give up a connection whose server does not begin a transaction, and tell the breaker. The error to raise."""
        reason = f"it began no transaction within {self.start_limit_s:g} s"
        pool: Any = conn.engine.pool
        pool.fell_silent(conn.driver, reason)
        conn.invalidate(error)
        return ShardUnavailable(shard.name, reason)


class Ahead:
    """A transaction that was begun before anybody asked for it; its answer arrives while the asker is still busy."""

    __slots__ = ("conn", "error", "gates", "shard")

    def __init__(self, shard: Shard, gates: tuple[int, ...]) -> None:
        self.shard, self.gates = shard, gates
        self.conn: ShardConnection | None = None
        """Until it is taken or closed."""
        self.error: Exception | None = None
        """Why there is no connection."""

    def take(self, shard: Shard, gates: tuple[int, ...], options: Mapping[str, Any] | None) -> ShardConnection | None:
        """The connection, if it is what is wanted now; else it goes back to its pool.

        Raises:
            ShardUnavailable, PoolTimeout: there is none, for the reason that was found when it was asked for.
        """
        if options or shard.id != self.shard.id or gates != self.gates:
            self.close()
            return None
        conn, self.conn = self.conn, None
        error, self.error = self.error, None
        if error is not None:
            raise error
        return conn

    def close(self) -> None:
        """Give back what was not taken."""
        conn, self.conn = self.conn, None
        if conn is not None:
            conn.close()


def check_active(shard: Shard) -> None:
    """Raise ShardUnavailable if the shard takes no statements at all."""
    if shard.status is Status.INACTIVE:
        raise ShardUnavailable(shard.name, "its status is inactive")


def begun_by_status(shard: Shard, conn: ShardConnection, limit_s: float) -> None:
    """The transaction of a read-only shard has begun: the server refuses writes in it, also those of text.

    Raises:
        Silent: no answer in time; the connection is closed.
        psycopg.Error: the connection was lost.
    """
    if shard.status is Status.READONLY:
        # After its first snapshot a transaction stays so, whatever a text sets.
        drive_within(conn.driver, conn.driver.message(b"SET TRANSACTION READ ONLY; SELECT 1"), limit_s)


def is_read_only(shard: Shard) -> UnsupportedOperation:
    """The refusal of a write."""
    return UnsupportedOperation(f"shard {shard.name!r} is read-only", "write again once its status is active")


def _show_read_only(context: ExceptionContext) -> BaseException | None:
    if isinstance(context.original_exception, pg.ReadOnlySqlTransaction):
        shard: Shard | None = getattr(context.connection, "shard", None)
        if shard is not None and shard.status is Status.READONLY:
            return is_read_only(shard)
    return None


@contextmanager
def as_sqlalchemy(conn: ShardConnection) -> Iterator[None]:
    """Errors of what is sent by the driver alone become SQLAlchemy's, which also gives up a lost connection."""
    try:
        yield
    except psycopg.Error as error:
        blame(error, conn.shard_id)
        conn._handle_dbapi_exception(error, None, None, None, None)  # noqa: SLF001 - there is no public way


def core_of(engine: object, bind: object, binds: object, *, given: object = None) -> Core:
    """The inside of the engine that a session is made for.

    Args:
        engine: of the session.
        bind: SQLAlchemy's argument, which a sharded session has no use for.
        binds: the same.
        given: what the caller gave as engine, if that is not `engine` itself.

    Raises:
        InvalidArgument: it is none of ours, or a plain engine is given beside it.
    """
    way_out = "a sharded session takes its connections from a ShardedEngine or AsyncShardedEngine: use engine.session()"
    for name, value in (("bind", bind), ("binds", binds)):
        if value:
            raise InvalidArgument(name, value, way_out)
    core = getattr(engine, "_core", None)
    if not isinstance(core, Core):
        raise InvalidArgument("engine", engine if given is None else given, way_out)
    return core
