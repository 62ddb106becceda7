"""Arithmetic on sets of tokens that only the checks need."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from shardlib.ring import TOKEN_MAX, TokenRange, merge_ranges


def subtract_ranges(left: Iterable[TokenRange], right: Iterable[TokenRange]) -> tuple[TokenRange, ...]:
    """The tokens of `left` that are not in `right`, in normal form (see `merge_ranges`)."""
    holes = merge_ranges(right)
    kept: list[TokenRange] = []
    for first, last in merge_ranges(left):
        start = first
        for hole in holes[max(0, bisect_right(holes, (first, TOKEN_MAX + 1)) - 1) :]:
            if hole.first > last:
                break
            if hole.last < start:
                continue
            if start < hole.first:
                kept.append(TokenRange(start, hole.first - 1))
            start = hole.last + 1
        if start <= last:
            kept.append(TokenRange(start, last))
    return tuple(kept)
