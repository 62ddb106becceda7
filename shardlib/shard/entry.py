"""A pooled connection: SQLAlchemy's record of it, and what the accounts and the checks before its next use need."""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool.base import _ConnectionRecord

from shardlib.dsn import Dsn

if TYPE_CHECKING:
    from shardlib.shard.pool import ShardPool

__all__ = ["PoolEntry"]


class PoolEntry(_ConnectionRecord):
    """SQLAlchemy's record of a pooled connection, with what our accounts need to know of it."""

    __slots__ = (
        "counted", "dsn", "epoch", "expires_at", "fenced", "home", "idle_since", "owner", "pgconn", "pid", "poller",
        "set_up_until",
    )  # fmt: skip

    owner: object
    idle_since: float
    expires_at: float
    epoch: int
    counted: bool
    dsn: Dsn
    fenced: Any
    """The driver's connection."""
    pgconn: Any
    poller: select.poll
    home: ShardPool
    pid: int
    """The process that it belongs to."""
    set_up_until: float
    """Cut if it is not set up by then; infinity once it is."""

    def __init__(self, pool: ShardPool) -> None:
        self.home, self.counted, self.pid = pool, False, os.getpid()
        super().__init__(pool)

    def __del__(self) -> None:
        # A forked child may collect this before it is told that the connection is the parent's.
        if getattr(self, "counted", False) and self.pid == os.getpid() and not sys.is_finalizing():
            self.home.lost(self)
