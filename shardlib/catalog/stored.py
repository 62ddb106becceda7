"""The catalog over any store: how a topology is loaded, published and watched is written here, once."""

from __future__ import annotations

import logging
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from shardlib.catalog.base import POLL_S, Conflict, Document, Lease, Watch
from shardlib.catalog.decoded import Decoded, find, share
from shardlib.catalog.lease import KeptLease
from shardlib.catalog.store import Deadline, Grant, Record, Store
from shardlib.catalog.watching import Watching
from shardlib.checks import check, seconds
from shardlib.errors import CatalogUnavailable, InvalidArgument, InvalidTopology
from shardlib.topology import Topology
from shardlib.topology.codec import ChunkKey, Encoded, Head, decode, encode, unpack

__all__ = ["StoredCatalog"]

_log = logging.getLogger("shardlib.catalog")
_LOAD_TRIES: Final = 5
_SWEEP_EVERY: Final = 16
_CHUNK_S: Final = 0.02
"""More time for each chunk to be moved, so that a large topology is not cut short by a limit meant for small
reads.
"""
_LEASE_POLL_S: Final = 0.5
_PAUSE_FIRST_S: Final = 0.02
_PAUSE_MAX_S: Final = 0.25
_DOCUMENT_NAME: Final = re.compile(r"[A-Za-z0-9_/-]{1,200}")
_DOCUMENT_BYTES_MAX: Final = 1_000_000
_NONCE_BYTES: Final = 16
_RULES: Final = {"timeout_s": seconds(), "poll_s": seconds()}
_SWAP_PART: Final = 0.6
"""The part of a publish's time that the swap may take; the rest is kept for reading what became of it."""


