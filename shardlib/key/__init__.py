"""A shard key's value becomes bytes: those of PostgreSQL's own text output of it."""

from shardlib.key.composite import copy_key, join_parts
from shardlib.key.declare import KeySpec, describe
from shardlib.key.encode import encode_key

__all__ = ["KeySpec", "copy_key", "describe", "encode_key", "join_parts"]
