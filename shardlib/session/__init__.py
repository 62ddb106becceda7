"""SQLAlchemy sessions that route each statement to the shard that owns its key."""

from shardlib.session.aio import AsyncShardedSession
from shardlib.session.session import ShardedSession

__all__ = ["AsyncShardedSession", "ShardedSession"]
