"""Tables on their way: made on a new shard as they are on the old one, or compared where they are."""

from shardlib_ops.reshard.schema.reference import copy_references
from shardlib_ops.reshard.schema.sequences import advance_sequences
from shardlib_ops.reshard.schema.tables import copy_after_rows, copy_before_rows, validate_foreign_keys
from shardlib_ops.reshard.shape import differences

__all__ = [
    "advance_sequences",
    "copy_after_rows",
    "copy_before_rows",
    "copy_references",
    "differences",
    "validate_foreign_keys",
]
