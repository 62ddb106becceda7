"""What all pools of one engine share, and what each of them tells of itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardlib.shard.budget import ConnectionBudget
from shardlib.shard.dialect import SharedDialect
from shardlib.shard.options import PoolOptions
from shardlib.waits import Waits

__all__ = ["PoolContext", "PoolStats"]


@dataclass(frozen=True, slots=True)
class PoolContext:
    """What all pools of one engine share."""

    waits: Waits
    options: PoolOptions
    budget: ConnectionBudget
    dialect: SharedDialect
    connection_class: Any
    """`psycopg.Connection` or `psycopg.AsyncConnection`, or a subclass."""
    on_connect: Callable[[Any, str], None]
    """Called with each new driver connection and the shard's id, before anybody else uses it."""
    random: random.Random = field(default_factory=random.SystemRandom)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool at one moment. `size` = `idle` + `in_use` + `connecting`."""

    shard: str
    name: str
    role: str
    size: int
    idle: int
    in_use: int
    connecting: int
    waiting: int
    breaker: str
