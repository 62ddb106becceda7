"""The switch: budgeted attempts that close the moving gates, drain the streams, compare, change the ring."""

from shardlib_ops.reshard.cutover.attempt import Cutover, Outcome, reopen
from shardlib_ops.reshard.cutover.decide import Limits, ready

__all__ = ["Cutover", "Limits", "Outcome", "ready", "reopen"]
