"""Token ranges and the arithmetic of sets of them."""

from __future__ import annotations

import pickle

import pytest

from shardlib.errors import InvalidArgument
from shardlib.ring import (
    TOKEN_MAX,
    TokenRange,
    intersect_ranges,
    merge_ranges,
    ranges_contain,
)
from tests.support.ranges import subtract_ranges


def R(first: int, last: int) -> TokenRange:  # noqa: N802 - it stands for the class
    return TokenRange(first, last)


def test_a_range_includes_both_ends() -> None:
    part = R(3, 5)
    assert part.size == 3
    assert [token for token in range(8) if part.covers(token)] == [3, 4, 5]
    assert R(0, TOKEN_MAX).size == 2**64
    assert R(7, 7).size == 1


def test_a_range_is_a_sorted_pair_that_pickles() -> None:
    first, last = R(3, 5)
    assert (first, last) == (3, 5)
    assert sorted([R(5, 6), R(1, 9), R(1, 2)]) == [R(1, 2), R(1, 9), R(5, 6)]
    assert pickle.loads(pickle.dumps(R(3, 5))) == R(3, 5)
    assert isinstance(pickle.loads(pickle.dumps(R(3, 5))), TokenRange)


@pytest.mark.parametrize(("first", "last"), [(5, 4), (-1, 3), (0, 2**64), (1.0, 2), ("1", "2"), (None, 1)])
def test_what_is_no_range_is_refused(first: int, last: int) -> None:
    with pytest.raises(InvalidArgument, match="as two"):
        TokenRange(first, last)


def test_merging_joins_what_overlaps_or_touches() -> None:
    assert merge_ranges([R(7, 9), R(1, 3), R(4, 5), R(2, 2), R(8, 20)]) == (R(1, 5), R(7, 20))
    assert merge_ranges([]) == ()
    assert merge_ranges([R(0, TOKEN_MAX), R(TOKEN_MAX, TOKEN_MAX)]) == (R(0, TOKEN_MAX),)


def test_intersection_and_difference() -> None:
    left, right = [R(0, 10), R(20, 30)], [R(5, 22), R(30, 40)]
    assert intersect_ranges(left, right) == (R(5, 10), R(20, 22), R(30, 30))
    assert subtract_ranges(left, right) == (R(0, 4), R(23, 29))
    assert subtract_ranges(left, []) == (R(0, 10), R(20, 30))
    assert subtract_ranges(left, [R(0, TOKEN_MAX)]) == ()


def test_membership() -> None:
    ranges = (R(2, 3), R(7, 7))
    assert [token for token in range(10) if ranges_contain(ranges, token)] == [2, 3, 7]
    assert not ranges_contain((), 1)
