"""A watch that survives: one thread follows the stream, another asks now and then whether it missed something."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from shardlib.catalog.store import Deadline, Record, Store
from shardlib.errors import CatalogUnavailable

__all__ = ["StopFlag", "Watching"]

_log = logging.getLogger("shardlib.catalog")
_BACKOFF_FIRST_S: Final = 0.05
_BACKOFF_MAX_S: Final = 2.0
_REFUSED_MAX_S: Final = 10.0
"""A catalog that refuses the login is asked less often: checking a password is work, and may be counted."""
_CLOSE_S: Final = 1.0
_GRACE_S: Final = 1.0


class StopFlag:
    """An event that also calls a function when it is set, to break a call that blocks."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] | None = None

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is set, at most so long; whether it is."""
        return self._event.wait(timeout_s)

    def attach(self, cancel: Callable[[], None]) -> None:
        """Have `cancel` called when the flag is set; at once if it is."""
        with self._lock:
            self._cancel = cancel
            late = self._event.is_set()
        if late:
            cancel()

    def set(self) -> None:
        """Set the flag and break the blocking call."""
        self._event.set()
        self.interrupt()

    def interrupt(self) -> None:
        """Break the blocking call without setting the flag."""
        with self._lock:
            cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()


class Watching:
    """A running watch over a store: the newest head is told after every gap, and no head twice.

    The stream alone is not trusted. A slow poll reads the head as well: when it finds what the stream has not
    told, or a revision that went back (a catalog restored from a backup), it tells of it and the stream
    begins anew.
    """

    def __init__(
        self,
        store: Store,
        on_record: Callable[[Record], None],
        on_alive: Callable[[bool], None],
        *,
        poll_s: float,
        timeout_s: float,
    ) -> None:
        self._store, self._on_record, self._on_alive = store, on_record, on_alive
        self._poll_s, self._timeout_s = poll_s, timeout_s
        self._stop = StopFlag()
        self._telling = threading.Lock()
        self._told: int | None = None
        self._refused = ""
        self._generation = 0
        self._random = random.Random()  # noqa: S311 - jitter
        self._threads = [
            threading.Thread(target=run, name=f"shardlib-{name}", daemon=True)
            for name, run in (("watch", self._follow), ("poll", self._poll))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop both threads; idempotent, returns within about a second."""
        self._stop.set()
        deadline = Deadline(_CLOSE_S)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(deadline.left())

    def _follow(self) -> None:
        failures = 0

        def alive() -> None:
            nonlocal failures
            failures = 0
            self._say_alive(True)

        while not self._stop.is_set():
            refused = False
            try:
                record, generation = self._look()
                self._refused = ""
                self._tell(record, generation)
                tell = partial(self._tell, generation=generation)
                self._store.follow(record.revision if record else 0, self._stop, tell, alive)
            except CatalogUnavailable as error:
                refused = error.final
                if refused and error.reason != self._refused:
                    self._refused = error.reason
                    _log.warning("%s; the watch tries again until it is let in", error)
                else:
                    _log.info("the watch of %s broke: %s", self._store.safe_url, error.reason)
            except Exception:  # noqa: BLE001 - logged: a fault of other code must not end the thread
                _log.exception("the watch of %s failed; it begins again", self._store.safe_url)
            if self._stop.is_set():
                return
            self._say_alive(False)
            failures += 1
            longest_s = _REFUSED_MAX_S if refused else _BACKOFF_MAX_S
            wait_s = min(longest_s, _BACKOFF_FIRST_S * 2 ** min(failures - 1, 10))
            self._stop.wait(wait_s * self._random.uniform(0.5, 1.0))

    def _poll(self) -> None:
        while not self._stop.wait(self._poll_s * self._random.uniform(0.7, 1.0)):
            before = self._generation
            try:
                record, generation = self._look()
            except CatalogUnavailable as error:
                _log.debug("a poll of %s failed: %s", self._store.safe_url, error.reason)
                continue
            except Exception:  # noqa: BLE001 - logged: a fault of other code must not end the thread
                _log.exception("a poll of %s failed", self._store.safe_url)
                continue
            if record is None:
                continue
            if generation == before:
                # The stream is given a moment: that it is later than this read is no fault.
                if self._told_up_to(record) or self._stop.wait(_GRACE_S) or self._told_up_to(record):
                    continue
                _log.warning("the watch of %s missed revision %d", self._store.safe_url, record.revision)
            self._tell(record, generation)
            self._stop.interrupt()

    def _look(self) -> tuple[Record | None, int]:
        """Read the head. A revision below one told before means another history: a new generation begins."""
        told, generation = self._told, self._generation
        record = self._store.read_head(Deadline(self._timeout_s))
        if record is None or told is None or record.revision >= told:
            return record, generation
        with self._telling:
            if self._generation == generation:
                _log.error("%s went back from revision %d to %d", self._store.safe_url, told, record.revision)
                self._told, self._generation = None, generation + 1
            return record, self._generation

    def _told_up_to(self, record: Record) -> bool:
        return self._told is not None and self._told >= record.revision

    def _tell(self, record: Record | None, generation: int) -> None:
        """Hand a record on, once, and never an older one: both threads find records."""
        if record is None:
            return
        with self._telling:
            if generation != self._generation or self._told_up_to(record) or self._stop.is_set():
                return
            self._told = record.revision
            try:
                self._on_record(record)
            except Exception:  # noqa: BLE001 - logged: a fault of other code must not end the thread
                _log.exception("a callback of the watch of %s failed", self._store.safe_url)

    def _say_alive(self, alive: bool) -> None:
        if self._stop.is_set():
            return
        try:
            self._on_alive(alive)
        except Exception:  # noqa: BLE001 - logged: a fault of other code must not end the thread
            _log.exception("a callback of the watch of %s failed", self._store.safe_url)
