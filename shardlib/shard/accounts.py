"""What is counted of the connections of one engine: pooled connections, places in a queue, and the account of a pool.

All of it is read and written under the lock of the `ConnectionBudget`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from shardlib.errors import ShardlibError
from shardlib.shard.breaker import Breaker
from shardlib.waits import Waiter

__all__ = ["Claim", "Entry", "Member", "Ticket"]


class Entry(Protocol):
    """A pooled connection as the accounts see it."""

    owner: object
    """The event loop that it belongs to; None where threads share it."""
    idle_since: float
    """When it came back last, by the budget's clock; set by the pool before `give_back`."""
    expires_at: float
    epoch: int
    counted: bool
    """Whether it holds a permit: from `connected` until it is closed; not in a forked child, where the parent's
    connections mean nothing. One that is collected while it does must `give_back` itself."""

    def close(self) -> None:
        """Close the connection. Never blocks, from any thread."""


class Ticket:
    """One place in a queue. `entry`, `permit` or `error` is set, under the budget's lock, before it is woken."""

    __slots__ = ("entry", "error", "owner", "permit", "seq", "waiter")

    def __init__(self, waiter: Waiter, owner: object, seq: int) -> None:
        self.waiter, self.owner, self.seq = waiter, owner, seq
        self.entry: Entry | None = None
        self.permit = False
        self.error: ShardlibError | None = None

    @property
    def served(self) -> bool:
        """Whether there is an answer, good or bad."""
        return self.permit or self.entry is not None or self.error is not None


class Claim:
    """What a checkout holds before it has a connection, so that its caller gives it up if it is interrupted."""

    __slots__ = ("permit", "ticket")

    def __init__(self) -> None:
        self.permit = False
        """Whether a connection may be opened, or is being opened."""
        self.ticket: Ticket | None = None
        """The place in the queue, until what it was served with is taken over."""


class Member:
    """The account of one pool. Read and written under the budget's lock only."""

    __slots__ = (
        "__weakref__",
        "breaker",
        "connecting",
        "connects_max",
        "epoch",
        "idle",
        "idle_max",
        "shard",
        "size",
        "size_max",
        "waiting",
    )

    def __init__(self, shard: str, *, idle_max: int, size_max: int, connects_max: int, breaker: Breaker) -> None:
        self.shard, self.breaker = shard, breaker
        self.idle_max, self.size_max, self.connects_max = idle_max, size_max, connects_max
        self.size = 0
        """Permits held: connections idle, in use, and being opened."""
        self.connecting = 0
        self.idle: dict[object, list[Entry]] = {}
        """Idle connections by owner; the last was used last."""
        self.waiting: OrderedDict[Ticket, None] = OrderedDict()
        self.epoch = 0
        """Raised when all connections opened so far must not be used again."""

    @property
    def idle_count(self) -> int:
        """Idle connections of all owners."""
        return sum(map(len, self.idle.values()))

    @property
    def in_use(self) -> int:
        """Connections that are checked out."""
        return self.size - self.idle_count - self.connecting

    def may_connect(self, now: float) -> bool:
        """Whether one more attempt is allowed; an endpoint that has just failed gets one at a time."""
        return (
            self.connecting < (1 if self.breaker.failures else self.connects_max) and self.breaker.blocked_s(now) == 0
        )

    def push(self, entry: Entry) -> None:
        """Put an idle connection on top."""
        self.idle.setdefault(entry.owner, []).append(entry)

    def take_idle(self, wanted: Callable[[Entry], bool]) -> list[Entry]:
        """Take out the idle connections that are `wanted`; their permits are still held."""
        taken: list[Entry] = []
        for owner, stack in list(self.idle.items()):
            out = [entry for entry in stack if wanted(entry)]
            if out:
                taken += out
                stack[:] = [entry for entry in stack if not wanted(entry)]
            if not stack and owner is not None:
                del self.idle[owner]  # an event loop that may be gone
        return taken

    def oldest(self) -> Entry | None:
        """The idle connection that was used longest ago."""
        bottoms = (stack[0] for stack in self.idle.values() if stack)
        return min(bottoms, key=lambda entry: entry.idle_since, default=None)
