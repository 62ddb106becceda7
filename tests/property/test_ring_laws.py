"""Laws that hold for any ring: one owner a token at every version, and changes that move what they say."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardlib.ring import (
    TOKEN_MAX,
    Ring,
    TokenRange,
    add_shard,
    build_ring,
    diff,
    intersect_ranges,
    merge_ranges,
    ranges_contain,
    reassign,
    remove_shard,
)
from tests.support.ranges import subtract_ranges

WHOLE = (TokenRange(0, TOKEN_MAX),)

tokens = st.one_of(
    st.integers(0, TOKEN_MAX),
    st.integers(0, 300),
    st.integers(TOKEN_MAX - 300, TOKEN_MAX),
    st.builds(lambda top, offset: ((top << 48) + offset) & TOKEN_MAX, st.integers(0, 1 << 16), st.integers(-3, 3)),
)
ranges = st.builds(lambda a, b: TokenRange(min(a, b), max(a, b)), tokens, tokens)
sets = st.lists(ranges, max_size=6)
names = st.sampled_from([f"s{i}" for i in range(6)])


@st.composite
def rings(draw: st.DrawFn) -> Ring:
    nodes = draw(st.dictionaries(tokens, names, min_size=1, max_size=60))
    shard_ids = draw(st.permutations(sorted(set(nodes.values()))))
    return Ring(sorted(nodes), [shard_ids.index(nodes[token]) for token in sorted(nodes)], shard_ids)


def owner_by_bisection(ring: Ring, token: int) -> str:
    at = bisect_left(ring.tokens, token)
    return ring.shard_ids[ring.owners[at if at < len(ring) else 0]]


def probes(*parts: Ring) -> list[int]:
    """The tokens where an owner may change, and their neighbours."""
    ends = {token for ring in parts for token in ring.tokens} | {0, TOKEN_MAX}
    return sorted({(token + by) & TOKEN_MAX for token in ends for by in (-1, 0, 1)})


@given(rings(), st.lists(tokens, max_size=20))
def test_the_table_says_what_bisection_says(ring: Ring, others: list[int]) -> None:
    for token in [*probes(ring), *others]:
        assert ring.owner_of(token) == owner_by_bisection(ring, token)


@given(rings())
def test_each_token_has_exactly_one_owner(ring: Ring) -> None:
    owned = [part for shard in ring.shard_ids for part in ring.ranges_of(shard)]
    assert merge_ranges(owned) == WHOLE
    assert sum(part.size for part in owned) == 2**64
    for shard in ring.shard_ids:
        assert sum(part.size for part in ring.ranges_of(shard)) == ring.shares()[shard]
        assert all(ring.owns(shard, part) for part in ring.ranges_of(shard))


@given(rings(), names, ranges)
def test_owning_a_range_is_owning_each_part_of_it(ring: Ring, shard: str, part: TokenRange) -> None:
    assert ring.owns(shard, part) == (subtract_ranges([part], ring.ranges_of(shard)) == ())


@given(rings(), rings())
def test_the_difference_is_exactly_what_changes(old: Ring, new: Ring) -> None:
    moves = diff(old, new)
    moving = [move.range for move in moves]
    assert sum(part.size for part in moving) == sum(part.size for part in merge_ranges(moving))
    for token in probes(old, new):
        move = next((move for move in moves if move.range.covers(token)), None)
        before, after = old.owner_of(token), new.owner_of(token)
        assert (before, after) == ((move.source, move.target) if move else (before, before))
    for move in moves:
        assert move.source != move.target
        assert old.owns(move.source, move.range)
        assert new.owns(move.target, move.range)


@given(rings(), rings())
def test_carrying_out_the_difference_gives_the_other_ring(old: Ring, new: Ring) -> None:
    ring = old
    for target in new.shard_ids:
        ring = reassign(ring, [move.range for move in diff(old, new) if move.target == target], target)
    assert diff(ring, new) == ()
    assert set(ring.shard_ids) == set(new.shard_ids)


@given(rings(), sets, st.sampled_from(["s0", "s3", "new"]))
def test_reassigning_gives_exactly_the_ranges(ring: Ring, given_away: list[TokenRange], target: str) -> None:
    after = reassign(ring, given_away, target)
    assert merge_ranges([*ring.ranges_of(target), *given_away]) == after.ranges_of(target)
    for shard in ring.shard_ids:
        if shard != target:
            assert after.ranges_of(shard) == subtract_ranges(ring.ranges_of(shard), given_away)
    assert len(ring) <= len(after) <= len(ring) + 2 * len(merge_ranges(given_away))


@given(rings(), st.integers(1, 50))
def test_a_newcomer_takes_its_share_and_the_others_keep_the_rest(ring: Ring, weight: int) -> None:
    grown = add_shard(ring, "new", weight)
    assert {move.target for move in diff(ring, grown)} == {"new"}
    assert grown.weights() == ring.weights() | {"new": weight}
    share = 2**64 * weight // (len(ring) + weight)
    assert share - weight <= grown.shares()["new"] <= share


@given(rings(), names)
def test_what_a_leaver_had_goes_to_others_and_nothing_else_moves(ring: Ring, gone: str) -> None:
    if gone not in ring.shard_ids or len(ring.shard_ids) == 1:
        return
    shrunk = remove_shard(ring, gone)
    moves = diff(ring, shrunk)
    assert merge_ranges([move.range for move in moves]) == ring.ranges_of(gone)
    assert {move.source for move in moves} == {gone}
    assert shrunk.weights() == {shard: weight for shard, weight in ring.weights().items() if shard != gone}


@given(sets, sets, st.lists(tokens, max_size=10))
def test_sets_of_ranges_follow_the_laws_of_sets(
    left: list[TokenRange], right: list[TokenRange], more: list[int]
) -> None:
    both, rest, all_of = intersect_ranges(left, right), subtract_ranges(left, right), merge_ranges([*left, *right])
    ends = {end for part in [*left, *right] for end in part}
    for token in {*more, *((end + by) & TOKEN_MAX for end in ends for by in (-1, 0, 1))}:
        in_left = any(part.covers(token) for part in left)
        in_right = any(part.covers(token) for part in right)
        assert ranges_contain(both, token) == (in_left and in_right)
        assert ranges_contain(rest, token) == (in_left and not in_right)
        assert ranges_contain(all_of, token) == (in_left or in_right)
    assert merge_ranges([*both, *rest]) == merge_ranges(left)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 300), min_size=1, max_size=12))
def test_a_first_ring_gives_each_weight_its_share(weights: dict[str, int]) -> None:
    ring = build_ring(weights)
    assert ring.weights() == dict(sorted(weights.items()))
    for shard, share in ring.shares().items():
        assert abs(share / 2**64 * len(ring) / weights[shard] - 1) <= 0.005


class Life(RuleBasedStateMachine):
    """A ring through its life: at every version each token has one owner, and each step moves only what it must."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = build_ring({"s0": 8})
        self.born = 1

    def step(self, after: Ring) -> None:
        before, self.ring = self.ring, after
        self.moves = diff(before, after)

    @rule(weight=st.integers(1, 24))
    def add(self, weight: int) -> None:
        self.step(add_shard(self.ring, f"s{self.born}", weight))
        assert {move.target for move in self.moves} == {f"s{self.born}"}
        self.born += 1

    @precondition(lambda self: len(self.ring.shard_ids) > 1)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.ring.shard_ids))
        self.step(remove_shard(self.ring, gone))
        assert {move.source for move in self.moves} == {gone}

    @rule(part=ranges, data=st.data())
    def give(self, part: TokenRange, data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(self.ring.shard_ids))
        self.step(reassign(self.ring, [part], target))
        assert {move.target for move in self.moves} <= {target}
        assert self.ring.owns(target, part)

    @invariant()
    def one_owner(self) -> None:
        owned = [part for shard in self.ring.shard_ids for part in self.ring.ranges_of(shard)]
        assert merge_ranges(owned) == WHOLE
        assert sum(part.size for part in owned) == 2**64


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
