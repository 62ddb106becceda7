"""Client-side sharding for PostgreSQL inside SQLAlchemy.

Read in this order: key, token, ring, topology, route, session, shard, fence.
"""

from importlib.metadata import version

from shardlib import errors
from shardlib.engine import AsyncShardedEngine, ShardedEngine
from shardlib.route.consistency import Consistency
from shardlib.route.retry import RetryPolicy
from shardlib.session import AsyncShardedSession, ShardedSession
from shardlib.telemetry import TelemetryOptions

__version__ = version("shardlib")

__all__ = [
    "AsyncShardedEngine",
    "AsyncShardedSession",
    "Consistency",
    "RetryPolicy",
    "ShardedEngine",
    "ShardedSession",
    "TelemetryOptions",
    "__version__",
    "errors",
]
