"""The ring as operators look at it: who owns how much, which gates there are, and what is moving."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from shardlib.ring import TokenRange
from shardlib.ring.ranges import TOKEN_COUNT
from shardlib.topology import Topology

__all__ = ["GateView", "MoveView", "RingShare", "RingView", "ring_view", "share_of"]

_HEX: Final = "016x"


class RingShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one shard owns.

    Attributes:
        id: of the shard.
        name: of the shard.
        vnode_count: its weight when ranges are dealt.
        vnodes_owned: virtual nodes that it owns now.
        share_of_all: part of all tokens, 0 to 1.
        ranges: its token ranges, merged and in order, each as its first and last token in 16 hexadecimal digits.
    """

    id: str
    name: str
    vnode_count: int
    vnodes_owned: int
    share_of_all: float
    ranges: tuple[tuple[str, str], ...]


class GateView(msgspec.Struct, frozen=True, kw_only=True):
    """A gate.

    Attributes:
        number: of the gate.
        shard: id of its shard.
        ranges: how many ranges of its own it has; 0: it is for everything else that the shard owns.
        share_of_all: part of all tokens in those ranges; None for a gate without.
    """

    number: int
    shard: str
    ranges: int
    share_of_all: float | None


class MoveView(msgspec.Struct, frozen=True, kw_only=True):
    """Ranges on their way.

    Attributes:
        job: number of the job that moves them.
        source: id of the shard that they leave.
        target: id of the shard that they go to.
        state: `copying`, or `switched`: the target serves them.
        ranges: how many.
        share_of_all: part of all tokens.
    """

    job: int
    source: str
    target: str
    state: str
    ranges: int
    share_of_all: float


class RingView(msgspec.Struct, frozen=True, kw_only=True):
    """The ring of a cluster at one version of its topology.

    Attributes:
        cluster_id: of the cluster.
        version: of the topology.
        hash_function: from a key to its token.
        virtual_nodes: how many there are in all.
        shards: every shard, also one that owns nothing.
        gates: every gate.
        moves: what is under way.
    """

    cluster_id: str
    version: int
    hash_function: str
    virtual_nodes: int
    shards: tuple[RingShare, ...]
    gates: tuple[GateView, ...]
    moves: tuple[MoveView, ...]


def share_of(ranges: Iterable[TokenRange]) -> float:
    """The part of all tokens that some ranges hold."""
    return sum(one.last - one.first + 1 for one in ranges) / TOKEN_COUNT


def ring_view(topology: Topology) -> RingView:
    """The ring of a topology."""
    ring, weights = topology.ring, topology.ring.weights()
    owned = {shard.id: ring.ranges_of(shard.id) if shard.id in ring.shard_ids else () for shard in topology.shards}
    return RingView(
        cluster_id=topology.cluster_id,
        version=topology.version,
        hash_function=topology.hash_function,
        virtual_nodes=len(ring),
        shards=tuple(
            RingShare(
                id=shard.id,
                name=shard.name,
                vnode_count=shard.vnode_count,
                vnodes_owned=weights.get(shard.id, 0),
                share_of_all=share_of(owned[shard.id]),
                ranges=tuple((format(one.first, _HEX), format(one.last, _HEX)) for one in owned[shard.id]),
            )
            for shard in topology.shards
        ),
        gates=tuple(
            GateView(
                number=gate.number,
                shard=gate.shard_id,
                ranges=len(gate.ranges),
                share_of_all=share_of(gate.ranges) if gate.ranges else None,
            )
            for gate in sorted(topology.gates, key=lambda gate: gate.number)
        ),
        moves=tuple(
            MoveView(
                job=move.job,
                source=move.source,
                target=move.target,
                state=move.state.value,
                ranges=len(move.ranges),
                share_of_all=share_of(move.ranges),
            )
            for move in topology.moves
        ),
    )
