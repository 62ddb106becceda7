"""Topologies for tests of what stores, ships and caches them."""

from __future__ import annotations

import random
import uuid

from shardlib.catalog import TopologyCache
from shardlib.dsn import Dsn
from shardlib.ring import reassign
from shardlib.topology import Shard, Topology
from shardlib.topology.change import initial
from tests.support.eventually import eventually

PASSWORD = "canary-5e1f"


def make_topology(shards: int = 3, vnodes: int = 256, *, cluster_id: str = "c1", version: int = 1) -> Topology:
    """A balanced cluster of that size; every shard has a password that must never be shown."""
    made = initial(
        [
            Shard(
                f"s{number}",
                f"shard-{number:05}",
                Dsn(f"postgresql://app:{PASSWORD}@db{number}.internal:5432/app"),
                vnode_count=vnodes,
            )
            for number in range(1, shards + 1)
        ],
        hash_function="murmur3",
        cluster_id=cluster_id,
        nonce=uuid.uuid4().hex,
    )
    return made.evolve(version=version)


def scattered_topology(rng: random.Random, shards: int, vnodes: int) -> Topology:
    """The same without the cost of balancing: random tokens, owners in turn. For sizes of thousands of shards."""
    from array import array

    from shardlib.ring import Ring

    small = make_topology(shards, 1)
    count = shards * vnodes
    tokens: set[int] = set()
    while len(tokens) < count:
        tokens.update(rng.getrandbits(64) for _ in range(count - len(tokens)))
    owners = array("I", (position % shards for position in range(count)))
    return small.evolve(ring=Ring(sorted(tokens), owners, small.ring.shard_ids), version=1)


def changed(topology: Topology, **changes: object) -> Topology:
    """The next version, with a nonce of its own."""
    return topology.evolve(nonce=uuid.uuid4().hex, **changes)


def one_range_moved(topology: Topology, source: str = "s1", target: str = "s2") -> Topology:
    """The next version, in which the second range of `source` belongs to `target` (the first may wrap)."""
    part = topology.ring.ranges_of(source)[1]
    return changed(topology, ring=reassign(topology.ring, (part,), target))


def await_newer(cache: TopologyCache, version: int, within_s: float, what: str = "") -> None:
    """Wait until a cache has heard, unasked, of a version above `version`."""
    eventually(lambda: cache.current.version > version, within_s, what or f"a version above {version} is seen")


def facts(topology: Topology) -> dict[str, object]:
    """Everything a topology says, to compare two of them (which compare by identity)."""
    return {
        "version": topology.version,
        "cluster_id": topology.cluster_id,
        "hash_function": topology.hash_function,
        "shards": topology.shards,
        "tokens": topology.ring.tokens.tolist(),
        "owners": [topology.ring.shard_ids[owner] for owner in topology.ring.owners],
        "shard_ids": topology.ring.shard_ids,
        "gates": sorted(topology.gates, key=lambda gate: gate.number),
        "tables": topology.tables,
        "moves": topology.moves,
        "counters": (topology.next_shard, topology.next_gate),
        "nonce": topology.nonce,
    }