class StoredCatalog:
    """A `Catalog` over a `Store`.

    Chunks are written before the head that refers to them, under keys of this attempt alone; a reader that
    misses a chunk of an old head reads the head again. What no recent head refers to is deleted after a
    publish; what a publisher left behind when it died is swept every few versions.
    """

    def __init__(self, store: Store, *, timeout_s: float = 3.0, poll_s: float = POLL_S) -> None:
        check(_RULES, {"timeout_s": timeout_s, "poll_s": poll_s})
        self.safe_url = store.safe_url
        self._store, self._timeout_s, self._poll_s = store, timeout_s, poll_s
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._last: Decoded | None = None
        self._watches: list[Watching] = []
        self._leases: list[KeptLease] = []
        self._callback = threading.local()

    def load(self, known: Topology | None = None) -> Topology:
        """The stored topology, in two reads at most; see `Catalog.load`.

        Inside a callback of the watch, the head that the callback tells of is used and not read again.
        """
        deadline = Deadline(self._timeout_s)
        record, head = getattr(self._callback, "found", (None, None))
        missing: tuple[ChunkKey, int] | None = None
        for _ in range(_LOAD_TRIES):
            record = record or self._store.read_head(deadline)
            if record is None:
                raise InvalidTopology(
                    f"the catalog {self.safe_url} holds no topology",
                    "create the cluster first, or correct the URL",
                )
            head = head or self._head(record)
            try:
                return self._decode(record, head, known, deadline)
            except KeyError as error:
                if missing == (error.args[0], record.revision):
                    break
                missing, record, head = (error.args[0], record.revision), None, None
        raise InvalidTopology(
            f"the catalog {self.safe_url} lacks a chunk of its topology", "restore the catalog from a backup"
        )

    def _head(self, record: Record) -> Head:
        """The head of a record, as it was read before if that still lives."""
        last = self._last
        if last is None or last.data != record.data:
            last = find(record.data)
        return unpack(record.data) if last is None else last.head

    def _decode(self, record: Record, head: Head, known: Topology | None, deadline: Deadline) -> Topology:
        last = self._last
        if known is not None and _same(head, known):
            decoded = Decoded(record.data, head, known)
        elif last is not None and last.data == record.data:
            return last.topology
        elif (found := find(record.data)) is not None:
            decoded = found
        else:
            if known is None and last is not None:
                known = last.topology
            known_head = None
            if known is not None:
                known_head = last.head if last is not None and _same(last.head, known) else encode(known).head

            def fetch(keys: set[ChunkKey]) -> Mapping[ChunkKey, bytes]:
                return self._store.get_chunks(keys, Deadline(deadline.left() + _CHUNK_S * len(keys)))

            decoded = Decoded(record.data, head, decode(head, fetch, known, known_head))
            share(decoded)
        self._last = decoded
        return decoded.topology

    def version(self) -> int | None:
        """Version of the stored topology, None for an empty catalog; see `Catalog.version`."""
        record = self._store.read_head(Deadline(self._timeout_s))
        return None if record is None else unpack(record.data).version

    def publish(self, topology: Topology, *, expected: int | None, lease: Lease | None = None) -> None:
        """Replace the topology in one compare-and-swap; see `Catalog.publish`.

        Publishing the topology that is already stored, told by its nonce, succeeds: a caller that was told
        CatalogUnavailable may call again with the same arguments.
        """
        _check(topology, expected)
        grant = _granted(lease)
        deadline = Deadline(self._timeout_s)
        record = self._store.read_head(deadline)
        head = None if record is None else unpack(record.data)
        if head is not None and _is(head, topology):
            return
        found = None if head is None else head.version
        if found != expected or (lease is not None and not lease.alive()):
            raise Conflict(expected, found)
        _check_cluster(head, topology)
        encoded = encode(topology, head)
        if encoded.chunks:
            self._store.put_chunks(encoded.chunks, Deadline(deadline.left() + _CHUNK_S * len(encoded.chunks)))
            deadline = Deadline(self._timeout_s)
        try:
            swapped = self._store.swap_head(
                encoded.data, record.revision if record else None, grant, Deadline(deadline.left() * _SWAP_PART)
            )
        except CatalogUnavailable as error:
            if error.final:  # it had no effect
                raise
            self._settle(encoded, record, expected, deadline, error)
        else:
            if not swapped:
                self._lost(encoded, expected, deadline)
        self._last = Decoded(encoded.data, encoded.head, topology)
        self._clean(encoded)

    def _settle(
        self,
        encoded: Encoded,
        before: Record | None,
        expected: int | None,
        deadline: Deadline,
        error: CatalogUnavailable,
    ) -> None:
        """Learn by reading what became of a swap whose answer did not come. Returns if it happened."""
        wait_s = _PAUSE_FIRST_S
        while True:
            try:
                record = self._store.read_head(Deadline(min(deadline.left(), self._timeout_s / 4)))
            except CatalogUnavailable:
                record = before
            if record is not None and (before is None or record.revision != before.revision):
                head = unpack(record.data)
                if head.nonce == encoded.head.nonce:
                    return
                self._drop_attempt(encoded)
                raise Conflict(expected, head.version)
            if deadline.left() <= wait_s:
                raise CatalogUnavailable(
                    self.safe_url,
                    f"publishing version {encoded.head.version} was not answered ({error.reason})",
                ) from error
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            wait_s = min(_PAUSE_MAX_S, wait_s * 2)

    def _lost(self, encoded: Encoded, expected: int | None, deadline: Deadline) -> None:
        record = self._store.read_head(deadline)
        head = None if record is None else unpack(record.data)
        if head is not None and _is(head, encoded.head):
            return
        self._drop_attempt(encoded)
        raise Conflict(expected, None if head is None else head.version)

    def _drop_attempt(self, encoded: Encoded) -> None:
        """Delete the chunks of an attempt that certainly failed; no other writer shares their keys."""
        try:
            self._store.drop_chunks(list(encoded.chunks), Deadline(self._timeout_s))
        except CatalogUnavailable as error:
            _log.info("chunks of a lost publish stay until the next sweep: %s", error.reason)

    def _clean(self, encoded: Encoded) -> None:
        """Delete what no recent head needs. A failure costs space only, until a later sweep."""
        head = encoded.head
        try:
            drop = set(encoded.drop)
            if head.attempts and head.version % _SWEEP_EVERY == 0:
                stored = self._store.list_chunks(Deadline(self._timeout_s))
                # An attempt for a version that is already taken can never succeed.
                old = {key for key in stored if int.from_bytes(key.attempt[:8], "big") <= head.version}
                drop |= old - head.live()
            if drop:
                self._store.drop_chunks(drop, Deadline(self._timeout_s + _CHUNK_S * len(drop)))
        except CatalogUnavailable as error:
            _log.info("old chunks stay until the next sweep: %s", error.reason)

    def read_document(self, name: str) -> Document | None:
        """A document beside the topology; see `Catalog.read_document`."""
        return _opened(self._store.read_document(_document_name(name), Deadline(self._timeout_s)))

    def write_document(self, name: str, data: bytes, *, expected: int | None, lease: Lease | None = None) -> int:
        """Create or replace a document; see `Catalog.write_document`."""
        _document_name(name)
        if len(data) > _DOCUMENT_BYTES_MAX:
            raise InvalidArgument("data", f"{len(data)} bytes", f"at most {_DOCUMENT_BYTES_MAX} bytes")
        grant = _granted(lease)
        if lease is not None and not lease.alive():
            raise Conflict(expected, None)
        deadline = Deadline(self._timeout_s)
        # What only this write can have stored: by it a lost reply is settled.
        sealed = secrets.token_bytes(_NONCE_BYTES) + data
        try:
            revision = self._store.swap_document(name, sealed, expected, grant, Deadline(deadline.left() * _SWAP_PART))
        except CatalogUnavailable as error:
            if error.final:  # it had no effect
                raise
            return self._settle_document(name, sealed, expected, deadline, error)
        if revision is not None:
            return revision
        found = self._store.read_document(name, deadline)
        if found is not None and found.data == sealed:
            return found.revision
        raise Conflict(expected, None if found is None else found.revision)

    def _settle_document(
        self, name: str, sealed: bytes, expected: int | None, deadline: Deadline, error: CatalogUnavailable
    ) -> int:
        """Learn by reading what became of a write whose answer did not come."""
        for wait_s in _pauses(deadline):
            try:
                record = self._store.read_document(name, Deadline(min(deadline.left(), self._timeout_s / 4)))
            except CatalogUnavailable:
                record = None
            if record is not None and record.data == sealed:
                return record.revision
            if record is not None and record.revision != expected:
                raise Conflict(expected, record.revision)
            time.sleep(wait_s)
        raise CatalogUnavailable(
            self.safe_url, f"writing document {name!r} was not answered ({error.reason})"
        ) from error

    def list_documents(self, prefix: str) -> dict[str, Document]:
        """Documents by name; see `Catalog.list_documents`."""
        found = self._store.list_documents(_document_name(prefix), Deadline(self._timeout_s))
        opened = {name: _opened(record) for name, record in sorted(found.items())}
        return {name: document for name, document in opened.items() if document is not None}

    def watch(self, on_change: Callable[[int], None], on_alive: Callable[[bool], None]) -> Watch:
        """Follow the topology's versions from threads of its own; see `Catalog.watch`."""

        def on_record(record: Record) -> None:
            head = self._head(record)
            self._callback.found = record, head
            try:
                on_change(head.version)
            finally:
                del self._callback.found

        watching = Watching(self._store, on_record, on_alive, poll_s=self._poll_s, timeout_s=self._timeout_s)
        with self._lock:
            self._watches.append(watching)
        return watching

    def acquire(self, name: str, *, ttl_s: float, holder: str, wait_s: float = 0.0) -> Lease | None:
        """Take a lease and keep it alive; see `Catalog.acquire`."""
        if not name or len(name) > 200:
            raise InvalidArgument("name", name, "1 to 200 characters")
        if not 0.5 <= ttl_s <= 3600:
            raise InvalidArgument("ttl_s", ttl_s, "0.5 to 3600 seconds")
        until = Deadline(wait_s)
        while True:
            grant = self._store.grant(name, ttl_s, holder, Deadline(self._timeout_s))
            if grant is not None:
                lease = KeptLease(self._store, grant, self._timeout_s)
                with self._lock:
                    self._leases = [other for other in self._leases if other.alive()] + [lease]
                return lease
            if until.passed():
                return None
            step_s = min(_LEASE_POLL_S, ttl_s / 4) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
            time.sleep(until.left(step_s))

    def after_fork(self) -> None:
        """In a forked child: the parent's connections, watches and leases are not ours."""
        for lease in self._leases:
            lease.forget()
        self._reset()
        self._store.after_fork()

    def close(self) -> None:
        """Stop the watches, give the leases up, close the connections; idempotent."""
        with self._lock:
            watches, self._watches = self._watches, []
            leases, self._leases = self._leases, []
        for watching in watches:
            watching.close()
        for lease in leases:
            lease.release()
        self._store.close()


