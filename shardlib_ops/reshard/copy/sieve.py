"""What a stream of COPY data goes through on its way: nothing, or a sieve that lets only rows pass that move. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, Protocol

from mmh3 import mmh3_x64_128_utupledigest

from shardlib.ring import TokenRange
from shardlib.token import hash_of
from shardlib_ops.reshard.lines import BUCKET_BITS, MOVES, bucket_table, line_filter, points_of, whole_lines

__all__ = ["BinarySieve", "Pass", "Sieve", "TextSieve"]

_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER: Final = b"\xff\xff"
_SHORT: Final = b"\0\0\0"
_MERGED: Final = 4096


class Sieve(Protocol):
    """Blocks in, blocks out; one for each stream."""

    def feed(self, block: bytes) -> bytes:
        """What is to be written now, maybe nothing."""
        ...

    def finish(self) -> bytes:
        """What is to be written at the end of the stream."""
        ...


class Pass:
    """Everything passes: the server has picked the rows."""

    def feed(self, block: bytes) -> bytes:
        """See `Sieve.feed`."""
        return block

    def finish(self) -> bytes:
        """See `Sieve.finish`."""
        return b""


class TextSieve:
    """Of text COPY whose first columns are the shard key, the lines that move."""

    def __init__(self, ranges: Sequence[TokenRange], hash_function: str, parts: int) -> None:
        self._keep = line_filter(ranges, hash_function, parts)
        self._pending: list[bytes] = []

    def feed(self, block: bytes) -> bytes:
        """See `Sieve.feed`."""
        lines = self._keep(whole_lines(self._pending, block))
        return b"\n".join(lines) + b"\n" if lines else b""

    def finish(self) -> bytes:
        """See `Sieve.finish`."""
        assert not self._pending  # noqa: S101 - COPY ends each line
        return b""


class BinarySieve:
    """Of binary COPY whose rows begin with a mark, the rows that move, without the mark.

    Binary rows say how long each of their fields is, but not how long they are themselves; to walk through them takes
    Python a step for each field. So the query puts a column before all others that holds 16 random bytes, the same in
    each row: a row begins where they are, and blocks are split there by one call. The bytes are chosen after the
    snapshot was taken, so that no stored value can hold them but by a chance of 2**-128 for each place.

    Args:
        mark: the 16 bytes of the first column.
        columns: how many columns follow it, the separate key not counted.
        separate_key: the column after the mark holds the key bytes and is taken away; else it is the first column of
            the table, of a type whose binary form is the key's text.
        ranges: which tokens move.
        hash_function: the cluster's.
    """

    def __init__(
        self, mark: bytes, columns: int, *, separate_key: bool, ranges: Sequence[TokenRange], hash_function: str
    ) -> None:
        fields = 1 + separate_key + columns
        self._mark = fields.to_bytes(2, "big") + len(mark).to_bytes(4, "big") + mark
        self._prefix = columns.to_bytes(2, "big")
        self._separate_key = separate_key
        self._points = points_of(ranges)
        self._table = bucket_table(self._points)
        self._digest = None if hash_function == "murmur3" else hash_of(hash_function)
        self._exact = hash_of(hash_function)
        self._pending: list[bytes] = [b""]
        self._begun = False

    def feed(self, block: bytes) -> bytes:
        """See `Sieve.feed`."""
        last = self._pending[-1]
        if len(last) < _MERGED:
            self._pending[-1] = last = last + block
            seam = last
        else:
            seam = last[1 - len(self._mark) :] + block
            self._pending.append(block)
        if self._mark not in seam:
            return b""  # in the midst of a row, which is put together once
        pieces = b"".join(self._pending).split(self._mark)
        self._pending = [pieces.pop()]
        return self._out(pieces)

    def finish(self) -> bytes:
        """See `Sieve.finish`.

        Raises:
            ValueError: the stream is no binary COPY, or was cut.
        """
        last = b"".join(self._pending)
        if not last.endswith(_TRAILER):
            raise ValueError("the end of the binary COPY data is missing")
        return self._out([last[: -len(_TRAILER)]]) + _TRAILER

    def _out(self, pieces: list[bytes]) -> bytes:
        head = b""
        if not self._begun:
            if not pieces:
                return b""
            self._begun = True
            head = pieces.pop(0)
            if head != _HEADER:
                raise ValueError(f"not the header of binary COPY data: {head[:32]!r}")
        rows = self._keep_murmur3(pieces) if self._digest is None else self._keep(pieces)
        if self._separate_key:
            rows = [row[4 + int.from_bytes(row[:4], "big") :] for row in rows]
        return head + self._prefix + self._prefix.join(rows) if rows else head

    def _keep_murmur3(self, rows: list[bytes]) -> list[bytes]:
        table, points, murmur3 = self._table, self._points, mmh3_x64_128_utupledigest
        return [
            row
            for row in rows
            if (
                (where := table[(token := murmur3(row[4 : 4 + row[3]])[0]) >> BUCKET_BITS])
                and (where == MOVES or bisect_right(points, token) & 1)
                if row.startswith(_SHORT)
                else self._moves(row)
            )
        ]

    def _keep(self, rows: list[bytes]) -> list[bytes]:
        table, points, digest = self._table, self._points, self._exact
        return [
            row
            for row in rows
            if (
                (where := table[(token := digest(row[4 : 4 + row[3]])) >> BUCKET_BITS])
                and (where == MOVES or bisect_right(points, token) & 1)
                if row.startswith(_SHORT)
                else self._moves(row)
            )
        ]

    def _moves(self, row: bytes) -> bool:
        """A key of 256 bytes or more, or NULL, which belongs to no shard."""
        length = int.from_bytes(row[:4], "big", signed=True)
        return length >= 0 and bool(bisect_right(self._points, self._exact(row[4 : 4 + length])) & 1)
