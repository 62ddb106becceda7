"""The ring: sorted tokens and their owners, and the lookup that every statement goes through."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import chain, islice, repeat
from operator import and_, lt, sub
from typing import NoReturn

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring.ranges import TOKEN_COUNT, TOKEN_MAX, TokenRange, merge_ranges

__all__ = ["Ring", "slot_bits"]

_BYTES_MAX = 24
"""Memory for each virtual node: token, owner, and its part of the index."""

_SLOTS_MAX = 6
"""Slots of the table for each virtual node; more would rarely make the lookup faster."""

_PART_BITS = 6
"""A shared slot is looked up by bisection within its part of 2**6 slots."""


class Ring:
    """Who owns each token. Immutable, and safe to share between threads and processes.

    A token belongs to the first virtual node at or after it; past the last one, to the first (the ring
    wraps). A shard's weight is the number of its virtual nodes.

    Args:
        tokens: the virtual nodes, strictly rising, each 0 <= token < 2**64.
        owners: for each virtual node the index of its shard in `shard_ids`.
        shard_ids: unique ids; each of them owns at least one virtual node.

    Raises:
        InvalidTopology: one of these does not hold.

    Shape: tokens uint64[V]; owners uint16[V], or uint32[V] past 65,534 shards; at most 24 bytes for each
    virtual node, the table included. A ring without virtual nodes is allowed (a cluster without shards) and
    owns nothing.
    Source: Karger et al., "Consistent Hashing and Random Trees", STOC 1997; the table of slots is as in Maglev
    (Eisenbud et al., NSDI 2016), refined by the exact tokens where a slot is shared.
    """

    __slots__ = (
        "__weakref__",
        "_parts",
        "_shard_count",
        "_shared",
        "_shift",
        "_table",
        "owners",
        "shard_ids",
        "tokens",
    )

    tokens: array[int]
    owners: array[int]
    shard_ids: tuple[str, ...]

    def __init__(self, tokens: Iterable[int], owners: Iterable[int], shard_ids: Iterable[str]) -> None:
        self.shard_ids = tuple(shard_ids)
        self._shard_count = len(self.shard_ids)
        try:
            self.tokens = array("Q", tokens)
            self.owners = array("H" if _owner_bytes(self._shard_count) == 2 else "I", owners)
        except (OverflowError, TypeError) as error:
            raise InvalidTopology(f"the ring holds a value that is no token or owner: {error}", _DAMAGED) from None
        listed = self.tokens.tolist()
        self._check(listed)
        self._shared = (1 << 8 * self.owners.itemsize) - 1
        self._table, self._parts, self._shift = _table(listed, self.owners, self._shard_count, self._shared)

    def _check(self, tokens: list[int]) -> None:
        if len(tokens) != len(self.owners):
            raise InvalidTopology(f"the ring has {len(tokens)} tokens but {len(self.owners)} owners", _DAMAGED)
        if not all(map(lt, tokens, islice(tokens, 1, None))):
            raise InvalidTopology("the tokens of the ring do not rise strictly", _DAMAGED)
        if len(set(self.shard_ids)) != self._shard_count:
            raise InvalidTopology("the ring names a shard twice", _DAMAGED)
        used = set(self.owners)
        if used and max(used) >= self._shard_count:
            raise InvalidTopology(f"the ring has owner {max(used)}, but names {self._shard_count} shards", _DAMAGED)
        if len(used) != self._shard_count:
            idle = next(shard for i, shard in enumerate(self.shard_ids) if i not in used)
            raise InvalidTopology(
                f"the ring names shard {idle!r}, which owns no virtual node", "leave it out of shard_ids"
            )

    def index_of(self, token: int) -> int:
        """Return the index in `shard_ids` of the shard that owns a token: the hot path.

        Args:
            token: unsigned, 0 <= token < 2**64; a negative one is not noticed and gives a wrong answer.

        Raises:
            InvalidTopology: the ring has no virtual node.
            InvalidArgument: the token is too great.

        Cost: one look into the table for most tokens, a short bisection for those of a shared slot.
        """
        slot = token >> self._shift
        try:
            found = self._table[slot]
        except IndexError:
            self._refuse(token)
        if found != self._shared:
            return found
        part = slot >> _PART_BITS
        at = bisect_left(self.tokens, token, self._parts[part], self._parts[part + 1])
        return self.owners[at if at < len(self.owners) else 0]

    def _refuse(self, token: int) -> NoReturn:
        if not self.tokens:
            raise InvalidTopology("the ring has no virtual node, so no shard owns anything", "create a shard first")
        raise InvalidArgument("token", token, "0 <= token < 2**64")

    def owner_of(self, token: int) -> str:
        """Return the id of the shard that owns a token.

        Args:
            token: unsigned, 0 <= token < 2**64.

        Raises:
            InvalidTopology: the ring has no virtual node.
            InvalidArgument: the argument is no token.
        """
        if not 0 <= token <= TOKEN_MAX:
            raise InvalidArgument("token", token, "0 <= token < 2**64")
        return self.shard_ids[self.index_of(token)]

    def owns(self, shard_id: str, tokens: TokenRange) -> bool:
        """Whether a shard owns every token of a range. False for a shard that the ring does not name.

        Cost: two binary searches, and one pass over the virtual nodes inside the range.
        """
        if shard_id not in self.shard_ids:
            return False
        owner = self.shard_ids.index(shard_id)
        first, last = bisect_left(self.tokens, tokens.first), bisect_left(self.tokens, tokens.last)
        if last == len(self.tokens):  # the end of the range wraps to the first virtual node
            if self.owners[0] != owner:
                return False
            last -= 1
        return self.owners[first : last + 1].count(owner) == max(0, last + 1 - first)

    def ranges_of(self, shard_id: str) -> tuple[TokenRange, ...]:
        """The token ranges of a shard, sorted, merged where they touch. Empty for a shard that the ring does not name.

        Cost: one pass over all virtual nodes.
        """
        if shard_id not in self.shard_ids:
            return ()
        owner = self.shard_ids.index(shard_id)
        tokens = self.tokens
        found = [TokenRange(tokens[i - 1] + 1 if i else 0, tokens[i]) for i, o in enumerate(self.owners) if o == owner]
        if self.owners[0] == owner and tokens[-1] < TOKEN_MAX:
            found.append(TokenRange(tokens[-1] + 1, TOKEN_MAX))
        return merge_ranges(found)

    def weights(self) -> dict[str, int]:
        """The number of virtual nodes of each shard, in the order of `shard_ids`."""
        counts = Counter(self.owners)
        return {shard_id: counts[i] for i, shard_id in enumerate(self.shard_ids)}

    def sizes(self) -> list[int]:
        """How many tokens each virtual node covers, in ring order; they sum up to 2**64."""
        tokens = self.tokens.tolist()
        if not tokens:
            return []
        return list(map(sub, tokens, chain((tokens[-1] - TOKEN_COUNT,), tokens)))

    def shares(self) -> dict[str, int]:
        """How many of the 2**64 tokens each shard owns, in the order of `shard_ids`."""
        totals = [0] * self._shard_count
        for owner, size in zip(self.owners, self.sizes(), strict=True):
            totals[owner] += size
        return dict(zip(self.shard_ids, totals, strict=True))

    def nbytes(self) -> int:
        """Bytes of memory that the ring holds: tokens, owners and table."""
        return sum(len(part) * part.itemsize for part in (self.tokens, self.owners, self._table, self._parts))

    def __len__(self) -> int:
        """The number of virtual nodes."""
        return len(self.tokens)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """The virtual nodes as (token, shard id), rising."""
        return zip(self.tokens, map(self.shard_ids.__getitem__, self.owners), strict=True)

    def __eq__(self, other: object) -> bool:
        """Whether both rings have the same virtual nodes with the same owners, however these are numbered."""
        if not isinstance(other, Ring):
            return NotImplemented
        if self.tokens != other.tokens:
            return False
        if self.shard_ids == other.shard_ids:
            return self.owners == other.owners
        return all(ours[1] == theirs[1] for ours, theirs in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(self.tokens.tobytes())

    def __repr__(self) -> str:
        return f"<Ring of {len(self.tokens)} virtual nodes, {self._shard_count} shards>"

    def __reduce__(self) -> tuple[type[Ring], tuple[array[int], array[int], tuple[str, ...]]]:
        return Ring, (self.tokens, self.owners, self.shard_ids)


def slot_bits(vnode_count: int, shard_count: int) -> int:
    """How many leading bits of a token choose a slot of a ring's table: 3 to 6 slots a virtual node, if memory allows.

    Args:
        vnode_count: at least 1.
        shard_count: decides the size of an entry.
    """
    owner_bytes = _owner_bytes(shard_count)
    slots_max = min(_SLOTS_MAX, (_BYTES_MAX - 9 - owner_bytes) // owner_bytes)
    return (slots_max * vnode_count).bit_length() - 1


def _owner_bytes(shard_count: int) -> int:
    return 2 if shard_count < 0xFFFF else 4  # the greatest number marks a shared slot


def _table(tokens: list[int], owners: array[int], shard_count: int, shared: int) -> tuple[array[int], array[int], int]:
    """The owner of each slot of tokens, by their leading bits; `shared` where a slot has several owners.

    Returns:
        The table; for each part of 64 slots the position of its first virtual node; and the shift that makes
        a slot of a token. The parts are empty if no slot is shared, as in a ring fresh from `build_ring`.

    Loops over millions of slots are left to iterators written in C, or a load would take many seconds.
    """
    if not tokens:
        return array(owners.typecode), array("I"), 0
    bits = slot_bits(len(tokens), shard_count)
    shift = 64 - bits
    slots = [token >> shift for token in tokens]
    # Each virtual node fills the slots after the one before it, up to and with its own.
    lengths = map(sub, slots, chain((-1,), slots))
    table = array(owners.typecode, chain.from_iterable(map(repeat, owners, lengths)))
    table.extend(repeat(owners[0], (1 << bits) - len(table)))  # past the last virtual node: the ring wraps
    ends = (1 << shift) - 1
    if reduce(and_, tokens) & ends == ends:
        return table, array("I"), shift
    for token, slot in zip(tokens, slots, strict=True):
        if token & ends != ends:  # the slot goes on past its virtual node
            table[slot] = shared
    parts = range(0, (1 << bits) + (1 << _PART_BITS), 1 << _PART_BITS)
    return table, array("I", map(bisect_left, repeat(slots), parts)), shift


_DAMAGED = "make rings by build_ring, add_shard, remove_shard and reassign, and change none by hand"