def _granted(lease: Lease | None) -> Grant | None:
    if lease is None:
        return None
    if not isinstance(lease, KeptLease):
        raise InvalidArgument("lease", type(lease).__name__, "a lease that this catalog's acquire() returned")
    return lease.grant


def _document_name(name: str) -> str:
    if not isinstance(name, str) or not _DOCUMENT_NAME.fullmatch(name):
        raise InvalidArgument("name", name, "1 to 200 letters, digits, `-`, `_` and `/`")
    return name


def _opened(record: Record | None) -> Document | None:
    return None if record is None else Document(record.data[_NONCE_BYTES:], record.revision)


def _pauses(deadline: Deadline) -> Iterator[float]:
    """Growing pauses with jitter, for as long as there is time for one."""
    wait_s = _PAUSE_FIRST_S
    while deadline.left() > wait_s:
        yield wait_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        wait_s = min(_PAUSE_MAX_S, wait_s * 2)


def _check(topology: Topology, expected: int | None) -> None:
    if topology.version <= (expected or 0):
        raise InvalidArgument("topology.version", topology.version, f"above the expected version {expected}")
    if not topology.nonce:
        raise InvalidArgument("topology.nonce", topology.nonce, "a text that no other topology has")


def _check_cluster(head: Head | None, topology: Topology) -> None:
    if head is None:
        return
    stored, new = (head.cluster_id, head.hash_function), (topology.cluster_id, topology.hash_function)
    if stored != new:
        raise InvalidTopology(
            f"the catalog holds cluster {stored[0]!r} ({stored[1]}), not {new[0]!r} ({new[1]})",
            "a cluster keeps its id and its hash function for life",
        )


def _is(head: Head, wanted: Topology | Head) -> bool:
    return (head.version, head.nonce) == (wanted.version, wanted.nonce)


def _same(head: Head, other: Topology | Head) -> bool:
    return _is(head, other) and head.cluster_id == other.cluster_id
