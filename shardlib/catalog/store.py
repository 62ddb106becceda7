"""What a backend does: short primitives over one small record, immutable chunks, and leases.

Everything that is decided (when to publish, what to read back, when a watch is dead) is written once, above
these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from shardlib.topology.codec import ChunkKey

__all__ = ["Deadline", "Grant", "Record", "Stop", "Store"]


class Deadline:
    """A moment on this process's monotonic clock by which a call is over."""

    __slots__ = ("at",)

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def left(self, at_most: float = float("inf")) -> float:
        """Seconds left, never negative, at most `at_most`."""
        return max(0.0, min(at_most, self.at - time.monotonic()))

    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at


class Record(NamedTuple):
    """The head as it is stored. `revision` rises with every write of it."""

    data: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease as the catalog granted it. `handle` is the backend's own number for it."""

    name: str
    token: int
    handle: int
    ttl_s: float
    sent_at: float
    """Monotonic time at which the request that granted it was *sent*: the catalog counts from no earlier."""
    revision: int = 0
    """The backend's own mark of this holding, by which it compares."""


class Stop(Protocol):
    """Tells a stream to end."""

    def is_set(self) -> bool:
        """Whether the stream must end."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Wait until it must end, at most so long; whether it must."""
        ...

    def attach(self, cancel: Callable[[], None]) -> None:
        """Have `cancel` called, from another thread, when the stream must end; at once if it must already.

        A later call replaces the earlier one.
        """
        ...


class Store(Protocol):
    """One catalog in one backend. Every call raises CatalogUnavailable when there is no answer by its deadline."""

    safe_url: str

    def read_head(self, deadline: Deadline) -> Record | None:
        """The head, None if there is none. Never older than what was stored when the call began."""
        ...

    def swap_head(self, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline) -> bool:
        """Store the head if its revision is `expected` (None: if there is none) and `grant` is still held.

        Sent once. After CatalogUnavailable it may have happened, or may still happen.
        """
        ...

    def put_chunks(self, chunks: Mapping[ChunkKey, bytes], deadline: Deadline) -> None:
        """Store chunks; storing one again is harmless."""
        ...

    def get_chunks(self, keys: Collection[ChunkKey], deadline: Deadline) -> dict[ChunkKey, bytes]:
        """Those of the chunks that are there."""
        ...

    def list_chunks(self, deadline: Deadline) -> set[ChunkKey]:
        """Every chunk there is."""
        ...

    def drop_chunks(self, keys: Collection[ChunkKey], deadline: Deadline) -> None:
        """Delete chunks; missing ones are no error."""
        ...

    def read_document(self, name: str, deadline: Deadline) -> Record | None:
        """A document, None if there is none. Never older than what was stored when the call began."""
        ...

    def swap_document(
        self, name: str, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline
    ) -> int | None:
        """Store a document if its revision is `expected` (None: if there is none) and `grant` is still held.

        Returns its new revision, None if it was not stored. Sent once, like `swap_head`.
        """
        ...

    def list_documents(self, prefix: str, deadline: Deadline) -> dict[str, Record]:
        """Every document whose name begins so, by name."""
        ...

    def follow(self, after: int, stop: Stop, on_record: Callable[[Record], None], on_alive: Callable[[], None]) -> None:
        """Tell of every head with a revision above `after`, until `stop`. Returns only then.

        Intermediate heads may be left out, the last never. `on_alive` is called at least every few seconds
        for as long as the stream is proved to be alive.

        Raises:
            CatalogUnavailable: the stream broke, stalled, or cannot go on from `after`; read the head and
                follow again.
        """
        ...

    def grant(self, name: str, ttl_s: float, holder: str, deadline: Deadline) -> Grant | None:
        """Take a lease, or None if it is held. The token is higher than that of any holder before."""
        ...

    def renew(self, grant: Grant, deadline: Deadline) -> bool:
        """Keep a lease for another `ttl_s`; False if it is lost."""
        ...

    def revoke(self, grant: Grant, deadline: Deadline) -> None:
        """Give a lease up, if it is still held."""
        ...

    def after_fork(self) -> None:
        """In a forked child: forget the parent's connections without touching them."""
        ...

    def close(self) -> None:
        """Close the connections; idempotent."""
        ...
