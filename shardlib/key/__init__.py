"""A shard key's value becomes bytes: those of PostgreSQL's own text output of it."""

from shardlib.key.composite import copy_key, join_parts, split_parts
from shardlib.key.declare import KeySpec, describe, describe_all
from shardlib.key.encode import encode_key

__all__ = ["KeySpec", "copy_key", "describe", "describe_all", "encode_key", "join_parts", "split_parts"]
