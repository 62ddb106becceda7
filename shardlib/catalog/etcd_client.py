"""The one door to etcd: typed calls for what a catalog needs, and a watch that cannot hang silently."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from shardlib.catalog.etcd_channel import Channels, EtcdTarget, Refused, RpcError, reason_of
from shardlib.catalog.etcd_proto import COMPARE_CREATE, COMPARE_EQUAL, COMPARE_MOD, new
from shardlib.catalog.store import Deadline, Stop
from shardlib.errors import CatalogUnavailable

__all__ = ["Condition", "EtcdClient", "Kv", "Put", "TxnResult"]

_OPS_MAX: Final = 100
"""Operations in one transaction; etcd's default limit is 128."""
_BATCH_BYTES_MAX: Final = 1 << 20
"""Bytes in one request; etcd's default limit is 1.5 MiB."""
_GET_OPS_MAX: Final = 32
_BEAT_S: Final = 2.0
"""A watch asks for a sign of life so often ..."""
_SILENCE_S: Final = 7.0
"""... and gives a member up when it has been silent for so long."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kv:
    """A key with its value. Revisions count the writes of the whole etcd cluster."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of a transaction: the key's modification or creation revision, 0 for a key that is not there."""

    key: bytes
    revision: int
    created: bool = False


@dataclass(frozen=True, slots=True)
class Put:
    """A write of a transaction."""

    key: bytes
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Whether the conditions held and the writes were done, and the revision of the store."""

    done: bool
    revision: int


class EtcdClient:
    """Thread-safe. Every call ends by its deadline with CatalogUnavailable, which names the last failure."""

    def __init__(self, target: EtcdTarget) -> None:
        self._channels = Channels(target)
        self.safe_url = self._channels.safe_url

    def get(self, key: bytes, deadline: Deadline) -> tuple[Kv | None, int]:
        """A key, None if it is not there, and the store's revision: a linearizable read."""
        answer = self._call("Range", new("RangeRequest", key=key), deadline)
        return (_kv(answer.kvs[0]) if answer.kvs else None), int(answer.header.revision)

    def get_many(self, keys: Collection[bytes], deadline: Deadline) -> dict[bytes, bytes]:
        """The values of those keys that are there."""
        found: dict[bytes, bytes] = {}
        for batch in _batches(sorted(keys), len, _GET_OPS_MAX):
            ops = [new("RequestOp", request_range=new("RangeRequest", key=key)) for key in batch]
            answer = self._call("Txn", new("TxnRequest", success=ops), deadline)
            for response in answer.responses:
                found.update({bytes(kv.key): bytes(kv.value) for kv in response.response_range.kvs})
        return found

    def list_keys(self, prefix: bytes, deadline: Deadline) -> list[bytes]:
        """Every key that begins with `prefix`, without the values."""
        keys: list[bytes] = []
        start, end = prefix, _after(prefix)
        while True:
            request = new("RangeRequest", key=start, range_end=end, keys_only=True, limit=10_000)
            answer = self._call("Range", request, deadline)
            keys += [bytes(kv.key) for kv in answer.kvs]
            if not answer.more:
                return keys
            start = keys[-1] + b"\0"

    def get_prefix(self, prefix: bytes, deadline: Deadline) -> list[Kv]:
        """Every key that begins with `prefix`, with its value."""
        found: list[Kv] = []
        start, end = prefix, _after(prefix)
        while True:
            request = new("RangeRequest", key=start, range_end=end, limit=_GET_OPS_MAX)
            answer = self._call("Range", request, deadline)
            found += [_kv(kv) for kv in answer.kvs]
            if not answer.more:
                return found
            start = found[-1].key + b"\0"

    def put_many(self, items: Mapping[bytes, bytes], deadline: Deadline) -> None:
        """Write keys that nobody else writes with other values: a batch may be sent more than once."""
        for batch in _batches(sorted(items), lambda key: len(key) + len(items[key]), _OPS_MAX):
            ops = [new("RequestOp", request_put=new("PutRequest", key=key, value=items[key])) for key in batch]
            self._call("Txn", new("TxnRequest", success=ops), deadline)

    def delete_many(self, keys: Collection[bytes], deadline: Deadline) -> None:
        """Delete keys; those that are not there are no error."""
        for batch in _batches(sorted(keys), len, _OPS_MAX):
            ops = [new("RequestOp", request_delete_range=new("DeleteRangeRequest", key=key)) for key in batch]
            self._call("Txn", new("TxnRequest", success=ops), deadline)

    def txn(self, conditions: Collection[Condition], puts: Collection[Put], deadline: Deadline) -> TxnResult:
        """Write if every condition holds. Sent once: after CatalogUnavailable it may have happened, or may yet."""
        compares = [
            new(
                "Compare",
                result=COMPARE_EQUAL,
                target=COMPARE_CREATE if condition.created else COMPARE_MOD,
                key=condition.key,
                **{"create_revision" if condition.created else "mod_revision": condition.revision},
            )
            for condition in conditions
        ]
        ops = [
            new("RequestOp", request_put=new("PutRequest", key=put.key, value=put.value, lease=put.lease))
            for put in puts
        ]
        answer = self._call("Txn", new("TxnRequest", compare=compares, success=ops), deadline, again=False)
        return TxnResult(bool(answer.succeeded), int(answer.header.revision))

    def lease_grant(self, ttl_s: int, deadline: Deadline) -> tuple[int, int]:
        """A new lease: its id and the seconds it was granted for. A lost answer leaves one that nobody uses."""
        answer = self._call("LeaseGrant", new("LeaseGrantRequest", TTL=ttl_s), deadline)
        return int(answer.ID), int(answer.TTL)

    def lease_keep(self, lease: int, deadline: Deadline) -> int:
        """Renew a lease; the seconds it now has, 0 if it is no more."""
        timeout_s = deadline.left()
        requests = iter([new("LeaseKeepAliveRequest", ID=lease)])
        call, at = self._channels.stream(
            "LeaseKeepAlive", requests, "LeaseKeepAliveResponse", timeout_s, whole_s=timeout_s
        )
        try:
            return int(next(call).TTL)
        except RpcError as error:
            if not self._channels.refused_token(error):
                self._channels.leave(at)
            raise self._channels.unavailable(error.code().name, str(error.details())) from None
        except StopIteration:
            raise CatalogUnavailable(self.safe_url, "the answer to a keepalive is missing") from None
        finally:
            call.cancel()

    def lease_revoke(self, lease: int, deadline: Deadline) -> None:
        """End a lease and delete the keys under it; one that is no more is no error."""
        try:
            self._channels.call("LeaseRevoke", new("LeaseRevokeRequest", ID=lease), deadline)
        except Refused as error:
            if error.code != "NOT_FOUND":
                raise self._channels.unavailable(error.code, error.details) from None

    def watch(
        self,
        key: bytes,
        start_revision: int,
        stop: Stop,
        on_put: Callable[[Kv], None],
        on_alive: Callable[[], None],
    ) -> None:
        """Tell of every write of a key from a revision on, until `stop`. Returns only then.

        Raises:
            CatalogUnavailable: the stream broke, was refused or went silent, or the revision is compacted.
        """
        _Watch(self._channels, key, start_revision, stop).run(on_put, on_alive)

    def _call(self, method: str, request: Any, deadline: Deadline, *, again: bool = True) -> Any:
        try:
            return self._channels.call(method, request, deadline, again=again)
        except Refused as error:
            raise self._channels.unavailable(error.code, error.details) from None

    def after_fork(self) -> None:
        """In a forked child: forget the parent's channels without touching them."""
        self._channels.after_fork()

    def close(self) -> None:
        """Close the channels; idempotent."""
        self._channels.close()


