"""The topology before and after a promotion. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.topology import Shard, Topology

__all__ = ["regated", "reserved", "swapped", "with_replica", "without_replica"]


def reserved(topology: Topology, count: int, *, nonce: str) -> Topology:
    """`count` gate numbers from `next_gate` on are nobody else's from here on."""
    return topology.evolve(next_gate=topology.next_gate + count, nonce=nonce)


def regated(topology: Topology, shard_id: str, numbers: Sequence[int], *, nonce: str) -> Topology:
    """Each gate of the shard gets one of these numbers and covers what it covered; the same object if they have them.

    Raises:
        InvalidTopology: the shard has another number of gates by now.
    """
    mine = [gate for gate in topology.gates if gate.shard_id == shard_id]
    if [gate.number for gate in mine] == list(numbers):
        return topology
    if len(mine) != len(numbers):
        raise InvalidTopology(
            f"shard {shard_id!r} has {len(mine)} gates, and {len(numbers)} are kept for it",
            "its gates were changed by somebody else meanwhile",
        )
    fresh = iter(numbers)
    gates = tuple(replace(gate, number=next(fresh)) if gate.shard_id == shard_id else gate for gate in topology.gates)
    return topology.evolve(gates=gates, nonce=nonce)


def swapped(topology: Topology, shard_id: str, new: Dsn, numbers: Sequence[int], *, nonce: str) -> Topology:
    """The replica `new` is the primary, behind gates of these numbers; the old primary is no server of the shard.

    It comes back as a replica once it is one: until then it is a server with rows of its own. The same object if the
    swap has happened.
    """
    shard = topology.shard(shard_id)
    if shard.primary == new:
        return topology
    gated = regated(topology, shard.id, numbers, nonce=nonce)
    others = tuple(dsn for dsn in shard.replicas if dsn != new)
    return _with(topology, replace(shard, primary=new, replicas=others), gates=gated.gates, nonce=nonce)


def with_replica(topology: Topology, shard_id: str, replica: Dsn, *, nonce: str) -> Topology:
    """One replica more; the same object if it is there."""
    shard = topology.shard(shard_id)
    if replica in shard.replicas:
        return topology
    return _with(topology, replace(shard, replicas=(*shard.replicas, replica)), nonce=nonce)


def without_replica(topology: Topology, shard_id: str, replica: Dsn, *, nonce: str) -> Topology:
    """One replica less; the same object if it is not there."""
    shard = topology.shard(shard_id)
    if replica not in shard.replicas:
        return topology
    rest = tuple(dsn for dsn in shard.replicas if dsn != replica)
    return _with(topology, replace(shard, replicas=rest), nonce=nonce)


def _with(topology: Topology, changed: Shard, **more: object) -> Topology:
    shards = tuple(changed if shard.id == changed.id else shard for shard in topology.shards)
    return topology.evolve(shards=shards, **more)
