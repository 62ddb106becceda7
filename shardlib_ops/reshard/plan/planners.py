"""The planners. Each gives the ranges that leave a shard and where they go; none moves more than it must.

Split and drain hand whole virtual nodes over, so that their number stays and weight goes with them.
Rebalance is the difference between the ring and the ring with one shard more. Merge gives all that a shard has. Moving
a key gives the one token of the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import RangeMove, TokenRange, add_shard, diff, merge_ranges, remove_shard
from shardlib.ring.ranges import TOKEN_COUNT
from shardlib.topology import Shard, Status, Topology
from shardlib_ops.reshard.job import Kind, Leg, legs_of

__all__ = ["Plan", "PlannedLeg", "plan_drain", "plan_merge", "plan_move_keys", "plan_rebalance", "plan_split"]


@dataclass(frozen=True, slots=True)
class PlannedLeg:
    """What one leg moves.

    Attributes:
        leg: with shard ids.
        share_of_source: the part of the source's tokens that leaves it, 0..1: about that part of its rows.
        share_of_all: the part of all tokens.
    """

    leg: Leg
    share_of_source: float
    share_of_all: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job would move.

    Attributes:
        kind: what was asked for.
        legs: each with its share.
        in_the_way: what would refuse the job now, each with its way out, as a dry run found it.
        notes: what stops nothing and should be known, likewise.
    """

    kind: Kind
    legs: tuple[PlannedLeg, ...]
    in_the_way: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def job_legs(self) -> tuple[Leg, ...]:
        """The legs, as a job holds them."""
        return tuple(planned.leg for planned in self.legs)


def plan_split(topology: Topology, source: Shard, targets: Mapping[str, int], *, keep: int | None = None) -> Plan:
    """Give a part of a shard's ranges to others.

    Args:
        topology: the present one.
        source: whose ranges are given.
        targets: shard id -> weight (its `vnode_count`) of each shard that gets a part.
        keep: the weight of what stays; None: the source's own `vnode_count`; 0: nothing stays.

    Raises:
        InvalidArgument: no target, a weight below 1, or the source among the targets.
        InvalidTopology: a shard that cannot take part, or nothing to give.
    """
    _check_parties(topology, [source.id], targets)
    _check_weights(targets, at_least=1)
    if keep is not None and keep < 0:
        raise InvalidArgument("keep", keep, "0 or more")
    weights = {source.id: source.vnode_count if keep is None else keep, **targets}
    moves = _dealt(_nodes_of(topology, source.id), weights, source.id)
    return _plan(topology, Kind.SPLIT, moves)


def plan_merge(topology: Topology, sources: Sequence[Shard], target: Shard) -> Plan:
    """Give everything that some shards own to one.

    Raises:
        InvalidArgument: no source, one named twice, or the target among them.
        InvalidTopology: a shard that cannot take part.
    """
    ids = [source.id for source in sources]
    if not ids or len(set(ids)) != len(ids):
        raise InvalidArgument("source_shard_ids", ids, "at least one shard, each once, and not the target")
    _check_parties(topology, ids, {target.id: 1})
    return _plan(
        topology,
        Kind.MERGE,
        [RangeMove(part, source, target.id) for source in ids for part in topology.ring.ranges_of(source)],
    )


def plan_rebalance(topology: Topology, target: Shard) -> Plan:
    """Give a shard that owns nothing yet its fair part of everything, moving the least.

    Raises:
        InvalidTopology: it owns ranges already, or a shard cannot take part.
    """
    if target.id in topology.ring.shard_ids:
        raise InvalidTopology(
            f"shard {target.name!r} owns ranges already", "rebalance gives a new shard its part; use split or drain"
        )
    moves = diff(topology.ring, add_shard(topology.ring, target.id, target.vnode_count))
    _check_parties(topology, sorted({move.source for move in moves}), {target.id: 1})
    return _plan(topology, Kind.REBALANCE, moves)


def plan_drain(topology: Topology, shard: Shard) -> Plan:
    """Give everything that a shard owns to the others, evenly.

    Raises:
        InvalidTopology: it is the only one that owns anything, or a shard cannot take part.
    """
    if len(topology.ring.shard_ids) < 2 or shard.id not in topology.ring.shard_ids:
        raise InvalidTopology(
            f"shard {shard.name!r} cannot be drained: " + ("it owns nothing" if len(topology.ring.shard_ids) > 1 else
                                                         "no other shard owns anything"),
            "create another shard first",
        )  # fmt: skip
    moves = diff(topology.ring, remove_shard(topology.ring, shard.id))
    _check_parties(topology, [shard.id], {move.target: 1 for move in moves})
    return _plan(topology, Kind.DRAIN, moves)


