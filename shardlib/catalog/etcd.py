"""The catalog in etcd. Keys, below `/shardlib/<name>/`: `head`, `chunk/<attempt>/<digest>`, `doc/<name>`,
`lease/<name>`, `token/<name>`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping

from shardlib.catalog.etcd_channel import EtcdTarget
from shardlib.catalog.etcd_client import Condition, EtcdClient, Kv, Put
from shardlib.catalog.store import Deadline, Grant, Record, Stop
from shardlib.errors import CatalogUnavailable
from shardlib.topology.codec import ChunkKey

__all__ = ["EtcdStore", "EtcdTarget"]


class EtcdStore:
    """The store `etcd://.../name`."""

    def __init__(self, target: EtcdTarget) -> None:
        self.safe_url = target.safe()
        self._client = EtcdClient(target)
        self._root = b"/shardlib/" + target.name.encode() + b"/"
        self._head = self._root + b"head"
        self._chunks = self._root + b"chunk/"
        self._documents = self._root + b"doc/"

    def read_head(self, deadline: Deadline) -> Record | None:
        """See `Store.read_head`."""
        kv, _ = self._client.get(self._head, deadline)
        return None if kv is None else Record(kv.value, kv.mod_revision)

    def swap_head(self, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline) -> bool:
        """See `Store.swap_head`."""
        return self._swap(self._head, data, expected, grant, deadline) is not None

    def _swap(
        self, key: bytes, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline
    ) -> int | None:
        conditions = [Condition(key, expected or 0)]
        if grant is not None:
            conditions.append(Condition(self._lease_key(grant.name), grant.revision, created=True))
        result = self._client.txn(conditions, [Put(key, data)], deadline)
        return result.revision if result.done else None

    def read_document(self, name: str, deadline: Deadline) -> Record | None:
        """See `Store.read_document`."""
        kv, _ = self._client.get(self._documents + name.encode(), deadline)
        return None if kv is None else Record(kv.value, kv.mod_revision)

    def swap_document(
        self, name: str, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline
    ) -> int | None:
        """See `Store.swap_document`."""
        return self._swap(self._documents + name.encode(), data, expected, grant, deadline)

    def list_documents(self, prefix: str, deadline: Deadline) -> dict[str, Record]:
        """See `Store.list_documents`."""
        start = len(self._documents)
        found = self._client.get_prefix(self._documents + prefix.encode(), deadline)
        return {kv.key[start:].decode(): Record(kv.value, kv.mod_revision) for kv in found}

    def put_chunks(self, chunks: Mapping[ChunkKey, bytes], deadline: Deadline) -> None:
        """See `Store.put_chunks`."""
        self._client.put_many({self._chunk_key(key): chunk for key, chunk in chunks.items()}, deadline)

    def get_chunks(self, keys: Collection[ChunkKey], deadline: Deadline) -> dict[ChunkKey, bytes]:
        """See `Store.get_chunks`."""
        names = {self._chunk_key(key): key for key in keys}
        return {names[name]: chunk for name, chunk in self._client.get_many(names, deadline).items()}

    def list_chunks(self, deadline: Deadline) -> set[ChunkKey]:
        """See `Store.list_chunks`."""
        found = set()
        for name in self._client.list_keys(self._chunks, deadline):
            attempt, _, digest = name.removeprefix(self._chunks).decode().partition("/")
            found.add(ChunkKey(bytes.fromhex(attempt), bytes.fromhex(digest)))
        return found

    def drop_chunks(self, keys: Collection[ChunkKey], deadline: Deadline) -> None:
        """See `Store.drop_chunks`."""
        self._client.delete_many([self._chunk_key(key) for key in keys], deadline)

    def follow(self, after: int, stop: Stop, on_record: Callable[[Record], None], on_alive: Callable[[], None]) -> None:
        """See `Store.follow`."""

        def on_put(kv: Kv) -> None:
            on_record(Record(kv.value, kv.mod_revision))

        self._client.watch(self._head, after + 1, stop, on_put, on_alive)

    def grant(self, name: str, ttl_s: float, holder: str, deadline: Deadline) -> Grant | None:
        """See `Store.grant`.

        The token is one more than the last one, which is kept in a key without a lease, and no less than the
        revision of the store: it goes on rising when the store was restored from a backup with its revision bumped.
        """
        key, counter_key = self._lease_key(name), self._root + b"token/" + name.encode()
        held, _ = self._client.get(key, deadline)
        if held is not None:
            return None
        counter, revision = self._client.get(counter_key, deadline)
        token = max(int(counter.value) + 1 if counter is not None else 1, revision)
        sent_at = time.monotonic()
        lease, granted_s = self._client.lease_grant(math.ceil(ttl_s), deadline)
        value = f"{token} {holder}".encode()
        conditions = [
            Condition(key, 0, created=True),
            Condition(counter_key, counter.mod_revision if counter else 0),
        ]
        try:
            done = self._client.txn(
                conditions, [Put(key, value, lease), Put(counter_key, str(token).encode())], deadline
            )
        except CatalogUnavailable:
            # Whether or not it happened, nobody uses this lease: it takes the key away with it when it runs out.
            self._try_revoke(lease)
            raise
        if not done.done:
            self._try_revoke(lease)
            return None
        return Grant(name, token, lease, min(float(granted_s), ttl_s), sent_at, done.revision)

    def _try_revoke(self, lease: int) -> None:
        try:
            self._client.lease_revoke(lease, Deadline(0.5))
        except CatalogUnavailable:
            pass  # it runs out by itself

    def renew(self, grant: Grant, deadline: Deadline) -> bool:
        """See `Store.renew`."""
        return self._client.lease_keep(grant.handle, deadline) > 0

    def revoke(self, grant: Grant, deadline: Deadline) -> None:
        """See `Store.revoke`."""
        self._client.lease_revoke(grant.handle, deadline)

    def after_fork(self) -> None:
        """See `Store.after_fork`."""
        self._client.after_fork()

    def close(self) -> None:
        """See `Store.close`."""
        self._client.close()

    def _lease_key(self, name: str) -> bytes:
        return self._root + b"lease/" + name.encode()

    def _chunk_key(self, key: ChunkKey) -> bytes:
        return self._chunks + f"{key.attempt.hex()}/{key.digest.hex()}".encode()
