"""`Idempotency-Key`: the same request has one effect and one answer, whoever of several managers it comes to.

What is kept of a key is in the catalog. Before the effect a record says what the cluster was like, so that whoever
finds it after a crash can tell whether the effect is there. A lease of the catalog says whether its request is still at
work. A key belongs to a subject: two subjects may use the same one.

Keys lie in 256 documents, by the hash of subject and key. Each write takes out what has expired.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from shardlib.catalog import Catalog, Conflict, Lease
from shardlib.errors import InvalidTopology
from shardlib_ops.serving.problem import Problem, problem

__all__ = ["Claim", "IdempotencyKeys", "Kept", "Record", "request_hash"]

_LOG = logging.getLogger("shardlib.ops.api")

TTL_S: Final = 24 * 3600.0
LEASE_S: Final = 10.0
WAIT_S: Final = 5.0
POLL_S: Final = 0.2
ENTRIES_MAX: Final = 400
ANSWER_BYTES_MAX: Final = 64 * 1024
DOCUMENT_BYTES_MAX: Final = 900_000
_TRIES: Final = 20
_PAUSE_MAX_S: Final = 0.25


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """An answer as it is given again.

    Attributes:
        status: of HTTP.
        body: a JSON document; empty for an error.
        headers: further headers.
        slug: of an error: end of its `type`.
        detail: of an error.
    """

    status: int
    body: str = ""
    headers: dict[str, str] = {}
    slug: str = ""
    detail: str = ""

    @property
    def problem(self) -> Problem | None:
        """The error, None for a success."""
        return problem(self.slug, self.detail, headers=self.headers) if self.slug else None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a key.

    Attributes:
        request: hash of the request that came with it.
        before: what the cluster was like before the effect, see `Change.before`.
        expires_at: seconds since 1970 after which it may be used anew.
        answer: None until the request was answered.
    """

    request: str
    before: dict[str, Any]
    expires_at: float
    answer: Kept | None = None


class _Bucket(msgspec.Struct, frozen=True, kw_only=True):
    format: int = 1
    keys: dict[str, Record] = {}


