"""Both sides of a leg hold the same rows: compared while they run, and again on what changed, closed and drained."""

from shardlib_ops.reshard.validate.compare import compare_changed, compare_closed, compare_whole
from shardlib_ops.reshard.validate.digest import KeyList
from shardlib_ops.reshard.validate.sides import Equal, Tables

__all__ = ["Equal", "KeyList", "Tables", "compare_changed", "compare_closed", "compare_whole"]
