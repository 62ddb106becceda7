"""Who owns a token: sorted tokens and owners, how they are placed, and what a change of them moves."""

from shardlib.ring.build import add_shard, build_ring, remove_shard
from shardlib.ring.moves import RangeMove, diff, reassign
from shardlib.ring.ranges import (
    TOKEN_COUNT,
    TOKEN_MAX,
    TokenRange,
    intersect_ranges,
    merge_ranges,
    ranges_contain,
)
from shardlib.ring.ring import Ring

__all__ = [
    "TOKEN_COUNT",
    "TOKEN_MAX",
    "RangeMove",
    "Ring",
    "TokenRange",
    "add_shard",
    "build_ring",
    "diff",
    "intersect_ranges",
    "merge_ranges",
    "ranges_contain",
    "reassign",
    "remove_shard",
]
