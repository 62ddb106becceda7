"""The contract between the library and the place where the topology lives."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self

from shardlib.topology import Topology

__all__ = ["POLL_S", "Catalog", "Conflict", "Document", "Lease", "Watch"]

POLL_S: Final = 30.0
"""Seconds between two reads of the catalog beside its watch, unless somebody says otherwise."""


class Conflict(Exception):  # noqa: N818 - it is an answer, not a fault: somebody else published first
    """The stored topology is not the expected one. `found` is its version, None for an empty catalog."""

    def __init__(self, expected: int | None, found: int | None) -> None:
        super().__init__(expected, found)
        self.expected, self.found = expected, found


class Document(NamedTuple):
    """A small record beside the topology, such as that of a job. `revision` rises with every write of it."""

    data: bytes
    revision: int


class Watch(Protocol):
    """A running watch. Closing it is idempotent and returns within a second."""

    def close(self) -> None:
        """Stop watching; no callback runs after this returns."""
        ...


class Lease(Protocol):
    """One holder at a time for a name, for as long as it is kept alive.

    `token` rises with every new holder of a name: whoever checks it refuses a holder that was paused and woke up.
    """

    name: str
    token: int

    def alive(self) -> bool:
        """Whether this holder still holds the lease, by its own monotonic clock (never later than the catalog's)."""
        ...

    def release(self) -> None:
        """Give the lease up; idempotent, and silent when it was lost already."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Catalog(Protocol):
    """Where the topology lives: etcd, a PostgreSQL database, or the memory of this process.

    All methods block, are thread-safe, and take at most `timeout_s` (seconds, set at construction) each. After
    `os.fork` the child calls `after_fork()` before anything else.
    """

    safe_url: str
    """The URL without secrets, for messages."""

    def load(self, known: Topology | None = None) -> Topology:
        """The stored topology. Parts that `known` already holds are not fetched again.

        Raises:
            CatalogUnavailable: no answer in time.
            InvalidTopology: the catalog is empty or its content damaged.
        """
        ...

    def version(self) -> int | None:
        """Version of the stored topology, None for an empty catalog: one small read.

        Raises:
            CatalogUnavailable: no answer in time.
        """
        ...

    def publish(self, topology: Topology, *, expected: int | None, lease: Lease | None = None) -> None:
        """Replace the whole topology in one compare-and-swap.

        A lost reply is settled by reading the nonce back, never by sending the write again.

        Args:
            topology: the next topology; its version is higher than `expected` and its nonce is unique.
            expected: version that is stored now; None means that the catalog must be empty.
            lease: if given, the swap also requires that this lease is still held.

        Raises:
            Conflict: another topology is stored, or the lease is lost.
            CatalogUnavailable: no answer in time, and reading back did not settle it. The write may have happened.
        """
        ...

    def watch(self, on_change: Callable[[int], None], on_alive: Callable[[bool], None]) -> Watch:
        """Call `on_change(version)` at each new version, from a thread of the watch, until closed.

        Survives restarts, dead members, stopped servers, compaction and expired credentials, with backoff and
        jitter; after each gap the newest version is delivered. `on_alive(True/False)` tells that the stream was
        proved alive (at least every few seconds) or was lost. Never raises: a fault of a callback is logged.
        """
        ...

    def acquire(self, name: str, *, ttl_s: float, holder: str, wait_s: float = 0.0) -> Lease | None:
        """Take the lease `name`, or return None if another holds it for the whole of `wait_s`.

        The lease is kept alive from a thread until released or lost.

        Raises:
            CatalogUnavailable: no answer in time.
        """
        ...

    def read_document(self, name: str) -> Document | None:
        """A document beside the topology, None if there is none.

        Raises:
            CatalogUnavailable: no answer in time.
        """
        ...

    def write_document(self, name: str, data: bytes, *, expected: int | None, lease: Lease | None = None) -> int:
        """Create a document, or replace one; a lost reply is settled by reading it back, never by writing again.

        Args:
            name: 1 to 200 characters of letters, digits, `-`, `_` and `/`.
            data: at most 1 MB.
            expected: revision that is stored now; None means that there is none yet.
            lease: if given, the write also requires that this lease is still held.

        Returns:
            its new revision.

        Raises:
            Conflict: another revision is stored, or the lease is lost.
            CatalogUnavailable: no answer in time, and reading back did not settle it. The write may have happened.
        """
        ...

    def list_documents(self, prefix: str) -> dict[str, Document]:
        """The documents whose names begin so, by name in rising order.

        Raises:
            CatalogUnavailable: no answer in time.
        """
        ...

    def after_fork(self) -> None:
        """Called in a forked child: forget every connection and thread of the parent without touching them."""
        ...

    def close(self) -> None:
        """Close connections, watches and leases; idempotent."""
        ...
