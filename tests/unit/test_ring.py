"""The ring: who owns a token, what it refuses to hold, and what it weighs."""

from __future__ import annotations

import copy
import pickle
from array import array
from collections.abc import Iterable
from typing import Any

import pytest

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TOKEN_MAX, Ring, TokenRange, build_ring


@pytest.fixture
def ring() -> Ring:
    """Tokens 10 (a), 20 (b), 30 (a), and everything past 30 wraps to the first."""
    return Ring([10, 20, 30], [0, 1, 0], ["a", "b"])


@pytest.mark.parametrize(
    ("token", "owner"), [(0, "a"), (10, "a"), (11, "b"), (20, "b"), (21, "a"), (30, "a"), (31, "a"), (TOKEN_MAX, "a")]
)
def test_the_owner_is_the_first_node_at_or_after_the_token(ring: Ring, token: int, owner: str) -> None:
    assert ring.owner_of(token) == owner
    assert ring.shard_ids[ring.index_of(token)] == owner


def test_a_token_past_the_last_node_wraps() -> None:
    ring = Ring([1 << 62, 3 << 62], [0, 1], ["a", "b"])
    assert ring.owner_of((3 << 62) + 1) == ring.owner_of(TOKEN_MAX) == ring.owner_of(0) == "a"
    assert ring.ranges_of("a") == (TokenRange(0, 1 << 62), TokenRange((3 << 62) + 1, TOKEN_MAX))
    assert ring.ranges_of("b") == (TokenRange((1 << 62) + 1, 3 << 62),)


def test_many_nodes_close_together_are_told_apart() -> None:
    """A slot of the table may hold any number of virtual nodes, at the ends of the ring too."""
    for start in (0, 1 << 63, TOKEN_MAX - 999):
        tokens = [start + i for i in range(1000)]
        ring = Ring(tokens, [i % 7 for i in range(1000)], [f"s{i}" for i in range(7)])
        assert [ring.index_of(token) for token in tokens] == [i % 7 for i in range(1000)]
        assert ring.index_of((tokens[-1] + 1) & TOKEN_MAX) == 0
        assert ring.index_of((start - 1) & TOKEN_MAX) == 0


def test_one_node_owns_everything() -> None:
    ring = Ring([5], [0], ["a"])
    assert ring.ranges_of("a") == (TokenRange(0, TOKEN_MAX),)
    assert {ring.owner_of(token) for token in (0, 5, 6, TOKEN_MAX)} == {"a"}
    assert ring.shares() == {"a": 2**64}


def test_an_empty_ring_owns_nothing_and_says_so() -> None:
    ring = Ring([], [], [])
    assert len(ring) == 0
    assert ring.weights() == ring.shares() == {}
    assert ring.ranges_of("a") == ()
    assert not ring.owns("a", TokenRange(0, 1))
    for ask in (ring.owner_of, ring.index_of):
        for token in (0, TOKEN_MAX):
            with pytest.raises(InvalidTopology, match="no virtual node"):
                ask(token)


def test_what_is_no_token_is_refused(ring: Ring) -> None:
    for token in (-1, 2**64, 2**70):
        with pytest.raises(InvalidArgument, match="token"):
            ring.owner_of(token)
    for token in (2**64, 2**70):
        with pytest.raises(InvalidArgument, match="token"):
            ring.index_of(token)


def test_ownership_of_ranges(ring: Ring) -> None:
    assert ring.owns("b", TokenRange(11, 20))
    assert ring.owns("b", TokenRange(15, 15))
    assert not ring.owns("b", TokenRange(10, 20))
    assert not ring.owns("b", TokenRange(11, 21))
    assert ring.owns("a", TokenRange(21, TOKEN_MAX))
    assert ring.owns("a", TokenRange(31, 40))
    assert not ring.owns("b", TokenRange(31, 40))
    assert not ring.owns("a", TokenRange(0, TOKEN_MAX))
    assert not ring.owns("zz", TokenRange(0, 1))


def test_weights_shares_and_nodes(ring: Ring) -> None:
    assert ring.weights() == {"a": 2, "b": 1}
    assert ring.shares() == {"a": 2**64 - 10, "b": 10}
    assert sum(ring.sizes()) == 2**64
    assert list(ring) == [(10, "a"), (20, "b"), (30, "a")]
    assert len(ring) == 3
    assert repr(ring) == "<Ring of 3 virtual nodes, 2 shards>"


@pytest.mark.parametrize(
    ("tokens", "owners", "shard_ids", "says"),
    [
        ([1, 2], [0], ["a"], "2 tokens but 1 owners"),
        ([2, 1], [0, 0], ["a"], "rise strictly"),
        ([1, 1], [0, 0], ["a"], "rise strictly"),
        ([1], [0], ["a", "a"], "twice"),
        ([1], [1], ["a"], "owner 1"),
        ([1], [0], ["a", "b"], "'b', which owns no"),
        ([1], [-1], ["a"], "no token or owner"),
        ([-1], [0], ["a"], "no token or owner"),
        ([2**64], [0], ["a"], "no token or owner"),
        (["x"], [0], ["a"], "no token or owner"),
        ([], [], ["a"], "'a', which owns no"),
    ],
)
def test_a_damaged_ring_is_refused(tokens: Iterable[Any], owners: list[int], shard_ids: list[str], says: str) -> None:
    with pytest.raises(InvalidTopology, match=says):
        Ring(tokens, owners, shard_ids)


def test_a_ring_does_not_follow_the_arrays_it_was_made_from() -> None:
    tokens, owners = array("Q", [10, 20]), array("H", [0, 1])
    ring = Ring(tokens, owners, ["a", "b"])
    tokens[0], owners[0] = 15, 1
    assert list(ring) == [(10, "a"), (20, "b")]


def test_equal_rings_are_equal_however_their_shards_are_numbered() -> None:
    one, other = Ring([1, 2], [0, 1], ["a", "b"]), Ring([1, 2], [1, 0], ["b", "a"])
    assert one == other
    assert hash(one) == hash(other)
    assert one != Ring([1, 2], [1, 0], ["a", "b"])
    assert one != Ring([1, 3], [0, 1], ["a", "b"])
    assert one != "a ring"


def test_a_ring_pickles_and_copies() -> None:
    ring = build_ring({"a": 16, "b": 32})
    for again in (pickle.loads(pickle.dumps(ring)), copy.deepcopy(ring)):
        assert again == ring
        assert [again.index_of(t) for t in ring.tokens] == [ring.index_of(t) for t in ring.tokens]


def test_more_shards_than_two_bytes_can_number() -> None:
    count = 70_000
    ring = Ring([(i << 64) // count for i in range(count)], range(count), [f"s{i}" for i in range(count)])
    assert ring.owners.typecode == "I"
    assert ring.nbytes() <= 24 * count
    for position in (0, 1, 65_534, 65_535, 65_536, count - 1):
        assert ring.index_of(ring.tokens[position]) == position
