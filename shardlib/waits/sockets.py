"""Waiting for the sockets of an event loop, at a fraction of what adding and removing a reader for each wait costs."""

from __future__ import annotations

import asyncio
import select
import threading
from typing import Any, Final
from weakref import WeakKeyDictionary

from shardlib.waits.forks import forget_after_fork

__all__ = ["SocketWatch", "give_way", "watch_of"]

LOOK_AGAIN_S: Final = 0.1


class SocketWatch:
    """Tells when a socket has something to read. One for each event loop, used by its thread only.

    It holds an epoll of its own, which the loop watches: a socket stays known there from its first wait on, each
    further one is one system call, and a number that was closed and given to another socket confuses no reader that
    somebody else has added to the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._looking = False
        self._epoll = select.epoll()
        self._once = select.EPOLLIN | select.EPOLLONESHOT
        loop.add_reader(self._epoll.fileno(), self._arrived)

    def readable(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> asyncio.Future[bool]:
        """A future that is True once there is something to read, or False after a tenth of a second at most.

        False asks the caller to see that the socket is still open, and to wait again. A second wait for the same
        number, which must have been closed, ends the first with False.

        Args:
            loop: the running loop, of this watch; not kept here, so that it can be collected.
            descriptor: number of the socket.

        Raises:
            OSError: the socket is closed.
        """
        try:
            self._epoll.modify(descriptor, self._once)
        except FileNotFoundError:
            self._epoll.register(descriptor, self._once)
        future: asyncio.Future[bool] = loop.create_future()
        before = self._waiting.get(descriptor)
        if before is not None and not before.done():
            before.set_result(False)
        self._waiting[descriptor] = future
        if not self._looking:
            self._looking = True
            loop.call_later(LOOK_AGAIN_S, self._look_again)
        return future

    def _arrived(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            future = self._waiting.pop(descriptor, None)
            if future is not None and not future.done():
                future.set_result(True)

    def _look_again(self) -> None:
        """A socket that another thread has closed tells nothing."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_result(False)
        self._looking = False

    def close(self) -> None:
        """Close the epoll; its loop no longer runs."""
        self._epoll.close()


class _Watches:
    """The watch of each loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: WeakKeyDictionary[Any, SocketWatch] = WeakKeyDictionary()
        forget_after_fork(self)

    def of(self, loop: asyncio.AbstractEventLoop) -> SocketWatch | None:
        watch = self._of.get(loop)
        if watch is not None or not hasattr(select, "epoll"):
            return watch
        with self._lock:
            for gone in [known for known in self._of if known.is_closed()]:
                self._of.pop(gone).close()
            watch = self._of[loop] = SocketWatch(loop)
        return watch

    def after_fork_in_child(self) -> None:
        """The parent's loops do not run here; what they watch is still watched there."""
        self._lock = threading.Lock()
        for watch in self._of.values():
            watch.close()
        self._of = WeakKeyDictionary()


_watches: Final = _Watches()


def watch_of(loop: asyncio.AbstractEventLoop) -> SocketWatch | None:
    """The watch of the running loop; None where the system has no epoll."""
    return _watches.of(loop)


async def give_way() -> None:
    """Let the loop do what else is ready."""
    await asyncio.sleep(0)
