"""The sections a stored topology is cut into, and how each becomes bytes and back. Pure.

A section is a set of numbered buckets, each a string of bytes that depends on its own content alone: virtual nodes
by the first bits of their token, shards by their numbers and gates by those of their shards; order, moves and tables
are one bucket each. `codec.py` names buckets by digest.
"""

from __future__ import annotations

import re
import sys
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Final, TypeVar
from weakref import WeakValueDictionary

import msgspec
from msgspec import Meta

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.ring import Ring, TokenRange
from shardlib.topology.model import Gate, Move, MoveState, Shard, Status, Table, Topology

__all__ = ["NAMES", "RING_BITS_MAX", "Name", "Number", "Reader", "Text", "read_as", "ring_bits", "write"]

RING_BITS_MAX: Final = 16
RING_VNODES_MAX: Final = 1 << 26
WAY_OUT: Final = "the catalog's content is damaged or not of shardlib; restore it, or name another catalog"
NAMES: Final = ("gates", "moves", "order", "ring", "shards", "tables")
_VNODES_PER_BUCKET: Final = 8192
_VNODE_BYTES: Final = 12
_SHARDS_PER_BUCKET: Final = 256
_GATE_SHARDS_PER_BUCKET: Final = 1024
"""The gates of so many shards are in one bucket."""
_UINT32: Final = next(code for code in "IL" if array(code).itemsize == 4)
_rings: WeakValueDictionary[bytes, Ring] = WeakValueDictionary()
"""Rings that live in this process, by the digest of their content: several clients of a cluster share one."""
_SHARD_ID: Final = re.compile(r"s(0|[1-9][0-9]{0,9})")

Text = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Number = Annotated[int, Meta(ge=0, lt=1 << 32)]
Pair = tuple[int, int]
T = TypeVar("T")


class _Shard(msgspec.Struct, array_like=True, frozen=True):
    number: Number
    name: Name
    primary: Text
    replicas: Annotated[list[Text], Meta(max_length=1024)]
    status: Status
    vnode_count: Number


class _Gate(msgspec.Struct, array_like=True, frozen=True):
    number: Number
    shard: Number
    ranges: list[Pair]


class _Move(msgspec.Struct, array_like=True, frozen=True):
    job: Number
    ranges: list[Pair]
    source: Number
    target: Number
    state: MoveState


class _Table(msgspec.Struct, array_like=True, frozen=True):
    name: Name
    key: Annotated[list[Name], Meta(max_length=64)]
    schema: Name | None


class _Order(msgspec.Struct, array_like=True, frozen=True):
    """The order of `Topology.shards` and of `Ring.shard_ids`."""

    shards: list[Number]
    ring: list[Number]


def number_of(shard_id: str) -> int:
    """17 of `s17`.

    Raises:
        InvalidTopology: the id is not `s` and a number below 2**32.
    """
    found = _SHARD_ID.fullmatch(shard_id)
    if found is None or (number := int(found[1])) >= 1 << 32:
        raise InvalidTopology(f"shard id {shard_id!r} cannot be stored", "ids are s1, s2, ... as next_shard gives them")
    return number


