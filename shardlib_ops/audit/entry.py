"""The entries of the audit log, and how each is chained to the one before. Pure: no clock, no store."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import msgspec

from shardlib_ops.audit.text import cleaned, cleaned_details

__all__ = [
    "GENESIS",
    "Actor",
    "Damaged",
    "Draft",
    "Entry",
    "Head",
    "Kind",
    "decode",
    "draft",
    "encode",
    "hash_of",
    "seal",
]

Kind = Literal["intent", "outcome", "refused"]
Via = Literal["http", "cli", "python"]

SEQ_MAX: Final = 10**12 - 1


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks for something.

    Attributes:
        subject: of the token, or the name of the operating system's user.
        role: that was used, None where there are no roles.
        address: of the client, None if the caller is on this machine.
        request_id: by which logs of other systems tell of the same request.
        via: the way in.
    """

    subject: str
    role: str | None = None
    address: str | None = None
    request_id: str | None = None
    via: Via = "python"


class Head(NamedTuple):
    """The end of a log: the number of its newest entry, and that entry's hash."""

    seq: int
    hash: str


GENESIS: Final = Head(0, "0" * 64)
"""What the first entry is chained to."""


class Draft(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An entry that has no place in the log yet. Its texts are cleaned: `draft()` makes one."""

    id: str
    """Random: tells two attempts apart that are alike in all else."""
    at: str
    """UTC, ISO 8601 with microseconds and a Z."""
    kind: Kind
    of: int | None
    """The number of the intent whose outcome this is."""
    subject: str
    role: str | None
    address: str | None
    request_id: str | None
    via: Via
    action: str
    target: str
    details: dict[str, str]
    result: str
    """Of an outcome `ok`, or the class of the error and its text; of a refusal why; empty for an intent."""


class Entry(Draft, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An entry with its place, chained to the one before.

    `hash` is the SHA-256, in hex, of the entry as JSON with an empty `hash`, its keys sorted and without spaces, in
    UTF-8: `json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` gives the same bytes.
    """

    seq: int
    prev: str
    """The hash of the entry before."""
    hash: str

    @property
    def head(self) -> Head:
        """This entry as the end of a log."""
        return Head(self.seq, self.hash)


class Damaged(NamedTuple):
    """What stands in an entry's place and is none."""

    place: int
    """Where: the number of the document or row, or the offset in the file after it."""
    reason: str
    hash: str
    """Of its bytes. The log goes on after it, chained to this."""


def draft(
    *,
    id: str,  # noqa: A002 - the name of the field
    at: str,
    kind: Kind,
    actor: Actor,
    action: str,
    target: str,
    details: Mapping[str, object] | None = None,
    of: int | None = None,
    result: str = "",
) -> Draft:
    """An entry to be appended, its texts cleaned (see `cleaned`)."""

    def maybe(text: str | None) -> str | None:
        return None if text is None else cleaned(text)

    return Draft(
        id=id,
        at=at,
        kind=kind,
        of=of,
        subject=cleaned(actor.subject),
        role=maybe(actor.role),
        address=maybe(actor.address),
        request_id=maybe(actor.request_id),
        via=actor.via,
        action=cleaned(action),
        target=cleaned(target),
        details=cleaned_details(details),
        result=cleaned(result),
    )


def seal(new: Draft, head: Head) -> Entry:
    """The entry that comes after `head`."""
    fields = {name: getattr(new, name) for name in Draft.__struct_fields__}
    entry = Entry(**fields, seq=head.seq + 1, prev=head.hash, hash="")
    return msgspec.structs.replace(entry, hash=hash_of(entry))


def hash_of(entry: Entry) -> str:
    """The hash that an entry has to have."""
    return hashlib.sha256(encode(msgspec.structs.replace(entry, hash=""))).hexdigest()


def encode(entry: Entry) -> bytes:
    """An entry as one line of JSON, without the line's end."""
    return msgspec.json.encode(entry, order="sorted")


def decode(data: bytes, place: int) -> Entry | Damaged:
    """The entry that was stored, or what stands in its place. Whether its hash holds is for `verify` to say."""
    try:
        return msgspec.json.decode(data, type=Entry)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return Damaged(place, f"not an entry: {cleaned(error)}", hashlib.sha256(data).hexdigest())
