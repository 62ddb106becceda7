"""The pools of all shards of one engine: opened when first used, closed together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from sqlalchemy.engine import Dialect
from sqlalchemy.util import LRUCache

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument
from shardlib.shard.budget import ConnectionBudget
from shardlib.shard.context import PoolContext, PoolStats
from shardlib.shard.dialect import SharedDialect
from shardlib.shard.engine import ShardEngine, url_of
from shardlib.shard.options import ROLES, Echo, PoolOptions, Role
from shardlib.shard.pool import ShardPool
from shardlib.waits import Ticker, Waits, forget_after_fork

__all__ = ["ShardPools"]

_STATEMENTS_MAX: Final = 1000


class ShardPools:
    """One `ShardEngine` for each shard and role, and the bound on all their connections.

    Args:
        waits: how this engine waits.
        options: of every pool.
        is_async: whether `connection_class` is psycopg's `AsyncConnection`; the same as of `waits`.
        connection_class: psycopg's `Connection` or `AsyncConnection`, or a subclass.
        endpoint_of: the DSN of a shard's role by the latest topology; asked before each new connection.
        on_connect: called with each new driver connection and the shard's id. What it raises goes to whoever wanted
            the connection, which is closed. Under asyncio it runs in a greenlet (`waits.await_`).
        name_of: what errors call a shard, by its id.
        echo: log statements, as `create_engine(echo=True)` does.
        dialect_options: further arguments of SQLAlchemy's dialect, such as `json_serializer`.
    """

    def __init__(
        self,
        waits: Waits,
        *,
        is_async: bool,
        options: PoolOptions,
        on_connect: Callable[[Any, str], None],
        endpoint_of: Callable[[str, Role], Dsn],
        connection_class: type[Any],
        name_of: Callable[[str], str] = str,
        echo: Echo = False,
        dialect_options: Mapping[str, Any] | None = None,
    ) -> None:
        if is_async is not waits.is_async:
            raise InvalidArgument("is_async", is_async, f"the same as of {type(waits).__name__}")
        self._waits, self._endpoint_of, self._name_of, self._echo = waits, endpoint_of, name_of, echo
        self.options = options
        self.budget = ConnectionBudget(options.max_connections, time.monotonic, waits.owner_gone)
        self._dialect = SharedDialect(waits.is_async, dialect_options or {})
        self._cache: LRUCache[Any, Any] = LRUCache(_STATEMENTS_MAX)
        self._context = PoolContext(
            waits, options, self.budget, self._dialect, connection_class, self._connected(on_connect)
        )
        self._engines: dict[tuple[str, Role], ShardEngine] = {}
        self._lock = threading.Lock()
        self._reaper = Ticker(min(max(options.idle_s / 4, 0.05), 1.0), self._reap, "shardlib-reaper")
        forget_after_fork(self)

    def _connected(self, on_connect: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
        def connected(driver_connection: Any, shard_id: str) -> None:
            if not self._reaper.running:
                self._reaper.start()
            self._waits.at_owner_end(self.budget.close_owner)
            on_connect(driver_connection, shard_id)

        return connected

    @property
    def dialect(self) -> Dialect:
        """The dialect object of every engine; listen here for what happens on any shard (`handle_error`)."""
        dialect: Dialect = self._dialect.dialect
        return dialect

    def endpoints(self, role: Role = "primary") -> dict[str, Dsn]:
        """The shards with an engine, and the endpoint that its latest connection was opened to (or will be)."""
        return {
            shard_id: pool.tried
            for (shard_id, its_role), engine in list(self._engines.items())
            if its_role == role
            for pool in (_pool(engine),)
        }

    def engine(self, shard_id: str, role: Role = "primary") -> ShardEngine:
        """The engine of a shard's endpoint; made on first use, without connecting.

        Raises:
            InvalidTopology: the topology knows no such shard or endpoint (from `endpoint_of`).
            InvalidArgument: no such role.
        """
        engine = self._engines.get((shard_id, role))
        return engine if engine is not None else self._make(shard_id, role)

    def _make(self, shard_id: str, role: Role) -> ShardEngine:
        if role not in ROLES:
            raise InvalidArgument("role", role, f"one of {', '.join(ROLES)}")
        dsn = self._endpoint_of(shard_id, role)
        with self._lock:
            engine = self._engines.get((shard_id, role))
            if engine is None:
                pool = ShardPool(
                    self._context,
                    shard_id,
                    role,
                    lambda: self._endpoint_of(shard_id, role),
                    self._name_of(shard_id),
                    dsn,
                )
                url = url_of(dsn, self._waits.is_async)
                engine = ShardEngine(pool, self._dialect, self._cache, url, self._echo)
                self._engines[shard_id, role] = engine
            return engine

    def cold(self, shard_id: str) -> bool:
        """Whether a connection to this shard's primary would have to be opened, and could be at once."""
        return _pool(self.engine(shard_id)).cold

    def drop(self, shard_id: str) -> None:
        """The shard is gone from the topology: close its idle connections now, the others when they come back."""
        with self._lock:
            gone = [self._engines.pop((shard_id, role), None) for role in ROLES]
        for engine in gone:
            if engine is not None:
                engine.pool.dispose()

    def follow(self) -> None:
        """The topology has changed: connections to endpoints that are no longer named are closed as by `drop`.

        Raises:
            InvalidTopology: from `endpoint_of`; `drop` shards that are gone before.
        """
        for engine in list(self._engines.values()):
            pool = _pool(engine)
            if pool.moved():
                self.budget.outdate(pool.member)

    def dispose(self) -> None:
        """Close all idle connections now and those in use when they come back. Usable again afterwards."""
        for engine in list(self._engines.values()):
            engine.pool.dispose()
        self._reaper.stop()

    def stats(self) -> list[PoolStats]:
        """The figures of every pool that was used, by shard and role."""
        return [_pool(engine).stats() for _, engine in sorted(self._engines.items())]

    def _reap(self) -> None:
        self.budget.reap(self.options.idle_s)
        for engine in list(self._engines.values()):
            _pool(engine).cut_hanging()

    def after_fork_in_child(self) -> None:
        """Another thread of the parent may have held the lock."""
        self._lock = threading.Lock()


def _pool(engine: ShardEngine) -> ShardPool:
    return cast("ShardPool", engine.pool)  # not a property of the engine: `Engine.dispose` puts a new pool there
