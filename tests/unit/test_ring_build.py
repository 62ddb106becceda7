"""Placement: even, the same everywhere, and a change moves what it must and no more."""

from __future__ import annotations

import random

import pytest

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.key import encode_key
from shardlib.ring import (
    TOKEN_MAX,
    Ring,
    TokenRange,
    add_shard,
    build_ring,
    diff,
    reassign,
    remove_shard,
)
from shardlib.token import hash_of


def spread(ring: Ring) -> tuple[float, float]:
    """The least and the greatest share of tokens, each over what the weight says."""
    weights, shares = ring.weights(), ring.shares()
    mean = 2**64 / len(ring)
    parts = [shares[shard] / weights[shard] / mean for shard in shares]
    return min(parts), max(parts)


@pytest.fixture(scope="module")
def sixteen() -> Ring:
    return build_ring({f"s{i}": 256 for i in range(1, 17)})


@pytest.mark.parametrize("function", ["murmur3", "xxhash"])
def test_a_million_keys_spread_evenly_over_16_shards(sixteen: Ring, function: str) -> None:
    digest, index_of = hash_of(function), sixteen.index_of
    counts = [0] * 16
    for i in range(1_000_000):
        counts[index_of(digest(b"user-%d" % i))] += 1
    assert max(counts) / (sum(counts) / 16) <= 1.03


def test_every_weight_gets_its_share() -> None:
    for weights in ({"a": 1, "b": 1, "c": 1}, {"a": 64, "b": 256, "c": 1024}, {f"s{i}": i for i in range(1, 60)}):
        ring = build_ring(weights)
        assert ring.weights() == dict(sorted(weights.items()))
        least, greatest = spread(ring)
        assert 0.995 <= least <= greatest <= 1.005


