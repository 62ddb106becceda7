"""Core connections pinned to a shard key: each transaction is fenced, and routed anew, as it begins."""

from __future__ import annotations

import time

from sqlalchemy import Connection, Engine, event

from shardlib.errors import ShardUnavailable
from shardlib.fence.connection import start
from shardlib.fence.verdict import GateClosed, lost_connection
from shardlib.session.core import Core
from shardlib.shard import ShardConnection

__all__ = ["PinnedEngine", "connect_pinned"]

_DEAD_MAX = 64


def connect_pinned(core: Core, key: bytes) -> ShardConnection:
    """A connection to the shard that owns the key now. Its transactions begin where the key is then.

    Raises:
        ShardUnavailable, PoolTimeout: no connection could be had.
    """
    shard = core.cache.current.place(core.token(key)).shard
    conn = core.pools.engine(shard.id).connect()
    conn.shard, conn.pinned = shard, True
    event.listen(conn, "begin", lambda begun: _begin(core, key, begun))
    return conn


def _begin(core: Core, key: bytes, conn: Connection) -> None:
    """Take the key's gate where the key is now; another shard, if need be.

    Raises:
        StaleTopology: no topology with an open gate came in time.
        ShardUnavailable, PoolTimeout: the shard could not be reached.
    """
    assert isinstance(conn, ShardConnection)  # noqa: S101 - for the type checker
    topology = core.cache.current
    deadline = time.monotonic() + core.reroute_timeout_s
    attempt = dead = 0
    while True:
        place = topology.place(core.token(key))
        if conn.shard is None or conn.shard.id != place.shard.id:
            conn.move_to(core.pools.engine(place.shard.id))
        conn.shard = place.shard
        try:
            start(conn.driver, (place.gate,))
        except GateClosed as closed:
            topology = core.newer(topology, closed, place.shard.name, deadline, attempt)
            attempt += 1
        except BaseException as error:
            if not lost_connection(error):
                raise
            dead += 1
            if dead > _DEAD_MAX:
                raise ShardUnavailable(place.shard.name, "its connections are lost as they begin") from error
            conn.move_to(core.pools.engine(place.shard.id))
        else:
            return


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
