"""A lease that is kept alive from a thread, and knows by its own clock when it may be lost."""

from __future__ import annotations

import logging
import random
import threading
import time
from types import TracebackType
from typing import Final, Self

from shardlib.catalog.store import Deadline, Grant, Store
from shardlib.errors import CatalogUnavailable

__all__ = ["KeptLease"]

_log = logging.getLogger("shardlib.catalog")
_RELEASE_S: Final = 1.0


class KeptLease:
    """The lease `name`, renewed three times in each `ttl_s` until released or lost.

    `alive()` counts from the moment the last successful renewal was *sent*, so it is never true for longer
    than the catalog holds the lease. Lost is for good: a new holder needs a new lease, with a higher token.
    """

    def __init__(self, store: Store, grant: Grant, timeout_s: float) -> None:
        self.name, self.token, self.grant = grant.name, grant.token, grant
        self._store, self._timeout_s = store, timeout_s
        self._until = grant.sent_at + grant.ttl_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"shardlib-lease-{grant.name}", daemon=True)
        self._thread.start()

    def alive(self) -> bool:
        """Whether the lease is still held, by this process's monotonic clock."""
        return not self._over.is_set() and time.monotonic() < self._until

    def release(self) -> None:
        """Give the lease up; idempotent. When the catalog does not answer, the lease runs out by itself."""
        if self._over.is_set():
            return
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_RELEASE_S)
        try:
            self._store.revoke(self.grant, Deadline(min(_RELEASE_S, self._timeout_s)))
        except CatalogUnavailable as error:
            _log.info("lease %r was not given up, it runs out by itself: %s", self.name, error.reason)

    def forget(self) -> None:
        """In a forked child: the lease is the parent's."""
        self._over = threading.Event()
        self._over.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _keep(self) -> None:
        ttl_s = self.grant.ttl_s
        wait_s = ttl_s / 3
        while not self._over.wait(wait_s * random.uniform(0.8, 1.0)):  # noqa: S311 - jitter
            left = self._until - time.monotonic()
            if left <= 0:
                _log.warning("lease %r ran out before the catalog answered", self.name)
                self._over.set()
                return
            sent_at = time.monotonic()
            try:
                kept = self._store.renew(self.grant, Deadline(min(left, self._timeout_s, ttl_s / 3)))
            except CatalogUnavailable as error:
                _log.debug("lease %r was not renewed yet: %s", self.name, error.reason)
                wait_s = min(ttl_s / 10, 0.5)
                continue
            except Exception:  # noqa: BLE001 - logged: a fault of other code must not end the thread
                _log.exception("renewing lease %r failed", self.name)
                wait_s = min(ttl_s / 10, 0.5)
                continue
            if not kept:
                _log.warning("lease %r is lost to its holder with token %d", self.name, self.token)
                self._over.set()
                return
            self._until, wait_s = sent_at + ttl_s, ttl_s / 3
