"""Planned promotion: a replica becomes the primary of its shard while applications write, and nothing is lost."""

from shardlib_ops.manager.promote.check import Look, Wanted, choose, look
from shardlib_ops.manager.promote.promoter import Promoter
from shardlib_ops.manager.promote.record import Promotion, PromotionStore, Stage
from shardlib_ops.manager.promote.replica import add_replica
from shardlib_ops.manager.promote.server import Demoted, Rejoin
from shardlib_ops.manager.promote.swap import reserved, without_replica

__all__ = [
    "Demoted",
    "Look",
    "Promoter",
    "Promotion",
    "PromotionStore",
    "Rejoin",
    "Stage",
    "Wanted",
    "add_replica",
    "choose",
    "look",
    "reserved",
    "without_replica",
]
