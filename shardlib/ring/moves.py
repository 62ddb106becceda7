"""What a change of the ring moves, and a change that moves exactly what is asked."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring.ranges import TOKEN_MAX, TokenRange, merge_ranges
from shardlib.ring.ring import Ring
from shardlib.ring.splice import insert_nodes

__all__ = ["RangeMove", "diff", "reassign"]

_BLOCKS = (4096, 256, 16)


class RangeMove(NamedTuple):
    """Tokens that change owner: the range, the shard it leaves, the shard it goes to (by their ids)."""

    range: TokenRange
    source: str
    target: str


def diff(old: Ring, new: Ring) -> tuple[RangeMove, ...]:
    """The ranges whose owner is not the same in both rings, sorted; neighbours with the same ends are one.

    Applied to `old`, they give the owners of `new`, token by token; equal owners give no move.

    Raises:
        InvalidTopology: one ring is empty and the other is not, so that tokens would come from or go to
        nobody.

    Cost: one pass over both rings, stretches without a change by blocks.
    """
    if not len(old) or not len(new):
        if len(old) == len(new):
            return ()
        raise InvalidTopology("an empty ring has no owners to move from or to", "compare rings that have shards")
    moves: list[RangeMove] = []
    i = j = start = 0
    while start <= TOKEN_MAX:
        skipped = _same(old, new, i, j)
        if skipped:
            i, j = i + skipped, j + skipped
            start = old.tokens[i - 1] + 1
            continue
        ours = old.tokens[i] if i < len(old) else TOKEN_MAX
        theirs = new.tokens[j] if j < len(new) else TOKEN_MAX
        last = min(ours, theirs)
        source = old.shard_ids[old.owners[i if i < len(old) else 0]]
        target = new.shard_ids[new.owners[j if j < len(new) else 0]]
        if source != target:
            before = moves[-1] if moves else None
            if before and before.range.last + 1 == start and before[1:] == (source, target):
                moves[-1] = RangeMove(TokenRange(before.range.first, last), source, target)
            else:
                moves.append(RangeMove(TokenRange(start, last), source, target))
        start = last + 1
        i += ours == last
        j += theirs == last
    return tuple(moves)


def _same(old: Ring, new: Ring, i: int, j: int) -> int:
    """How many virtual nodes from here on can be skipped because a block of them is alike in both rings."""
    for length in _BLOCKS:
        tokens = old.tokens[i : i + length]
        if not tokens or tokens != new.tokens[j : j + length]:
            continue
        ours, theirs = old.owners[i : i + length], new.owners[j : j + length]
        if (ours == theirs and old.shard_ids == new.shard_ids) or (
            [old.shard_ids[o] for o in ours] == [new.shard_ids[o] for o in theirs]
        ):
            return len(tokens)
    return 0


def reassign(ring: Ring, ranges: Iterable[TokenRange], target: str) -> Ring:
    """The ring in which a shard owns exactly these ranges besides what it owns already.

    Virtual nodes inside the ranges get the new owner, so weight goes with them. A virtual node is added only
    where a range ends between two of them. A shard left with nothing is no longer named by the ring.

    Args:
        ring: a ring that is not empty.
        ranges: may overlap, and may belong to the target already.
        target: id of the shard that gets them; may be new to the ring.

    Raises:
        InvalidTopology: the ring is empty.
        InvalidArgument: the target is no id.
    """
    if not isinstance(target, str) or not target:
        raise InvalidArgument("target", target, "the id of a shard")
    if not len(ring):
        raise InvalidTopology("the ring has no virtual node to give away", "build a ring first")
    shard_ids = ring.shard_ids if target in ring.shard_ids else (*ring.shard_ids, target)
    taker = shard_ids.index(target)
    merged = merge_ranges(ranges)
    cuts: dict[int, int] = {}
    for first, last in merged:
        for end in ((first - 1) & TOKEN_MAX, last):  # before token 0 comes the greatest: the ring wraps
            if (owner := ring.index_of(end)) != taker and not _has(ring, end):
                cuts[end] = owner
    tokens, owners = insert_nodes(ring.tokens, ring.owners, cuts)
    for first, last in merged:
        low, high = bisect_left(tokens, first), bisect_right(tokens, last)
        owners[low:high] = array("I", [taker]) * (high - low)
    return Ring(tokens, *_renumbered(owners, shard_ids))


def _has(ring: Ring, token: int) -> bool:
    """Whether there is a virtual node at exactly this token."""
    at = bisect_left(ring.tokens, token)
    return at < len(ring) and ring.tokens[at] == token


def _renumbered(owners: array[int], shard_ids: tuple[str, ...]) -> tuple[Iterable[int], tuple[str, ...]]:
    """Owners and ids without the shards that own no virtual node, in the same order."""
    used = sorted(set(owners))
    if len(used) == len(shard_ids):
        return owners, shard_ids
    number = {old: new for new, old in enumerate(used)}
    return map(number.__getitem__, owners), tuple(shard_ids[i] for i in used)
