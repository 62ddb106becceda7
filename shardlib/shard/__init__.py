"""One shard, seen from a client: engines, pools, and the bound on all connections."""

from shardlib.shard.connection import ShardConnection as ShardConnection
from shardlib.shard.context import PoolStats as PoolStats
from shardlib.shard.engine import ShardEngine as ShardEngine
from shardlib.shard.handle import ShardPools as ShardPools
from shardlib.shard.options import PoolOptions as PoolOptions
from shardlib.shard.options import Role as Role
