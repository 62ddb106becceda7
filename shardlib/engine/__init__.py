"""The engines an application makes: `ShardedEngine`, and `AsyncShardedEngine` for asyncio."""

from shardlib.engine.aio import AsyncShardedEngine
from shardlib.engine.engine import ShardedEngine

__all__ = ["AsyncShardedEngine", "ShardedEngine"]
