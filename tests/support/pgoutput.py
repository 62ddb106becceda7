"""Messages of PostgreSQL's logical stream, built as the server builds them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from shardlib_ops.reshard.stream.decode import UNCHANGED, Value

HEAD = b"w" + bytes(24)
Old = tuple[bytes, Sequence[Value]] | None


def begin(commit_lsn: int) -> bytes:
    return HEAD + b"B" + struct.pack("!QqI", commit_lsn, 0, 7)


def commit(commit_lsn: int, end: int) -> bytes:
    return HEAD + b"C" + struct.pack("!BQQq", 0, commit_lsn, end, 0)


def row(values: Sequence[Value]) -> bytes:
    parts = [struct.pack("!H", len(values))]
    for value in values:
        if value is None:
            parts.append(b"n")
        elif value is UNCHANGED:
            parts.append(b"u")
        else:
            assert isinstance(value, bytes)
            parts.append(b"t" + struct.pack("!I", len(value)) + value)
    return b"".join(parts)


def insert(oid: int, new: Sequence[Value]) -> bytes:
    return HEAD + b"I" + struct.pack("!I", oid) + b"N" + row(new)


def update(oid: int, old: Old, new: Sequence[Value]) -> bytes:
    before = b"" if old is None else old[0] + row(old[1])
    return HEAD + b"U" + struct.pack("!I", oid) + before + b"N" + row(new)


def delete(oid: int, old: tuple[bytes, Sequence[Value]]) -> bytes:
    return HEAD + b"D" + struct.pack("!I", oid) + old[0] + row(old[1])


def truncate(oids: Sequence[int]) -> bytes:
    return HEAD + b"T" + struct.pack("!IB", len(oids), 0) + b"".join(struct.pack("!I", oid) for oid in oids)


def logical(transactional: bool, lsn: int, prefix: str, content: bytes) -> bytes:
    return (
        HEAD
        + b"M"
        + struct.pack("!BQ", transactional, lsn)
        + prefix.encode()
        + b"\0"
        + struct.pack("!I", len(content))
        + content
    )


def relation(oid: int, schema: str, name: str, full: bool, columns: Sequence[tuple[bool, str, int, int]]) -> bytes:
    head = HEAD + b"R" + struct.pack("!I", oid) + schema.encode() + b"\0" + name.encode() + b"\0"
    head += (b"f" if full else b"d") + struct.pack("!H", len(columns))
    return head + b"".join(
        struct.pack("!B", identity) + column.encode() + b"\0" + struct.pack("!Ii", kind, modifier)
        for identity, column, kind, modifier in columns
    )
