"""A stale client cannot do harm: the shard's database refuses a transaction through a closed gate."""

from shardlib.fence.connection import AsyncFencedConnection, FencedConnection, lock_gates, start
from shardlib.fence.gate import Closing, Holder, close_gate, holders, install, list_gates, open_gate
from shardlib.fence.verdict import GateClosed

__all__ = [
    "AsyncFencedConnection",
    "Closing",
    "FencedConnection",
    "GateClosed",
    "Holder",
    "close_gate",
    "holders",
    "install",
    "list_gates",
    "lock_gates",
    "open_gate",
    "start",
]