class _Watch:
    """One stream of one watch. Its own requests for progress prove it alive, or show that it is not."""

    def __init__(self, channels: Channels, key: bytes, start_revision: int, stop: Stop) -> None:
        self._channels, self._key, self._start, self._stop = channels, key, start_revision, stop
        self._requests: queue.Queue[None] = queue.Queue()
        self._heard_at = time.monotonic()
        self._busy = False
        self._silent = False
        self._call: Any = None

    def run(self, on_put: Callable[[Kv], None], on_alive: Callable[[], None]) -> None:
        self._call, at = self._channels.stream("Watch", self._ask(), "WatchResponse", _SILENCE_S)
        self._stop.attach(self._call.cancel)
        try:
            for answer in self._call:
                self._heard_at = time.monotonic()
                self._busy = True
                self._take(answer, on_put, on_alive)
                self._busy, self._heard_at = False, time.monotonic()
        except RpcError as error:
            if self._stop.is_set():
                return
            if not self._channels.refused_token(error):
                self._channels.leave(at)
            reason = f"silent for {_SILENCE_S:g} s" if self._silent else reason_of(error)
            raise CatalogUnavailable(self._channels.safe_url, reason) from None
        finally:
            self._requests.put(None)
            self._call.cancel()
        if not self._stop.is_set():
            raise CatalogUnavailable(self._channels.safe_url, "the member ended the watch")

    def _take(self, answer: Any, on_put: Callable[[Kv], None], on_alive: Callable[[], None]) -> None:
        # A refused watch is answered by "created" and "canceled" in one, and is silent for ever after.
        if answer.canceled:
            if answer.compact_revision:
                raise CatalogUnavailable(
                    self._channels.safe_url,
                    f"revision {self._start} is compacted, up to {answer.compact_revision}",
                )
            self._channels.forget_token()
            raise CatalogUnavailable(self._channels.safe_url, f"the watch was refused: {answer.cancel_reason}")
        on_alive()
        puts = [event.kv for event in answer.events if event.type == 0]
        if puts:
            on_put(_kv(puts[-1]))

    def _ask(self) -> Iterator[Any]:
        """The requests of the stream, drawn by a thread of gRPC: the watch, then one for progress at each beat."""
        yield new(
            "WatchRequest",
            create_request=new("WatchCreateRequest", key=self._key, start_revision=self._start, progress_notify=True),
        )
        while True:
            try:
                self._requests.get(timeout=_BEAT_S)
                return
            except queue.Empty:
                if not self._busy and time.monotonic() - self._heard_at > _SILENCE_S:
                    self._silent = True
                    self._call.cancel()
                    return
                yield new("WatchRequest", progress_request=new("WatchProgressRequest"))


def _kv(message: Any) -> Kv:
    return Kv(bytes(message.key), bytes(message.value), int(message.create_revision), int(message.mod_revision))


def _after(prefix: bytes) -> bytes:
    """The first key past all keys with a prefix, which must not end in 0xff."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _batches(keys: list[bytes], size: Callable[[bytes], int], count_max: int) -> Iterator[list[bytes]]:
    """Cut keys so that each part keeps the limits on operations and bytes."""
    batch: list[bytes] = []
    total = 0
    for key in keys:
        if batch and (len(batch) >= count_max or total + size(key) > _BATCH_BYTES_MAX):
            yield batch
            batch, total = [], 0
        batch.append(key)
        total += size(key)
    if batch:
        yield batch