def test_a_ring_depends_on_ids_and_weights_alone() -> None:
    one = build_ring({"a": 8, "b": 16, "c": 32})
    assert one == build_ring({"c": 32, "a": 8, "b": 16})
    assert one != build_ring({"c": 32, "a": 8, "x": 16})
    assert list(build_ring({"a": 2, "b": 1})) == [
        (2**64 // 3 - 1, "a"),
        (2 * 2**64 // 3 - 1, "b"),
        (TOKEN_MAX, "a"),
    ]


def test_a_fresh_ring_is_answered_by_the_table_alone(sixteen: Ring) -> None:
    assert sixteen._shared not in sixteen._table
    assert add_shard(sixteen, "new", 256)._table.count(sixteen._shared) > 0


def test_growing_shard_by_shard_to_64_moves_only_each_newcomers_share(sixteen: Ring) -> None:
    ring = sixteen
    for number in range(17, 65):
        grown = add_shard(ring, f"s{number}", 256)
        moves = diff(ring, grown)
        assert {move.target for move in moves} == {f"s{number}"}
        moved = sum(move.range.size for move in moves)
        assert abs(moved * number / 2**64 - 1) < 1e-9
        assert moved == grown.shares()[f"s{number}"]
        assert grown.weights() == ring.weights() | {f"s{number}": 256}
        assert spread(grown)[1] <= 1.01
        ring = grown


def test_shrinking_again_moves_only_what_the_leaver_had(sixteen: Ring, rng: random.Random) -> None:
    ring = sixteen
    for number in range(17, 65):
        ring = add_shard(ring, f"s{number}", 256)
    for gone in rng.sample(ring.shard_ids, 40):
        shrunk = remove_shard(ring, gone)
        moves = diff(ring, shrunk)
        assert {move.source for move in moves} == {gone}
        assert sum(move.range.size for move in moves) == ring.shares()[gone]
        assert shrunk.weights() == {shard: w for shard, w in ring.weights().items() if shard != gone}
        assert spread(shrunk)[1] <= 1.05
        ring = shrunk


def test_a_heavy_or_a_light_newcomer_gets_its_share(sixteen: Ring) -> None:
    for weight in (1, 16, 4096, 65_536):
        grown = add_shard(sixteen, "new", weight)
        assert grown.shares()["new"] / 2**64 == pytest.approx(weight / (4096 + weight))
        assert {move.target for move in diff(sixteen, grown)} == {"new"}
        assert spread(grown)[1] <= 1.02


def test_a_newcomer_among_a_thousand(rng: random.Random) -> None:
    ring = build_ring({f"s{i}": 64 for i in range(1000)})
    grown = add_shard(ring, "new", 64)
    moves = diff(ring, grown)
    assert sum(move.range.size for move in moves) / 2**64 == pytest.approx(1 / 1001)
    assert spread(grown)[1] <= 1.005
    assert spread(remove_shard(grown, rng.choice(grown.shard_ids)))[1] <= 1.02


def test_from_one_shard_to_two_and_back() -> None:
    one = build_ring({"a": 256})
    two = add_shard(one, "b", 256)
    assert two.shares() == {"a": 2**63, "b": 2**63}
    back = remove_shard(two, "a")
    assert back.shares() == {"b": 2**64}
    assert diff(one, remove_shard(two, "b")) == ()
    assert add_shard(Ring([], [], []), "a", 256) == one


def test_moves_may_be_carried_out_range_by_range(sixteen: Ring) -> None:
    grown = add_shard(sixteen, "new", 256)
    ring = sixteen
    for move in diff(sixteen, grown):
        ring = reassign(ring, [move.range], move.target)
    assert diff(ring, grown) == ()
    assert ring.shares() == grown.shares()
    assert diff(sixteen, ring) == diff(sixteen, grown)


def test_one_key_can_be_given_away(sixteen: Ring) -> None:
    token = hash_of("murmur3")(encode_key("tenant-42"))
    source = sixteen.owner_of(token)
    target = next(shard for shard in sixteen.shard_ids if shard != source)
    moved = reassign(sixteen, [TokenRange(token, token)], target)
    assert moved.owner_of(token) == target
    assert moved.owner_of(token - 1) == sixteen.owner_of(token - 1)
    assert moved.owner_of(token + 1) == sixteen.owner_of(token + 1)
    assert [tuple(move) for move in diff(sixteen, moved)] == [(TokenRange(token, token), source, target)]
    assert diff(sixteen, reassign(moved, [TokenRange(token, token)], source)) == ()


def test_both_ends_of_the_ring_can_be_given_away() -> None:
    ring = Ring([10, 20], [0, 1], ["a", "b"])
    for ranges in (
        [TokenRange(0, 0)],
        [TokenRange(TOKEN_MAX, TOKEN_MAX)],
        [TokenRange(0, 0), TokenRange(25, TOKEN_MAX)],
    ):
        moved = reassign(ring, ranges, "c")
        assert moved.ranges_of("c") == tuple(ranges)
        assert {move.target for move in diff(ring, moved)} == {"c"}


def test_a_shard_left_with_nothing_is_not_named() -> None:
    ring = Ring([10, 20], [0, 1], ["a", "b"])
    assert reassign(ring, ring.ranges_of("a"), "b").shard_ids == ("b",)
    assert reassign(ring, [TokenRange(0, TOKEN_MAX)], "c").shard_ids == ("c",)


def test_giving_what_the_target_has_changes_nothing(sixteen: Ring) -> None:
    assert reassign(sixteen, sixteen.ranges_of("s3"), "s3") == sixteen
    assert reassign(sixteen, [], "s3") == sixteen


def test_wrong_arguments_are_refused_by_name(sixteen: Ring) -> None:
    for weights in ({"": 1}, {"a": 0}, {"a": 65_537}, {"a": True}, {"a": 1.5}, {1: 1}):
        with pytest.raises(InvalidArgument):
            build_ring(weights)  # type: ignore[arg-type]
    for shard_id, count in (("", 1), ("new", 0), ("new", -1)):
        with pytest.raises(InvalidArgument):
            add_shard(sixteen, shard_id, count)
    with pytest.raises(InvalidTopology, match="'s3' is on the ring already"):
        add_shard(sixteen, "s3", 256)
    with pytest.raises(InvalidTopology, match="'s99' is not on the ring"):
        remove_shard(sixteen, "s99")
    with pytest.raises(InvalidTopology, match="the only one"):
        remove_shard(build_ring({"a": 4}), "a")
    with pytest.raises(InvalidArgument, match="target"):
        reassign(sixteen, [TokenRange(0, 1)], "")
    empty = Ring([], [], [])
    with pytest.raises(InvalidTopology):
        reassign(empty, [TokenRange(0, 1)], "a")
    with pytest.raises(InvalidTopology, match="empty ring"):
        diff(empty, sixteen)
    assert diff(empty, empty) == ()


def test_the_memory_of_a_large_ring() -> None:
    for count in (16, 100, 333, 1000):
        ring = build_ring({f"s{i}": 256 for i in range(count)})
        assert ring.nbytes() <= 24 * len(ring)
        assert add_shard(ring, "new", 256).nbytes() <= 24 * (len(ring) + 256)
