"""What is written down of a change of all shards' tables before any of them is changed: `schema/change`."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from shardlib.errors import InvalidTopology

__all__ = ["CHANGE", "Change", "decode_change", "encode_change"]

CHANGE: Final = "schema/change"
"""Name of the document in the catalog."""


class Change(msgspec.Struct, frozen=True):
    """The last change of the tables of all shards; it stays in the catalog.

    Attributes:
        target: revisions that every shard is to have, or empty before they are known.
        began_at: UTC, ISO 8601; a label for people.
        alone: whether the jobs were looked at since this stands there: one that starts later sees it, and waits.
        ended_at: None while it is under way, or when it stopped in the middle: some shards have it, others do not.
        done: names of the shards that are at the target.
        failed: name of the shard where it stopped.
        error: why.
    """

    target: tuple[str, ...] = ()
    began_at: str = ""
    alone: bool = False
    ended_at: str | None = None
    done: tuple[str, ...] = ()
    failed: str | None = None
    error: str | None = None

    @property
    def open(self) -> bool:
        """Whether it is under way or half done."""
        return self.ended_at is None

    def changed(self, **changes: Any) -> Change:
        """The record with these fields replaced."""
        return msgspec.structs.replace(self, **changes)

    def __str__(self) -> str:
        where = f"; it stopped at shard {self.failed!r}" if self.failed else ""
        target = ", ".join(self.target) or "a revision"
        return f"the change to {target} that began at {self.began_at} has not ended{where}"


def encode_change(change: Change) -> bytes:
    """JSON, which a person can read in the catalog. It holds no DSN."""
    return msgspec.json.encode(change)


def decode_change(data: bytes) -> Change:
    """A change from the bytes of `encode_change`.

    Raises:
        InvalidTopology: damaged, or of a later version.
    """
    try:
        return msgspec.json.decode(data, type=Change)
    except msgspec.DecodeError as error:
        raise InvalidTopology(
            f"the record of a schema change cannot be read: {error}", "upgrade shardlib, or restore the catalog"
        ) from error
