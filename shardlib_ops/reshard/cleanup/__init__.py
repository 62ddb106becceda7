"""The cleanup: rows that have moved are deleted where they were, and what the job had made there is taken away."""

from shardlib_ops.reshard.cleanup.purge import purge
from shardlib_ops.reshard.cleanup.readers import horizon, old_readers, readers_gone
from shardlib_ops.reshard.cleanup.retire import leftovers, retire

__all__ = ["horizon", "leftovers", "old_readers", "purge", "readers_gone", "retire"]
