"""One immutable snapshot of the cluster, how it changes, and its bytes."""

from shardlib.topology.model import Gate, Move, MoveState, Place, Shard, Status, Table, Topology

__all__ = ["Gate", "Move", "MoveState", "Place", "Shard", "Status", "Table", "Topology"]
