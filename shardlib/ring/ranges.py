"""Token ranges: inclusive on both ends, never wrapping (a range that wraps is written as two)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from shardlib.errors import InvalidArgument

__all__ = [
    "TOKEN_COUNT",
    "TOKEN_MAX",
    "TokenRange",
    "intersect_ranges",
    "merge_ranges",
    "ranges_contain",
]

TOKEN_COUNT = 1 << 64
"""How many tokens there are: the size of the whole ring."""

TOKEN_MAX = TOKEN_COUNT - 1
"""The greatest token."""


class _Bounds(NamedTuple):
    first: int
    last: int


class TokenRange(_Bounds):
    """The tokens from `first` to `last`, both included: 0 <= first <= last < 2**64.

    Ranges sort by their first token, unpack like a pair, and are immutable.

    Raises:
        InvalidArgument: a bound is no token, or the range is empty or wraps.
    """

    __slots__ = ()

    def __new__(cls, first: int, last: int) -> Self:  # noqa: D102 - the class's docstring says it
        if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last <= TOKEN_MAX):
            raise InvalidArgument(
                "range", (first, last), "0 <= first <= last < 2**64; write a range that wraps round as two"
            )
        return super().__new__(cls, first, last)

    @property
    def size(self) -> int:
        """How many tokens the range holds; at least 1."""
        return self.last - self.first + 1

    def covers(self, token: int) -> bool:
        """Whether a token lies in the range."""
        return self.first <= token <= self.last


def merge_ranges(ranges: Iterable[TokenRange]) -> tuple[TokenRange, ...]:
    """The same tokens as sorted ranges that neither overlap nor touch: the one normal form of a set of tokens."""
    merged: list[TokenRange] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1].last + 1:
            if last > merged[-1].last:
                merged[-1] = TokenRange(merged[-1].first, last)
        else:
            merged.append(TokenRange(first, last))
    return tuple(merged)


def intersect_ranges(left: Iterable[TokenRange], right: Iterable[TokenRange]) -> tuple[TokenRange, ...]:
    """The tokens that are in both sets, in normal form (see `merge_ranges`)."""
    ours, theirs = merge_ranges(left), merge_ranges(right)
    common: list[TokenRange] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        first, last = max(ours[i].first, theirs[j].first), min(ours[i].last, theirs[j].last)
        if first <= last:
            common.append(TokenRange(first, last))
        if ours[i].last < theirs[j].last:
            i += 1
        else:
            j += 1
    return tuple(common)


def ranges_contain(ranges: Sequence[TokenRange], token: int) -> bool:
    """Whether a token lies in one of `ranges`, which are in normal form (see `merge_ranges`).

    Cost: one binary search.
    """
    i = bisect_right(ranges, (token, TOKEN_COUNT)) - 1
    return i >= 0 and token <= ranges[i].last