def request_hash(method: str, path: str, content: Mapping[str, Any]) -> str:
    """What tells two requests apart: their call and their values, however these are written down."""
    text = json.dumps([method, path, content], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Claim:
    """A key that this request holds.

    Attributes:
        answer: what the request was answered before; None if it has to be done.
        before: what the cluster was like before the effect.
        interrupted: whether another process has begun it and is gone, so that the effect may be there.
    """

    def __init__(
        self, keys: IdempotencyKeys, name: str, record: Record, lease: Lease | None, *, interrupted: bool = False
    ) -> None:
        self._keys, self._name, self._record, self._lease = keys, name, record, lease
        self.answer, self.before, self.interrupted = record.answer, record.before, interrupted

    async def keep(self, answer: Kept) -> None:
        """Keep the answer. One that is too large is left out: a repetition looks the effect up.

        A failure is logged and not raised: the effect is there, and a repetition finds it.
        """
        if len(answer.body) > ANSWER_BYTES_MAX:
            return
        record = msgspec.structs.replace(self._record, answer=answer)
        try:
            await asyncio.to_thread(self._keys.put, self._name, record, self._lease)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told what was done
            _LOG.warning("the answer to a request with an idempotency key is not kept: %s", type(error).__name__)


class IdempotencyKeys:
    """The keys of a cluster, as one manager works with them.

    Args:
        catalog: whoever hands it in closes it.
        ttl_s: how long an answer is kept, in seconds.
        clock: seconds since 1970.
        lease_s: how long a manager that does not answer is believed to be at work, in seconds.
        wait_s: how long a repetition waits for the request that is at work, in seconds.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.time,
        lease_s: float = LEASE_S,
        wait_s: float = WAIT_S,
    ) -> None:
        self._catalog, self._ttl_s, self._clock = catalog, ttl_s, clock
        self._lease_s, self._wait_s = lease_s, wait_s
        self._holder = f"manager-{os.getpid()}-{secrets.token_hex(4)}"

    @asynccontextmanager
    async def claim(
        self, subject: str, key: str, request: str, before: Callable[[], Awaitable[dict[str, Any]]]
    ) -> AsyncIterator[Claim]:
        """Hold a key while its request is at work.

        Args:
            subject: whose key it is.
            key: as the caller gave it.
            request: see `request_hash`.
            before: what the cluster is like; awaited for a new key only.

        Raises:
            Problem: 422, the key came with another request; 409, its request is still at work.
            CatalogUnavailable: no answer; nothing was done.
        """
        name = hashlib.sha256(json.dumps([subject, key]).encode()).hexdigest()
        record = await self._known(name, request)
        if record is not None and record.answer is not None:
            yield Claim(self, name, record, None)
            return
        lease = await self._acquired(name, request)
        if isinstance(lease, Record):
            yield Claim(self, name, lease, None)
            return
        try:
            # Only now nobody else writes it.
            record = await self._known(name, request)
            interrupted = record is not None
            if record is None:
                record = Record(request=request, before=await before(), expires_at=self._clock() + self._ttl_s)
                await asyncio.to_thread(self.put, name, record, lease)
            yield Claim(self, name, record, lease, interrupted=interrupted)
        finally:
            await asyncio.shield(asyncio.to_thread(lease.release))

    async def _acquired(self, name: str, request: str) -> Lease | Record:
        """The lease of a key; or its record, once another request has answered it."""
        until = time.monotonic() + self._wait_s
        while True:
            lease = await asyncio.to_thread(
                self._catalog.acquire, f"idempotency-{name}", ttl_s=self._lease_s, holder=self._holder
            )
            if lease is not None:
                return lease
            record = await self._known(name, request)
            if record is not None and record.answer is not None:
                return record
            if time.monotonic() >= until:
                detail = "a request with this Idempotency-Key is still at work; ask again"
                raise problem("conflict", detail, headers={"Retry-After": "2"})
            await asyncio.sleep(POLL_S)

    async def _known(self, name: str, request: str) -> Record | None:
        record = await asyncio.to_thread(self.get, name)
        if record is not None and record.request != request:
            raise problem("invalid", "Idempotency-Key: it came with another request before; use a new one")
        return record

    def get(self, name: str) -> Record | None:
        """What is kept of a key, None if nothing is or it has expired. Blocks."""
        record = self._load(name)[0].keys.get(name)
        return record if record is not None and record.expires_at > self._clock() else None

    def put(self, name: str, record: Record | None, lease: Lease | None) -> None:
        """Keep something of a key, or nothing more. Blocks.

        Raises:
            Problem: 503, there are too many keys.
            CatalogUnavailable: no answer.
            Conflict: others change the same document without end, or the lease is lost.
        """
        pause_s = 0.01
        for tries_left in range(_TRIES - 1, -1, -1):
            bucket, revision = self._load(name)
            now = self._clock()
            keys = {each: kept for each, kept in bucket.keys.items() if kept.expires_at > now and each != name}
            if record is not None:
                keys[name] = record
            data = msgspec.json.encode(_Bucket(keys=keys))
            if len(keys) > ENTRIES_MAX or len(data) > DOCUMENT_BYTES_MAX:
                raise problem("unavailable", "too many Idempotency-Keys are kept; ask later, or without one")
            try:
                self._catalog.write_document(_document(name), data, expected=revision, lease=lease)
            except Conflict:
                if not tries_left or (lease is not None and not lease.alive()):
                    raise
                time.sleep(pause_s * random.random())  # noqa: S311 - jitter
                pause_s = min(_PAUSE_MAX_S, pause_s * 2)
            else:
                return

    def _load(self, name: str) -> tuple[_Bucket, int | None]:
        found = self._catalog.read_document(_document(name))
        if found is None:
            return _Bucket(), None
        try:
            return msgspec.json.decode(found.data, type=_Bucket), found.revision
        except msgspec.DecodeError:
            raise InvalidTopology(
                f"the document {_document(name)!r} cannot be read", "restore it, or upgrade shardlib"
            ) from None


def _document(name: str) -> str:
    return f"idempotency/{name[:2]}"
