"""The guard: from the switch to the cleanup, the old side's database itself refuses who writes rows that have moved."""

from shardlib_ops.reshard.guard.foreign import ForeignWriter, foreign_writers, lasting
from shardlib_ops.reshard.guard.trigger import (
    activate_guard,
    deactivate_guard,
    install_guard,
    remove_guard,
    token_function,
)

__all__ = [
    "ForeignWriter",
    "activate_guard",
    "deactivate_guard",
    "foreign_writers",
    "install_guard",
    "lasting",
    "remove_guard",
    "token_function",
]
