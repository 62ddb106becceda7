"""Ranges get a gate of their own, or move, without a job: what a session meets, made directly."""

from __future__ import annotations

from collections.abc import Sequence

from shardlib.errors import InvalidTopology
from shardlib.ring import TokenRange, reassign
from shardlib.topology import Gate, Topology


def give_gate(topology: Topology, shard_id: str, ranges: Sequence[TokenRange], *, nonce: str) -> Topology:
    """`ranges`, all owned by the shard, get a gate of their own, and the shard a new default gate.

    With both new, closing the old gates afterwards stops only clients with an old topology; and the gate of the
    ranges can later be closed with nobody else waiting. With no ranges the shard goes back to one default gate.

    Raises:
        InvalidTopology: the shard does not own all of the ranges.
    """
    own = Gate(topology.next_gate, shard_id, tuple(ranges))
    default = Gate(topology.next_gate + 1, shard_id)
    others = tuple(gate for gate in topology.gates if gate.shard_id != shard_id)
    return topology.evolve(
        gates=(*others, *((own,) if ranges else ()), default), next_gate=topology.next_gate + 2, nonce=nonce
    )


def move_ranges(topology: Topology, ranges: Sequence[TokenRange], target: str, *, nonce: str) -> Topology:
    """`ranges` belong to `target`, behind its default gate. Gates that covered exactly such ranges are gone.

    Raises:
        InvalidTopology: a gate covers some of the ranges and others too; give the ranges a gate of their own first.
    """
    moved = set(ranges)
    gates = []
    for gate in topology.gates:
        inside = moved.intersection(gate.ranges)
        if gate.ranges and inside == set(gate.ranges):
            continue
        if inside:
            raise InvalidTopology(
                f"gate {gate.number} covers moved and unmoved ranges", "give the moved ranges a gate of their own first"
            )
        gates.append(gate)
    return topology.evolve(ring=reassign(topology.ring, tuple(ranges), target), gates=tuple(gates), nonce=nonce)