def ring_bits(vnodes: int) -> int:
    """How many leading bits of a token name its bucket: about 4,096 to 8,192 virtual nodes (96 KiB) in each."""
    return min(RING_BITS_MAX, (vnodes // _VNODES_PER_BUCKET).bit_length())


def write(topology: Topology) -> dict[str, dict[int, bytes]]:
    """Every section as bucket number to bytes; an empty bucket is left out.

    Raises:
        InvalidTopology: a shard id is not `s<number>`, or the ring is too large.
    """
    numbers = {shard.id: number_of(shard.id) for shard in topology.shards}
    shards = [
        _Shard(
            numbers[shard.id],
            shard.name,
            shard.primary.reveal(),
            [dsn.reveal() for dsn in shard.replicas],
            shard.status,
            shard.vnode_count,
        )
        for shard in topology.shards
    ]
    gates = [
        _Gate(gate.number, number_of(gate.shard_id), _pairs(gate.ranges))
        for gate in sorted(topology.gates, key=lambda gate: gate.number)
    ]
    moves = [
        _Move(move.job, _pairs(move.ranges), number_of(move.source), number_of(move.target), move.state)
        for move in topology.moves
    ]
    tables = [_Table(table.name, list(table.key), table.schema) for table in topology.tables]
    order = _Order(list(numbers.values()), [numbers[owner] for owner in topology.ring.shard_ids])
    return {
        "gates": _packed(gates, lambda gate: gate.shard // _GATE_SHARDS_PER_BUCKET),
        "moves": {0: msgspec.msgpack.encode(moves)} if moves else {},
        "order": {0: msgspec.msgpack.encode(order)},
        "ring": _write_ring(topology.ring, order.ring),
        "shards": _packed(
            sorted(shards, key=lambda shard: shard.number), lambda shard: shard.number // _SHARDS_PER_BUCKET
        ),
        "tables": {0: msgspec.msgpack.encode(tables)} if tables else {},
    }


def _packed(records: Iterable[T], bucket_of: Callable[[T], int]) -> dict[int, bytes]:
    buckets: dict[int, list[T]] = defaultdict(list)
    for record in records:
        buckets[bucket_of(record)].append(record)
    return {bucket: msgspec.msgpack.encode(inside) for bucket, inside in sorted(buckets.items())}


def _pairs(ranges: Iterable[TokenRange]) -> list[Pair]:
    return [(part.first, part.last) for part in ranges]


def _write_ring(ring: Ring, numbers: list[int]) -> dict[int, bytes]:
    tokens = ring.tokens
    if len(tokens) > RING_VNODES_MAX:
        raise InvalidTopology(f"a ring of {len(tokens)} virtual nodes", f"the limit is {RING_VNODES_MAX}")
    owners = array(_UINT32, map(numbers.__getitem__, ring.owners))
    cuts = _cuts(tokens, ring_bits(len(tokens)))
    return {
        bucket: _little(tokens[first:last]) + _little(owners[first:last])
        for bucket, (first, last) in enumerate(pairwise(cuts))
        if last > first
    }


def _cuts(tokens: array[int], bits: int) -> list[int]:
    """Positions at which the buckets of a ring begin, and its length."""
    return [bisect_left(tokens, bucket << (64 - bits)) for bucket in range(1 << bits)] + [len(tokens)]


def _little(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _from_little(code: str, data: bytes) -> array[int]:
    numbers = array(code, data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def read_as(data: bytes, kind: type[T], what: str) -> T:
    """Msgpack checked against a type.

    Raises:
        InvalidTopology: it does not fit. The message never shows the content, which may hold a DSN.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidTopology(
            f"the {what} of a stored topology cannot be read ({type(error).__name__})", WAY_OUT
        ) from None


class Reader:
    """Builds the parts of a topology from buckets, or takes them from a known topology where they are the same."""

    def __init__(
        self,
        buckets: Mapping[str, Collection[int]],
        same: Mapping[str, Collection[int]],
        raw: Callable[[str, int], bytes],
        known: Topology | None,
    ) -> None:
        """`buckets`: all there are, by section; `same`: those that `known` has alike; `raw`: the bytes of another."""
        self._buckets, self._same, self._raw, self._known = buckets, same, raw, known

    def _all(self, name: str, kind: type[list[T]]) -> list[T]:
        return [
            record for bucket in sorted(self._buckets[name]) for record in read_as(self._raw(name, bucket), kind, name)
        ]

    def order(self) -> tuple[list[int], list[int]]:
        """Shard numbers in the order of the shards, and of the ring's `shard_ids`."""
        if self._known is not None and self._same["order"]:
            return (
                [number_of(shard.id) for shard in self._known.shards],
                [number_of(owner) for owner in self._known.ring.shard_ids],
            )
        found = read_as(self._raw("order", 0), _Order, "order")
        return found.shards, found.ring

    def shards(self, order: list[int]) -> tuple[Shard, ...]:
        """The shards, in the order given."""
        found: dict[int, Shard] = {}
        same = self._same["shards"]
        if self._known is not None and same:
            for shard in self._known.shards:
                if (number := number_of(shard.id)) // _SHARDS_PER_BUCKET in same:
                    found[number] = shard
        for bucket in self._buckets["shards"]:
            if bucket not in same:
                for record in read_as(self._raw("shards", bucket), list[_Shard], "shards"):
                    found[record.number] = _shard(record)
        if len(order) != len(found):
            raise InvalidTopology(f"{len(found)} shards stored, {len(order)} named", WAY_OUT)
        return tuple(found[number] for number in order)

    def gates(self) -> tuple[Gate, ...]:
        """The gates, rising by number."""
        found: list[Gate] = []
        same = self._same["gates"]
        if self._known is not None and same:
            found += [gate for gate in self._known.gates if number_of(gate.shard_id) // _GATE_SHARDS_PER_BUCKET in same]
        for bucket in self._buckets["gates"]:
            if bucket not in same:
                found += [
                    Gate(record.number, f"s{record.shard}", _ranges(record.ranges))
                    for record in read_as(self._raw("gates", bucket), list[_Gate], "gates")
                ]
        return tuple(sorted(found, key=lambda gate: gate.number))

    def moves(self) -> tuple[Move, ...]:
        """The moves under way."""
        if self._known is not None and self._same["moves"]:
            return self._known.moves
        return tuple(
            Move(record.job, _ranges(record.ranges), f"s{record.source}", f"s{record.target}", record.state)
            for record in self._all("moves", list[_Move])
        )

    def tables(self) -> tuple[Table, ...]:
        """The recorded tables."""
        if self._known is not None and self._same["tables"]:
            return self._known.tables
        return tuple(Table(r.name, tuple(r.key), r.schema) for r in self._all("tables", list[_Table]))

    def ring(self, bits: int, order: list[int], name: bytes) -> Ring:
        """The ring of that content digest: one that lives already, or made of the known one and of what was read."""
        found = _rings.get(name)
        if found is None:
            found = _rings[name] = self._make_ring(bits, order)
        return found

    def _make_ring(self, bits: int, order: list[int]) -> Ring:
        """The ring of slices of the known one, and of buckets read."""
        tokens, owners = array("Q"), array(_UINT32)
        ids = tuple(f"s{number}" for number in order)
        index = {number: at for at, number in enumerate(order)}
        known, same = self._known, self._same["ring"]
        buckets = sorted(self._buckets["ring"])
        if known is not None and len(same) == len(buckets) and known.ring.shard_ids == ids:
            return known.ring
        cuts = _cuts(known.ring.tokens, bits) if known is not None and same else []
        before = known.ring.shard_ids if known is not None else ()
        renumber = [index.get(number_of(owner), -1) for owner in before]
        for bucket in buckets:
            if known is not None and bucket in same:
                first, last = cuts[bucket], cuts[bucket + 1]
                tokens.extend(known.ring.tokens[first:last])
                part: Iterable[int] = known.ring.owners[first:last]
                if before != ids:
                    part = map(renumber.__getitem__, part)
                owners.extend(part if isinstance(part, array) and part.typecode == _UINT32 else array(_UINT32, part))
                continue
            data = self._raw("ring", bucket)
            count, rest = divmod(len(data), _VNODE_BYTES)
            if rest or len(tokens) + count > RING_VNODES_MAX:
                raise InvalidTopology(f"bucket {bucket} of the ring has {len(data)} bytes", WAY_OUT)
            tokens.extend(_from_little("Q", data[: count * 8]))
            owners.extend(array(_UINT32, map(index.__getitem__, _from_little(_UINT32, data[count * 8 :]))))
        return Ring(tokens, owners, ids)


def _shard(record: _Shard) -> Shard:
    return Shard(
        f"s{record.number}",
        record.name,
        Dsn(record.primary),
        tuple(map(Dsn, record.replicas)),
        record.status,
        record.vnode_count,
    )


def _ranges(pairs: Iterable[Pair]) -> tuple[TokenRange, ...]:
    return tuple(TokenRange(first, last) for first, last in pairs)
