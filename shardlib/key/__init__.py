"""A shard key's value becomes bytes: those of PostgreSQL's own text output of it."""

from shardlib.key.composite import copy_key, join_parts, split_parts
from shardlib.key.encode import encode_key

__all__ = ["copy_key", "encode_key", "join_parts", "split_parts"]