def plan_move_keys(topology: Topology, tokens: Sequence[int], target: Shard) -> Plan:
    """Give the tokens of some keys to a shard, each as a range of its own.

    Keys that are there already are left out.

    Raises:
        InvalidArgument: no key.
        InvalidTopology: all are there already, or a shard cannot take part.
    """
    if not tokens:
        raise InvalidArgument("keys", [], "at least one key")
    moves = [
        RangeMove(TokenRange(token, token), owner, target.id)
        for token in sorted(set(tokens))
        if (owner := topology.ring.owner_of(token)) != target.id
    ]
    if not moves:
        raise InvalidTopology(f"the keys are on shard {target.name!r} already", "there is nothing to move")
    _check_parties(topology, sorted({move.source for move in moves}), {target.id: 1})
    return _plan(topology, Kind.MOVE_KEYS, moves)


def _check_weights(weights: Mapping[str, int], *, at_least: int) -> None:
    if not weights:
        raise InvalidArgument("targets", [], "at least one shard")
    for shard_id, weight in weights.items():
        if weight < at_least:
            raise InvalidArgument("vnode_count", weight, f"{at_least} or more, for shard {shard_id}")


def _check_parties(topology: Topology, sources: Sequence[str], targets: Mapping[str, int]) -> None:
    """Every shard may take part: it is active, and no job that is under way works on it."""
    for shard_id in (*sources, *targets):
        shard = topology.shard(shard_id)
        if shard.status not in (Status.ACTIVE, Status.MIGRATING):
            raise InvalidTopology(
                f"shard {shard.name!r} is {shard.status.value}", "only shards that are active take part in a job"
            )
        for move in topology.moves:
            if shard_id in (move.source, move.target):
                raise InvalidTopology(
                    f"shard {shard.name!r} takes part in job {move.job}, which is not over",
                    "wait for it, complete it, or roll it back",
                )
    if both := set(sources) & set(targets):
        name = topology.shard(min(both)).name
        raise InvalidArgument("targets", name, "a shard other than the source: nothing moves onto itself")
    for shard_id in sources:
        if shard_id not in topology.ring.shard_ids:
            raise InvalidTopology(f"shard {topology.shard(shard_id).name!r} owns nothing", "there is nothing to move")


def _nodes_of(topology: Topology, shard_id: str) -> list[TokenRange]:
    """The range of each virtual node of a shard, so that whole nodes can be handed over; the first may wrap."""
    ring, mine = topology.ring, topology.ring.shard_ids.index(shard_id)
    nodes: list[TokenRange] = []
    for at, owner in enumerate(ring.owners):
        if owner != mine:
            continue
        last = ring.tokens[at]
        first = ring.tokens[at - 1] + 1 if at else 0
        nodes.append(TokenRange(first, last))
    if ring.owners[0] == mine and ring.tokens[-1] + 1 < TOKEN_COUNT:
        nodes.append(TokenRange(ring.tokens[-1] + 1, TOKEN_COUNT - 1))  # past the last node comes the first
    return nodes


def _dealt(nodes: Sequence[TokenRange], weights: Mapping[str, int], stays: str) -> list[RangeMove]:
    """Deal ranges so that each shard's part of the tokens is as its weight; what is dealt to `stays` does not move.

    The greatest range goes first, to whoever lacks most: the rule of longest processing time (Graham, 1969).
    """
    total, tokens = sum(weights.values()), sum(node.size for node in nodes)
    lacking = {shard_id: tokens * weight / total for shard_id, weight in weights.items() if weight}
    dealt: dict[str, list[TokenRange]] = {shard_id: [] for shard_id in lacking}
    for node in sorted(nodes, key=lambda node: (-node.size, node)):
        taker = max(lacking, key=lambda shard_id: (lacking[shard_id], shard_id))
        lacking[taker] -= node.size
        dealt[taker].append(node)
    return [
        RangeMove(part, stays, shard_id)
        for shard_id, parts in dealt.items()
        if shard_id != stays
        for part in merge_ranges(parts)
    ]


def _plan(topology: Topology, kind: Kind, moves: Sequence[RangeMove]) -> Plan:
    parts: dict[tuple[str, str], list[TokenRange]] = {}
    for move in moves:
        parts.setdefault((move.source, move.target), []).append(move.range)
    if not parts:
        raise InvalidTopology("the plan moves nothing", "everything is where it should be")
    legs = legs_of([(source, target, merge_ranges(ranges)) for (source, target), ranges in sorted(parts.items())])
    owned = {leg.source: sum(part.size for part in topology.ring.ranges_of(leg.source)) for leg in legs}
    planned = []
    for leg in legs:
        size = sum(part.size for part in leg.ranges)
        planned.append(PlannedLeg(leg, size / owned[leg.source], size / TOKEN_COUNT))
    return Plan(kind, tuple(planned))
