"""Messages of PostgreSQL's logical stream (`pgoutput`, protocol version 1, text), read with little work for each. Pure.

A message is the payload of one CopyData: `w`, three 8-byte numbers, then what the plugin wrote, from byte 25 on.

Source: PostgreSQL documentation, "Logical Replication Message Formats" and "Streaming Replication Protocol".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Final

from shardlib_ops.reshard.stream.faults import MalformedStream

__all__ = [
    "BODY",
    "UNCHANGED",
    "Relation",
    "RelationColumn",
    "Unchanged",
    "Value",
    "lsn_number",
    "lsn_text",
    "malformed",
    "read_begin",
    "read_commit",
    "read_field",
    "read_message",
    "read_relation",
    "read_truncate",
    "read_tuple",
]

BODY: Final = 25
"""Where the plugin's message begins in a `w` message."""


class Unchanged(Enum):
    """The value of a column that is stored out of line and was not changed: the stream does not carry it."""

    UNCHANGED = "u"


UNCHANGED: Final = Unchanged.UNCHANGED

Value = bytes | None | Unchanged
"""A column: the text of its value, NULL, or not carried."""

_NULL: Final = 0x6E
_TEXT: Final = 0x74
_SAME: Final = 0x75
_begin: Final = struct.Struct("!QqI").unpack_from
_commit: Final = struct.Struct("!BQQq").unpack_from
_long: Final = struct.Struct("!Q").unpack_from
_int: Final = struct.Struct("!I").unpack_from
_column: Final = struct.Struct("!Ii").unpack_from


def lsn_number(text: str) -> int:
    """`16/B374D848` as a number of bytes."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def lsn_text(number: int) -> str:
    """A number of bytes as PostgreSQL's `pg_lsn`."""
    return f"{number >> 32:X}/{number & 0xFFFFFFFF:X}"


def malformed(message: bytes, why: str) -> MalformedStream:
    """The error for a message that cannot be read. It shows its kind and length, not the rows in it."""
    kind = chr(message[BODY]) if len(message) > BODY else ""
    return MalformedStream(
        f"a message {kind!r} of {len(message)} bytes cannot be read: {why}",
        "the server's PostgreSQL must be a version that shardlib supports",
    )


@dataclass(frozen=True, slots=True)
class RelationColumn:
    """A column of a table as the stream announces it.

    Attributes:
        name: unquoted.
        identity: whether the old row's image holds it.
        type_oid: of the origin's database.
        modifier: of the type, -1 without one.
    """

    name: str
    identity: bool
    type_oid: int
    modifier: int


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as the stream announces it, before its first change and after each change of it.

    Attributes:
        oid: its 4 bytes, as the changes name it.
        schema: unquoted; empty for `pg_catalog`.
        name: unquoted.
        full: whether the old row's image is whole.
        columns: in the order of the values, without generated ones.
    """

    oid: bytes
    schema: str
    name: str
    full: bool
    columns: tuple[RelationColumn, ...]


def read_begin(message: bytes) -> int:
    """LSN of the commit record of the transaction that begins."""
    return int(_begin(message, 26)[0])


def read_commit(message: bytes) -> int:
    """LSN just after the commit record of the transaction that ends."""
    return int(_commit(message, 26)[2])


def read_message(message: bytes) -> tuple[bool, int, str, bytes]:
    """A logical message: (whether it belongs to the transaction around it, LSN of its record, prefix, content)."""
    end = message.index(b"\0", 35)
    (size,) = _int(message, end + 1)
    content = message[end + 5 :]
    if len(content) != size:
        raise malformed(message, f"{len(content)} bytes of content, not {size}")
    return bool(message[26] & 1), int(_long(message, 27)[0]), message[35:end].decode(), content


def read_truncate(message: bytes) -> list[bytes]:
    """The oids, of 4 bytes each, of the tables that were emptied."""
    (count,) = _int(message, 26)
    if len(message) != 31 + 4 * count:
        raise malformed(message, f"it should name {count} tables")
    return [message[at : at + 4] for at in range(31, len(message), 4)]


def read_relation(message: bytes) -> Relation:
    """A table's announcement."""
    schema_end = message.index(b"\0", 30)
    name_end = message.index(b"\0", schema_end + 1)
    full = message[name_end + 1] == 0x66
    at, columns = name_end + 4, []
    for _ in range(message[name_end + 2] << 8 | message[name_end + 3]):
        end = message.index(b"\0", at + 1)
        type_oid, modifier = _column(message, end + 1)
        columns.append(RelationColumn(message[at + 1 : end].decode(), bool(message[at] & 1), type_oid, modifier))
        at = end + 9
    if at != len(message):
        raise malformed(message, "bytes after its last column")
    return Relation(
        message[26:30],
        message[30:schema_end].decode(),
        message[schema_end + 1 : name_end].decode(),
        full,
        tuple(columns),
    )


def read_tuple(message: bytes, at: int) -> tuple[list[Value], int]:
    """The values of a row that begins at byte `at`, and where it ends.

    Raises:
        MalformedStream: a kind of value that is not asked for, or the message ends too soon.
    """
    count = message[at] << 8 | message[at + 1]
    at += 2
    values: list[Value] = []
    append, number = values.append, int.from_bytes
    for _ in range(count):
        kind = message[at]
        if kind == _TEXT:
            start = at + 5
            # Most values are shorter than 256 bytes.
            if message[at + 1] or message[at + 2] or message[at + 3]:
                at = start + number(message[at + 1 : start], "big")
            else:
                at = start + message[at + 4]
            append(message[start:at])
        elif kind == _NULL:
            append(None)
            at += 1
        elif kind == _SAME:
            append(UNCHANGED)
            at += 1
        else:
            raise malformed(message, f"a value of the kind {kind:#x}")
    if at > len(message):
        raise malformed(message, "it ends in the middle of a row")
    return values, at


def read_field(message: bytes, at: int, index: int) -> Value:
    """The value number `index`, from 0, of a row that begins at byte `at`, without reading the others' bytes."""
    at += 2
    while True:
        kind = message[at]
        if kind == _TEXT:
            start = at + 5
            end = start + int.from_bytes(message[at + 1 : start], "big")
            if index == 0:
                return message[start:end]
            at = end
        elif kind not in (_NULL, _SAME):
            raise malformed(message, f"a value of the kind {kind:#x}")
        elif index == 0:
            return None if kind == _NULL else UNCHANGED
        else:
            at += 1
        index -= 1
