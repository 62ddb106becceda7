"""The cleanup: rows that have moved are deleted where they were, and what the job had made there is taken away."""

from shardlib_ops.reshard.cleanup.purge import purge
from shardlib_ops.reshard.cleanup.retire import leftovers, retire

__all__ = ["leftovers", "purge", "retire"]
