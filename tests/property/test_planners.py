"""Planners: exactly the right tokens move, to the right shards, in the right shares."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TokenRange, intersect_ranges, merge_ranges, reassign
from shardlib.topology import Topology
from shardlib.topology.change import with_shard
from shardlib.topology.model import Move, Shard
from shardlib.topology.moving import announce
from shardlib_ops.reshard.plan import Plan, plan_drain, plan_merge, plan_move_keys, plan_rebalance, plan_split
from tests.support.topologies import make_topology

sizes = st.tuples(st.integers(1, 6), st.sampled_from([1, 3, 16, 64]))


def with_empty(topology: Topology, count: int = 1) -> Topology:
    for _ in range(count):
        number = topology.next_shard
        shard = Shard(f"s{number}", f"new-{number}", topology.shards[0].primary, vnode_count=16)
        topology = with_shard(topology, shard, nonce=f"n{number}")
    return topology


def applied(topology: Topology, plan: Plan) -> Topology:
    ring = topology.ring
    for leg in plan.job_legs:
        assert all(ring.owns(leg.source, part) for part in leg.ranges), "what moves is the source's"
        ring = reassign(ring, leg.ranges, leg.target)
    return topology.evolve(ring=ring, nonce="x")


def size_of(topology: Topology, shard_id: str) -> int:
    if shard_id not in topology.ring.shard_ids:
        return 0
    return sum(part.size for part in topology.ring.ranges_of(shard_id))


def untouched(before: Topology, after: Topology, *changed: str) -> None:
    for shard in before.shards:
        if shard.id not in changed:
            assert size_of(before, shard.id) == size_of(after, shard.id)


@settings(max_examples=60, deadline=None)
@given(size=sizes, weights=st.lists(st.integers(1, 300), min_size=1, max_size=4), keep=st.sampled_from([None, 0, 100]))
def test_a_split_gives_each_its_weight_and_touches_nobody_else(
    size: tuple[int, int], weights: list[int], keep: int | None
) -> None:
    shards, vnodes = size
    topology = with_empty(make_topology(shards, vnodes), len(weights))
    targets = {f"s{shards + 1 + at}": weight for at, weight in enumerate(weights)}
    source = topology.shard("s1")
    total = sum(weights) + (source.vnode_count if keep is None else keep)
    biggest = max(part.size for part in topology.ring.ranges_of("s1"))
    try:
        plan = plan_split(topology, source, targets, keep=keep)
    except InvalidTopology:
        fair = max(size_of(topology, "s1") * weight / total for weight in weights)
        assert fair < biggest, "nothing is given only where all fair parts are smaller than a virtual node"
        return
    after = applied(topology, plan)
    untouched(topology, after, "s1", *targets)
    if keep == 0:
        assert size_of(after, "s1") == 0
    for shard_id, weight in targets.items():
        fair = size_of(topology, "s1") * weight / total
        assert abs(size_of(after, shard_id) - fair) <= 2 * biggest, "no further off than about one virtual node"
    assert sum(planned.share_of_source for planned in plan.legs) == pytest.approx(
        1 - size_of(after, "s1") / size_of(topology, "s1")
    )
    assert len(after.ring) == len(topology.ring), "whole virtual nodes are handed over"


@settings(max_examples=40, deadline=None)
@given(size=sizes, sources=st.integers(1, 3), empty=st.booleans())
def test_a_merge_gives_everything(size: tuple[int, int], sources: int, empty: bool) -> None:
    shards, vnodes = size
    sources = min(sources, shards - 1)
    if not sources:
        return
    topology = with_empty(make_topology(shards, vnodes))
    target = topology.shard(f"s{shards + 1}" if empty else f"s{shards}")
    ids = [f"s{number}" for number in range(1, sources + 1)]
    after = applied(topology, plan_merge(topology, [topology.shard(one) for one in ids], target))
    assert all(size_of(after, one) == 0 for one in ids)
    gained = size_of(after, target.id) - size_of(topology, target.id)
    assert gained == sum(size_of(topology, one) for one in ids)
    untouched(topology, after, target.id, *ids)


@settings(max_examples=30, deadline=None)
@given(shards=st.integers(1, 8), vnodes=st.sampled_from([16, 64]))
def test_a_rebalance_moves_a_fair_part_and_no_more(shards: int, vnodes: int) -> None:
    topology = with_empty(make_topology(shards, vnodes))
    new = topology.shards[-1]
    plan = plan_rebalance(topology, new)
    after = applied(topology, plan)
    assert {leg.target for leg in plan.job_legs} == {new.id}
    fair = new.vnode_count / (shards * vnodes + new.vnode_count)
    assert size_of(after, new.id) / 2**64 == pytest.approx(fair, rel=0.25)
    with pytest.raises(InvalidTopology, match="owns ranges already"):
        plan_rebalance(after, new)


@settings(max_examples=30, deadline=None)
@given(shards=st.integers(2, 8), vnodes=st.sampled_from([4, 64]))
def test_a_drain_leaves_nothing_and_takes_nothing_from_others(shards: int, vnodes: int) -> None:
    topology = make_topology(shards, vnodes)
    after = applied(topology, plan_drain(topology, topology.shard("s2")))
    assert size_of(after, "s2") == 0
    for shard in topology.shards:
        if shard.id != "s2":
            assert size_of(after, shard.id) >= size_of(topology, shard.id)


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
def test_moving_keys_moves_their_tokens_alone(tokens: list[int]) -> None:
    topology = make_topology(4, 16)
    target = topology.shard("s3")
    outside = sorted({token for token in tokens if topology.ring.owner_of(token) != "s3"})
    try:
        plan = plan_move_keys(topology, tokens, target)
    except InvalidTopology:
        assert not outside
        return
    moved = merge_ranges(part for leg in plan.job_legs for part in leg.ranges)
    assert moved == merge_ranges(TokenRange(token, token) for token in outside)
    after = applied(topology, plan)
    assert all(after.ring.owner_of(token) == "s3" for token in tokens)


def test_legs_of_a_plan_do_not_overlap() -> None:
    topology = with_empty(make_topology(5, 32))
    plan = plan_rebalance(topology, topology.shards[-1])
    seen: tuple[TokenRange, ...] = ()
    for leg in plan.job_legs:
        assert not intersect_ranges(seen, leg.ranges)
        seen = merge_ranges([*seen, *leg.ranges])


def test_what_cannot_be_is_refused() -> None:
    topology = with_empty(make_topology(3, 8))
    one, two, new = (topology.shard(name) for name in ("s1", "s2", "s4"))
    with pytest.raises(InvalidArgument, match="onto itself"):
        plan_split(topology, one, {"s1": 1})
    with pytest.raises(InvalidArgument, match="at least one shard"):
        plan_split(topology, one, {})
    with pytest.raises(InvalidArgument, match="vnode_count"):
        plan_split(topology, one, {"s4": 0})
    with pytest.raises(InvalidTopology, match="no shard 's9'"):
        plan_split(topology, one, {"s9": 1})
    with pytest.raises(InvalidTopology, match="owns nothing"):
        plan_split(topology, new, {"s1": 1})
    with pytest.raises(InvalidArgument, match="onto itself"):
        plan_merge(topology, [one, two], two)
    with pytest.raises(InvalidArgument, match="each once"):
        plan_merge(topology, [one, one], two)
    with pytest.raises(InvalidTopology, match="owns nothing"):
        plan_drain(topology, new)
    with pytest.raises(InvalidTopology, match="no other shard"):
        plan_drain(make_topology(1, 8), make_topology(1, 8).shard("s1"))
    with pytest.raises(InvalidArgument, match="at least one key"):
        plan_move_keys(topology, [], two)


def test_a_shard_of_a_job_under_way_is_refused() -> None:
    topology = with_empty(make_topology(3, 8))
    busy = announce(topology, [Move(1, topology.ring.ranges_of("s1")[:1], "s1", "s4")], nonce="n")
    with pytest.raises(InvalidTopology, match="takes part in job 1"):
        plan_split(busy, busy.shard("s2"), {"s4": 1})
    with pytest.raises(InvalidTopology, match="takes part in job 1"):
        plan_drain(busy, busy.shard("s1"))
