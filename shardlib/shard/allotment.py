"""Who gets the next connection of an engine, and which one is closed for it. Nothing here locks, waits or closes.

Between two decisions this always holds, so nobody can overtake: a waiter that could be served has been
served, and a connection lies idle only if no waiter could use it or its permit.

Ctrl-C can end any function as it begins and after any call in it. So what belongs together is changed without a call
in between.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from shardlib.errors import InvalidArgument, ShardUnavailable
from shardlib.shard.accounts import Claim, Entry, Member, Ticket

__all__ = ["Allotment", "Decided"]


class Decided:
    """What came of decisions: connections to close and waiters to wake, once the lock is free."""

    __slots__ = ("close", "wake")

    def __init__(self) -> None:
        self.close: list[Entry] = []
        self.wake: list[Ticket] = []


class Allotment:
    """The permits of one engine in this process and the queues for them. Called under the lock of `ConnectionBudget`.

    Args:
        limit: connections to all endpoints together.
        clock: monotonic seconds.
        owner_gone: whether an owner (event loop) no longer exists.
    """

    def __init__(self, limit: int, clock: Callable[[], float], owner_gone: Callable[[object], bool]) -> None:
        if limit < 1:
            raise InvalidArgument("max_connections", limit, "at least 1")
        self.limit: Final = limit
        self.open = 0
        """Permits held by all pools together."""
        self._clock, self._owner_gone = clock, owner_gone
        self._members: weakref.WeakSet[Member] = weakref.WeakSet()
        self._queues: dict[Member, OrderedDict[Ticket, None]] = {}

    def _permit(self, member: Member, now: float, decided: Decided, holder: Claim | Ticket) -> bool:
        """Take a permit for `member` if that is possible, at the cost of an idle connection where it must be."""
        if not member.may_connect(now):
            return False
        if member.size >= member.size_max:
            giver = member if member.idle_count else None  # idle, but of another event loop
        elif self.open >= self.limit:
            giver = self._longest_idle()
        else:
            holder.permit = True
            member.size += 1
            self.open += 1
            member.connecting += 1
            return True
        victim = giver.oldest() if giver is not None else None
        if giver is None or victim is None:
            return False
        decided.close += giver.take_idle(lambda entry: entry is victim)
        holder.permit = True
        if victim.counted:
            victim.counted = False
            giver.size -= 1
            self.open -= 1
        member.size += 1
        self.open += 1
        member.connecting += 1
        return True

    def _longest_idle(self) -> Member | None:
        found: Member | None = None
        since = 0.0
        for member in self._members:
            if member.idle_count and (entry := member.oldest()) and (found is None or entry.idle_since < since):
                found, since = member, entry.idle_since
        return found

    def _serve(self, decided: Decided) -> None:
        """Give permits to waiters, the oldest first, as long as there are any."""
        while self._queues:
            now = self._clock()
            for member in sorted(self._queues, key=_head_seq):
                ticket = self._head(member)
                if ticket is not None and self._permit(member, now, decided, ticket):
                    decided.wake.append(ticket)
                    self._forget(member, ticket)
                    break
            else:
                return

    def _take_back(self, member: Member, entry: Entry, keep: bool, decided: Decided) -> None:
        """Hand a returned connection to the next waiter, or keep it, or close it and free its permit."""
        keep = keep and entry.epoch == member.epoch and not self._owner_gone(entry.owner)
        if keep and self._queues:
            head = self._head(member)
            older = self._older_elsewhere(member, head)
            if head is not None and head.owner is entry.owner and not older:
                head.entry = entry
                decided.wake.append(head)
                self._forget(member, head)
                return
            keep = not older and head is None
        if keep and member.idle_count < member.idle_max:
            member.push(entry)
            return
        self._close(member, entry, decided)

    def _close(self, member: Member, entry: Entry, decided: Decided) -> None:
        self._release(member, entry)
        decided.close.append(entry)

    def _older_elsewhere(self, member: Member, head: Ticket | None) -> bool:
        """Whether a waiter of another pool, older than `head`, waits for nothing but a permit of the process."""
        if self.open < self.limit:
            return False  # those have been served
        now = self._clock()
        return any(
            other is not member
            and (head is None or _head_seq(other) < head.seq)
            and other.size < other.size_max
            and other.may_connect(now)
            for other in self._queues
        )

    def _head(self, member: Member) -> Ticket | None:
        """The next waiter; those whose event loop is gone will never ask again."""
        while member.waiting:
            ticket = next(iter(member.waiting))
            if not self._owner_gone(ticket.owner):
                return ticket
            self._forget(member, ticket)
        return None

    def _forget(self, member: Member, ticket: Ticket) -> None:
        member.waiting.pop(ticket, None)
        if not member.waiting:
            self._queues.pop(member, None)

    def _release(self, member: Member, entry: Entry) -> None:
        if entry.counted:
            entry.counted = False
            member.size -= 1
            self.open -= 1

    def _never_opened(self, member: Member) -> None:
        member.connecting -= 1
        member.size -= 1
        self.open -= 1

    def _blocked(self, member: Member, now: float) -> ShardUnavailable:
        breaker = member.breaker
        return ShardUnavailable(
            member.shard,
            f"{breaker.reason} ({breaker.failures} attempts failed in a row, "
            f"the next is made in {breaker.blocked_s(now):.1f} s)",
        )


def _head_seq(member: Member) -> int:
    return next(iter(member.waiting)).seq
