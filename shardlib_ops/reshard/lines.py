"""Which lines of text COPY are rows of some token ranges. Pure."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final

from mmh3 import mmh3_x64_128_utupledigest

from shardlib.key.composite import SEPARATOR, copy_key
from shardlib.ring import TokenRange, merge_ranges
from shardlib.token import hash_of
from shardlib_ops.reshard.rows import Column

__all__ = ["BUCKET_BITS", "MOVES", "Lines", "binary_alike", "bucket_table", "line_filter", "points_of", "whole_lines"]

BUCKET_BITS: Final = 48
_BUCKETS: Final = 1 << (64 - BUCKET_BITS)
STAYS, MOVES, MIXED = range(3)

_MODIFIER: Final = re.compile(r"\(\d+(,-?\d+)?\)")
# Their binary form is the same on every server of a major version: it holds no OID, no setting, no collation.
_BINARY: Final = frozenset(
    {
        "bigint", "bit", "bit varying", "boolean", "bytea", "character", "character varying", "cidr", "date",
        "double precision", "inet", "integer", "interval", "json", "jsonb", "macaddr", "numeric", "real", "smallint",
        "text", "time with time zone", "time without time zone", "timestamp with time zone",
        "timestamp without time zone", "uuid",
    }
)  # fmt: skip


def binary_alike(origin: Sequence[Column], sink: Sequence[Column]) -> bool:
    """Whether rows of these columns may go in the binary form of COPY from one server to one of its major version.

    The types must be the same to the letter and built in: what a user defined has an OID of its own on each server,
    which arrays and composites carry.
    """
    types = {column.name: column.type for column in sink}
    return all(
        types.get(column.name) == column.type and _MODIFIER.sub("", column.type).removesuffix("[]") in _BINARY
        for column in origin
    )


Lines = Callable[[list[bytes]], list[bytes]]
"""Of some lines of text COPY, without their newlines, those of rows that move."""


def line_filter(ranges: Sequence[TokenRange], hash_function: str, parts: int) -> Lines:
    """A function that keeps the lines whose token is in `ranges`.

    The first `parts` columns of each line are the shard key, as text COPY writes them. A row whose key is NULL belongs
    to no shard and stays.

    One list comprehension over a block of lines: what is done for each row is a split, a hash and a look into a table
    of 65,536 buckets of tokens; only a bucket in which a range begins or ends needs a binary search.
    """
    points = points_of(ranges)
    table = bucket_table(points)
    digest = hash_of(hash_function)
    tab = b"\t"

    def of_escaped(fields: Sequence[bytes]) -> int:
        if rb"\N" in fields:
            return -1
        return digest(copy_key(fields))

    if parts > 1:
        # One more than the parts, so that the rest of the line is apart; it may be empty.

        def token(line: bytes) -> int:
            fields = line.split(tab, parts)[:parts]
            key = SEPARATOR.join(fields)
            return of_escaped(fields) if b"\\" in key else digest(key)

        return lambda lines: [line for line in lines if bisect_right(points, token(line)) & 1]

    if hash_function == "murmur3":
        murmur3 = mmh3_x64_128_utupledigest

        def keep_murmur3(lines: list[bytes]) -> list[bytes]:
            return [
                line
                for line in lines
                if (
                    bisect_right(points, of_escaped((key,))) & 1
                    if b"\\" in (key := line.split(tab, 1)[0])
                    else (where := table[(token := murmur3(key)[0]) >> BUCKET_BITS])
                    and (where == MOVES or bisect_right(points, token) & 1)
                )
            ]

        return keep_murmur3

    def keep(lines: list[bytes]) -> list[bytes]:
        return [
            line
            for line in lines
            if (
                bisect_right(points, of_escaped((key,))) & 1
                if b"\\" in (key := line.split(tab, 1)[0])
                else (where := table[(token := digest(key)) >> BUCKET_BITS])
                and (where == MOVES or bisect_right(points, token) & 1)
            )
        ]

    return keep


def points_of(ranges: Sequence[TokenRange]) -> list[int]:
    """Where ranges begin and, by turns, end: a token is in them if an odd number of points is not above it."""
    points: list[int] = []
    for first, last in merge_ranges(ranges):
        points += (first, last + 1)
    return points


def bucket_table(points: Sequence[int]) -> bytes:
    """For each value of a token's top bits: whether its tokens stay, move, or some of them do."""
    table = bytearray(_BUCKETS)
    inside = (1 << BUCKET_BITS) - 1
    for first, stop in zip(points[::2], points[1::2], strict=True):
        begin, end = (first + inside) >> BUCKET_BITS, stop >> BUCKET_BITS
        if begin < end:
            table[begin:end] = bytes((MOVES,)) * (end - begin)
        for point in (first, stop):
            if point & inside:
                table[point >> BUCKET_BITS] = MIXED
    return bytes(table)


def whole_lines(pending: list[bytes], block: bytes) -> list[bytes]:
    """The lines that `block` completes; what is left of the last one is kept in `pending` for the next block.

    A row of many blocks is put together once, when its end is there.
    """
    cut = block.rfind(b"\n")
    if cut < 0:
        pending.append(block)
        return []
    pending.append(block[:cut])
    lines = b"".join(pending).split(b"\n")
    pending.clear()
    if cut + 1 < len(block):
        pending.append(block[cut + 1 :])
    return lines
