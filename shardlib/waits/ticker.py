"""Periodic work in a thread of its own."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

from shardlib.errors import InvalidArgument
from shardlib.waits.forks import forget_after_fork

__all__ = ["Ticker"]

log = logging.getLogger("shardlib.waits")


class Ticker:
    """A daemon thread that calls a method every `interval_s` seconds, until `stop` or its object is gone.

    In a forked child it runs again from the next `start` on.
    """

    def __init__(self, interval_s: float, tick: Callable[[], None], name: str) -> None:
        if interval_s <= 0:
            raise InvalidArgument("interval_s", interval_s, "more than 0 seconds")
        self._interval_s, self._name = interval_s, name
        self._tick = weakref.WeakMethod(tick)
        self._lock = threading.Lock()
        self._stop: threading.Event | None = None
        forget_after_fork(self)

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._stop is not None

    def start(self) -> None:
        """Start the thread unless it runs already."""
        with self._lock:
            if self._stop is None:
                stop = self._stop = threading.Event()
                arguments = (stop, self._interval_s, self._tick)
                threading.Thread(target=_tick_until, args=arguments, name=self._name, daemon=True).start()

    def stop(self) -> None:
        """End the thread soon; it is not waited for."""
        with self._lock:
            stop, self._stop = self._stop, None
        if stop is not None:
            stop.set()

    def after_fork_in_child(self) -> None:
        """The parent's thread is not here."""
        self._lock, self._stop = threading.Lock(), None


def _tick_until(stop: threading.Event, interval_s: float, tick: weakref.WeakMethod[Callable[[], None]]) -> None:
    while not stop.wait(interval_s):
        method = tick()
        if method is None:
            return
        try:
            method()
        except Exception:  # the next tick tries again
            log.exception("periodic work failed")
        del method
