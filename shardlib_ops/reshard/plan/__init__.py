"""A wish becomes a plan of moves. Pure: the ring and the shards in, legs out."""

from shardlib_ops.reshard.plan.planners import (
    Plan,
    PlannedLeg,
    plan_drain,
    plan_merge,
    plan_move_keys,
    plan_rebalance,
    plan_split,
)

__all__ = [
    "Plan",
    "PlannedLeg",
    "plan_drain",
    "plan_merge",
    "plan_move_keys",
    "plan_rebalance",
    "plan_split",
]
