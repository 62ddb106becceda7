"""A catalog in the memory of this process, shared by name: for tests and for programs of one process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from shardlib.catalog.store import Deadline, Grant, Record, Stop
from shardlib.errors import CatalogUnavailable
from shardlib.topology.codec import ChunkKey

__all__ = ["MemoryStore"]

_BEAT_S: Final = 1.0


class _Shelf:
    """What one name holds. `changed` guards all of it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.head: Record | None = None
        self.revision = 0
        self.chunks: dict[ChunkKey, bytes] = {}
        self.documents: dict[str, Record] = {}
        self.held: dict[str, tuple[int, float]] = {}
        self.token = 0

    def holds(self, grant: Grant) -> bool:
        """Whether a lease is held by this grant, now."""
        token, until = self.held.get(grant.name, (0, 0.0))
        return token == grant.token and time.monotonic() < until


_shelves: dict[str, _Shelf] = {}
_shelves_lock = threading.Lock()


def _renew_locks() -> None:
    """A forked child has a copy of its own; a lock that another thread of the parent held would never be free."""
    global _shelves_lock  # noqa: PLW0603 - one registry a process
    _shelves_lock = threading.Lock()
    for shelf in _shelves.values():
        shelf.changed = threading.Condition()


os.register_at_fork(after_in_child=_renew_locks)


class MemoryStore:
    """The store `memory://name`. Every store of that name in this process sees the same content."""

    def __init__(self, name: str) -> None:
        self.safe_url = f"memory://{name}"
        with _shelves_lock:
            self._shelf = _shelves.setdefault(name, _Shelf())
        self._closed = False

    def _open(self) -> _Shelf:
        if self._closed:
            raise CatalogUnavailable(self.safe_url, "this catalog object was closed")
        return self._shelf

    def read_head(self, deadline: Deadline) -> Record | None:
        """See `Store.read_head`."""
        shelf = self._open()
        with shelf.changed:
            return shelf.head

    def swap_head(self, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline) -> bool:
        """See `Store.swap_head`."""
        shelf = self._open()
        with shelf.changed:
            found = None if shelf.head is None else shelf.head.revision
            if found != expected or (grant is not None and not shelf.holds(grant)):
                return False
            shelf.revision += 1
            shelf.head = Record(data, shelf.revision)
            shelf.changed.notify_all()
            return True

    def put_chunks(self, chunks: Mapping[ChunkKey, bytes], deadline: Deadline) -> None:
        """See `Store.put_chunks`."""
        shelf = self._open()
        with shelf.changed:
            shelf.chunks.update(chunks)

    def get_chunks(self, keys: Collection[ChunkKey], deadline: Deadline) -> dict[ChunkKey, bytes]:
        """See `Store.get_chunks`."""
        shelf = self._open()
        with shelf.changed:
            return {key: shelf.chunks[key] for key in keys if key in shelf.chunks}

    def list_chunks(self, deadline: Deadline) -> set[ChunkKey]:
        """See `Store.list_chunks`."""
        shelf = self._open()
        with shelf.changed:
            return set(shelf.chunks)

    def drop_chunks(self, keys: Collection[ChunkKey], deadline: Deadline) -> None:
        """See `Store.drop_chunks`."""
        shelf = self._open()
        with shelf.changed:
            for key in keys:
                shelf.chunks.pop(key, None)

    def read_document(self, name: str, deadline: Deadline) -> Record | None:
        """See `Store.read_document`."""
        shelf = self._open()
        with shelf.changed:
            return shelf.documents.get(name)

    def swap_document(
        self, name: str, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline
    ) -> int | None:
        """See `Store.swap_document`."""
        shelf = self._open()
        with shelf.changed:
            found = shelf.documents.get(name)
            if (found and found.revision) != expected or (grant is not None and not shelf.holds(grant)):
                return None
            shelf.revision += 1
            shelf.documents[name] = Record(data, shelf.revision)
            return shelf.revision

    def list_documents(self, prefix: str, deadline: Deadline) -> dict[str, Record]:
        """See `Store.list_documents`."""
        shelf = self._open()
        with shelf.changed:
            return {name: record for name, record in shelf.documents.items() if name.startswith(prefix)}

    def follow(self, after: int, stop: Stop, on_record: Callable[[Record], None], on_alive: Callable[[], None]) -> None:
        """See `Store.follow`."""
        shelf = self._open()

        def wake() -> None:
            with shelf.changed:
                shelf.changed.notify_all()

        stop.attach(wake)
        while not stop.is_set():
            on_alive()
            with shelf.changed:
                if (shelf.head is None or shelf.head.revision <= after) and not stop.is_set():
                    shelf.changed.wait(_BEAT_S)
                record = shelf.head
            if record is not None and record.revision > after:
                after = record.revision
                on_record(record)

    def grant(self, name: str, ttl_s: float, holder: str, deadline: Deadline) -> Grant | None:
        """See `Store.grant`."""
        shelf = self._open()
        with shelf.changed:
            now = time.monotonic()
            if name in shelf.held and now < shelf.held[name][1]:
                return None
            shelf.token += 1
            shelf.held[name] = shelf.token, now + ttl_s
            return Grant(name, shelf.token, shelf.token, ttl_s, now)

    def renew(self, grant: Grant, deadline: Deadline) -> bool:
        """See `Store.renew`."""
        shelf = self._open()
        with shelf.changed:
            if not shelf.holds(grant):
                return False
            shelf.held[grant.name] = grant.token, time.monotonic() + grant.ttl_s
            return True

    def revoke(self, grant: Grant, deadline: Deadline) -> None:
        """See `Store.revoke`."""
        shelf = self._open()
        with shelf.changed:
            if shelf.holds(grant):
                del shelf.held[grant.name]

    def after_fork(self) -> None:
        """The child has a copy of the content; changes of parent and child do not reach each other."""

    def close(self) -> None:
        """Let go of the content, which stays for others of the same name."""
        self._closed = True
