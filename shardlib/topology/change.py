"""A topology and a wish become the next topology. Pure: the caller publishes it, then acts on the shards.

The order around a change of gates is *make before break*: a new gate is created in the shard's database, then the
topology that names it is published, then the old gate is closed. A client that learns late is refused by the closed
gate and routes anew; a client that learned in time never waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardlib.errors import InvalidTopology
from shardlib.ring import build_ring
from shardlib.topology.model import Gate, Shard, Table, Topology, highest_number

__all__ = [
    "forget_tables",
    "initial",
    "record_tables",
    "renew_gates",
    "with_shard",
    "without_shard",
]


def initial(shards: Sequence[Shard], *, hash_function: str, cluster_id: str, nonce: str) -> Topology:
    """Version 1: the ring balanced over `vnode_count` of each shard, gates 1..n as their default gates.

    Raises:
        InvalidTopology: no shard is given, or names or ids repeat.
    """
    if not shards:
        raise InvalidTopology("a cluster needs at least one shard", "name one with its primary's DSN")
    return Topology(
        version=1,
        cluster_id=cluster_id,
        hash_function=hash_function,
        shards=tuple(shards),
        ring=build_ring({shard.id: shard.vnode_count for shard in shards}),
        gates=tuple(Gate(number, shard.id) for number, shard in enumerate(shards, 1)),
        next_shard=highest_number(shards) + 1,
        next_gate=len(shards) + 1,
        nonce=nonce,
    )


def record_tables(topology: Topology, tables: Sequence[Table], *, nonce: str) -> Topology:
    """The topology that knows these tables, or the same object if it does already.

    Raises:
        InvalidTopology: a table is recorded with another shard key: its rows would be looked for in the wrong place.
    """
    known = {table.fullname: table for table in topology.tables}
    for table in tables:
        before = known.get(table.fullname)
        if before is not None and before.key != table.key:
            raise InvalidTopology(
                f"table {table.fullname!r} is recorded with shard key {before.key or 'none (a reference table)'}, "
                f"and now declares {table.key or 'none (a reference table)'}",
                "a shard key cannot change in place: create a new table and copy the rows",
            )
        known[table.fullname] = table
    if len(known) == len(topology.tables):
        return topology
    return topology.evolve(tables=tuple(known.values()), nonce=nonce)


def with_shard(topology: Topology, shard: Shard, *, nonce: str) -> Topology:
    """The topology with one more shard, which owns no token yet and has a default gate."""
    gate = Gate(topology.next_gate, shard.id)
    return topology.evolve(
        shards=(*topology.shards, shard),
        gates=(*topology.gates, gate),
        next_gate=topology.next_gate + 1,
        next_shard=topology.next_shard + 1,
        nonce=nonce,
    )


def without_shard(topology: Topology, shard_id: str, *, nonce: str) -> Topology:
    """The topology without a shard that owns no token. Its number is not given out again.

    Raises:
        InvalidTopology: it owns tokens, or takes part in a move.
    """
    shard = topology.shard(shard_id)
    if shard.id in topology.ring.shard_ids:
        raise InvalidTopology(f"shard {shard.name!r} owns tokens", "drain it first")
    if any(shard.id in (move.source, move.target) for move in topology.moves):
        raise InvalidTopology(f"shard {shard.name!r} takes part in a move", "wait until the job is over")
    return topology.evolve(
        shards=tuple(other for other in topology.shards if other.id != shard.id),
        gates=tuple(gate for gate in topology.gates if gate.shard_id != shard.id),
        nonce=nonce,
    )


def renew_gates(topology: Topology, shard_id: str, *, nonce: str) -> Topology:
    """Every gate of the shard is replaced by one with a new number that covers the same ranges."""
    gates, number = [], topology.next_gate
    for gate in topology.gates:
        if gate.shard_id == shard_id:
            gates.append(replace(gate, number=number))
            number += 1
        else:
            gates.append(gate)
    return topology.evolve(gates=tuple(gates), next_gate=number, nonce=nonce)


def forget_tables(topology: Topology, fullnames: Sequence[str], *, nonce: str) -> Topology:
    """The topology without these tables, or the same object if it knows none of them."""
    gone = set(fullnames)
    kept = tuple(table for table in topology.tables if table.fullname not in gone)
    if len(kept) == len(topology.tables):
        return topology
    return topology.evolve(tables=kept, nonce=nonce)
