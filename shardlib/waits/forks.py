"""What must be forgotten in a forked child: the parent's threads, locks, sockets and event loops."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any, Protocol

__all__ = ["forget_after_fork"]

log = logging.getLogger("shardlib.waits")


class _Forkable(Protocol):
    def after_fork_in_child(self) -> None: ...


_forkables: weakref.WeakSet[Any] = weakref.WeakSet()


def forget_after_fork(holder: _Forkable) -> None:
    """Have `holder.after_fork_in_child()` called in each forked child. Keeps no strong reference."""
    _forkables.add(holder)


def _in_child() -> None:
    for holder in list(_forkables):
        try:
            holder.after_fork_in_child()
        except Exception:  # one holder's fault must not leave the others with the parent's sockets
            log.exception("a forked child could not reset %r", type(holder).__name__)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
