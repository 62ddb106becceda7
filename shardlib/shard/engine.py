"""A SQLAlchemy Engine for one endpoint of one shard."""

from __future__ import annotations

from math import inf
from typing import Any, cast

from sqlalchemy import URL, event
from sqlalchemy.engine import Engine
from sqlalchemy.engine.base import OptionEngineMixin

from shardlib.dsn import Dsn
from shardlib.shard.connection import ShardConnection
from shardlib.shard.dialect import SharedDialect
from shardlib.shard.options import Echo, Role
from shardlib.shard.pool import ShardPool

__all__ = ["ShardEngine"]


class ShardEngine(Engine):
    """An Engine whose connections are `ShardConnection`s and whose compiled statements are shared by all shards.

    Args:
        pool: the endpoint's pool.
        dialect: the dialect object of all shards.
        compiled_cache: the cache of all shards.
        url: the endpoint, without its password; for showing only.
        echo: log statements, as `create_engine(echo=True)` does.
    """

    _connection_cls = ShardConnection
    shard_id: str
    role: Role

    def __init__(self, pool: ShardPool, dialect: SharedDialect, compiled_cache: Any, url: URL, echo: Echo) -> None:
        super().__init__(pool, dialect.dialect, url, echo=echo or None, query_cache_size=0)
        self._compiled_cache = compiled_cache
        self.shard_id, self.role = pool.shard, pool.role
        self._shared = dialect
        its = dialect.dialect
        # What create_engine() would listen with, which makes its own dialect and so cannot be used here.
        for listener in (its.on_connect_url(url), its._builtin_onconnect()):  # noqa: SLF001
            if listener is not None:
                event.listen(pool, "connect", _first_argument(listener))
        event.listen(pool, "connect", self._set_up)

    def _set_up(self, connection: Any, record: Any) -> None:
        try:
            self._shared.set_up(self, connection, record)
        finally:
            record.set_up_until = inf

    def connect(self) -> ShardConnection:
        """A connection to the shard, from the pool."""
        return ShardConnection(self)


class ShardOptionEngine(OptionEngineMixin, ShardEngine):
    """`ShardEngine.execution_options()`: the same pool and shard with other options."""

    def __init__(self, proxied: ShardEngine, execution_options: Any) -> None:
        self.shard_id, self.role = proxied.shard_id, proxied.role
        super().__init__(proxied, execution_options)

    def update_execution_options(self, **opt: Any) -> None:
        """See `sqlalchemy.Engine.update_execution_options`."""
        Engine.update_execution_options(self, **opt)


ShardEngine._option_cls = cast("Any", ShardOptionEngine)  # noqa: SLF001 - as SQLAlchemy does for its own


def _first_argument(listener: Any) -> Any:
    return lambda connection, record: listener(connection)


def url_of(dsn: Dsn, is_async: bool) -> URL:
    """The endpoint as SQLAlchemy shows it, without its password."""
    port = int(dsn.port) if dsn.port.isdigit() else None
    driver = "postgresql+psycopg_async" if is_async else "postgresql+psycopg"
    return URL.create(driver, username=dsn.user or None, host=dsn.host, port=port, database=dsn.dbname)
