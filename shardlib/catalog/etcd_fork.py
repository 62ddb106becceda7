"""What becomes of gRPC when the process forks.

A child may open new channels. One that is forked while gRPC polls for a live channel crashes now and then, and one that
is forked while gRPC's own threads still wind up waits for ever on a lock that one of them held. So every channel is
closed before a fork, and the fork waits for those threads to be gone; the parent's calls and watches find theirs closed
and open new ones afterwards, as after a lost connection.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Final, Protocol

from shardlib.catalog.store import Deadline

__all__ = ["close_before_forks", "no_fork"]

_log = logging.getLogger("shardlib.catalog")
_WAIT_S_MAX: Final = 2.0
"""A fork waits so long at most for the calls on the channels it closed, and for gRPC's own threads, to end."""
_LOOK_S: Final = 0.0005
_QUIET_S: Final = 0.01
_NATIVE: Final = ("event_engine", "lifeguard", "grpc_")
"""How the names of gRPC's own threads begin."""


class _Channels(Protocol):
    def hang_up(self) -> bool:
        """Close every channel, so that the next call opens a new one; whether there was one."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        ...


_all: weakref.WeakSet[_Channels] = weakref.WeakSet()
_ENDING: Final = type("_Ending", (), {"__module__": "grpc"})
"""Stands for what a thread did, which `threading` forgets when it is done."""
_kept_alive = threading.Event()
"""Set if gRPC's own threads stayed when no channel of ours was left: the program has others, and forks do not wait."""
no_fork: Final = threading.Lock()
"""Held while the process forks: no channel is opened meanwhile."""


def close_before_forks(channels: _Channels) -> None:
    """Have these closed before each fork, for as long as they live."""
    _all.add(channels)


def _before_fork() -> None:
    no_fork.acquire()
    closed = [channels for channels in list(_all) if channels.hang_up()]
    deadline = Deadline(_WAIT_S_MAX)
    while any(channels.busy for channels in closed) and not deadline.passed():
        time.sleep(_LOOK_S)
    # Looked at with no channel open too: one may have been closed a moment ago.
    seen = False
    while not _kept_alive.is_set() and (_native_threads() or _python_threads()):
        if deadline.passed():
            _log.warning("gRPC goes on for other users of it in this process: a forked child may not work")
            _kept_alive.set()
        time.sleep(_LOOK_S)
        seen = True
    if closed or seen:
        time.sleep(_QUIET_S)  # what those threads leave for others to free is freed a moment after them


def _native_threads() -> int:
    """How many of gRPC's own threads run; 0 where the system does not tell."""
    return sum(_name(task).startswith(_NATIVE) for task in Path("/proc/self/task").glob("*/comm"))


def _python_threads() -> int:
    """How many threads of Python serve a channel, or are about to end: the last one of a channel frees it."""
    targets = (getattr(thread, "_target", _ENDING) for thread in threading.enumerate())
    return sum((getattr(target, "__module__", None) or "").startswith("grpc") for target in targets)


def _name(task: Path) -> str:
    try:
        return task.read_text(errors="replace")
    except OSError:
        return ""  # it ended meanwhile


def _after_fork() -> None:
    # In the child too it is this thread's own to release. A new lock would not do there: watches that an earlier hook
    # began anew wait for this one already.
    no_fork.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
