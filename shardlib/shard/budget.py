"""Who gets a connection, who waits, what is closed: the accounts of all pools of one engine.

Everything here decides under one lock and does no I/O there; connections to close and waiters to wake are
collected and acted on after the lock is free. A connection, open or being opened, holds one permit of its
pool and of the process. What is decided is `Allotment`'s.

Ctrl-C can end any function as it begins and after any call in it. So what belongs together is changed without a call
in between, and a connection that is lost on its way gives its permit back as it is collected (`Entry.counted`).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Self

from shardlib.shard.accounts import Claim, Entry, Member, Ticket
from shardlib.shard.allotment import Allotment, Decided
from shardlib.waits import Waiter, forget_after_fork

__all__ = ["ConnectionBudget", "Section"]

log = logging.getLogger("shardlib.shard")

_AT_ONCE: Final = (False,)
"""Arguments of `lock.acquire`: without waiting."""


class Section(Decided):
    """`with Section(budget), budget.lock:`: what to do once the lock is free.

    Nothing else takes the lock and waits for it: a connection that comes back meanwhile is left to whoever
    holds it. The lock is taken by `with` itself: an interrupt (Ctrl-C) that meets a function which takes it would
    leave it taken for ever.
    """

    __slots__ = ("_budget",)

    def __init__(self, budget: ConnectionBudget) -> None:
        super().__init__()
        self._budget = budget

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._budget.settle(self)


class ConnectionBudget(Allotment):
    """The bound on all connections of one engine in this process, and the queues for them.

    Args:
        limit: connections to all endpoints together.
        clock: monotonic seconds.
        owner_gone: whether an owner (event loop) no longer exists.
    """

    def __init__(self, limit: int, clock: Callable[[], float], owner_gone: Callable[[object], bool]) -> None:
        super().__init__(limit, clock, owner_gone)
        self.lock = threading.Lock()
        self.returned: deque[tuple[Member, Entry, bool]] = deque()
        self._seq = 0
        forget_after_fork(self)

    def join(self, member: Member) -> None:
        """Add a pool."""
        with Section(self), self.lock:
            self._members.add(member)

    # ------------------------------------------------------------------------------------------- a checkout

    def take(
        self, member: Member, owner: object, waiter: Callable[[], Waiter], claim: Claim | None = None
    ) -> Entry | Ticket | None:
        """An idle connection; or None: the caller holds a permit and must open one; or a place in the queue.

        `claim` notes a permit, or a place in the queue, in the moment it is there.

        Raises:
            ShardUnavailable: the breaker of the endpoint is open.
        """
        claim = claim or Claim()
        with Section(self) as section, self.lock:
            now = self._clock()
            if stack := member.idle.get(owner):
                return stack.pop()
            if member.breaker.blocked_s(now) > 0:
                raise self._blocked(member, now)
            if self._permit(member, now, section, claim):
                return None
            self._seq += 1
            claim.ticket = ticket = Ticket(waiter(), owner, self._seq)
            member.waiting[ticket] = None
            self._queues[member] = member.waiting
            return ticket

    def give_up(self, member: Member, claim: Claim) -> None:
        """A checkout has ended without a connection: what its claim holds is free again."""
        if claim.ticket is not None:
            self.abandon(member, claim.ticket)
        if claim.permit:
            self.not_connected(member, claim)

    def leave(self, member: Member, ticket: Ticket) -> bool:
        """The waiter's time is over. True: it has been served in that very moment and must use what it got."""
        with Section(self), self.lock:
            if ticket.served:
                return True
            self._forget(member, ticket)
            return False

    def abandon(self, member: Member, ticket: Ticket) -> None:
        """The waiter was cancelled: what it may have got goes to the next."""
        with Section(self) as section, self.lock:
            if ticket.entry is not None:
                self._take_back(member, ticket.entry, True, section)
            elif ticket.permit:
                ticket.permit = False
                self._never_opened(member)
            else:
                self._forget(member, ticket)
            self._serve(section)

    def connected(self, member: Member, entry: Entry | None = None, claim: Claim | None = None) -> None:
        """A permit has become an open connection, in use: from now on it is the connection's own."""
        claim = claim or Claim()
        with self.lock:
            claim.permit = False
            if entry is not None:
                entry.counted = True
            member.connecting -= 1
        with Section(self) as section, self.lock:
            self._serve(section)

    def not_connected(self, member: Member, claim: Claim | None = None) -> None:
        """A permit has not become a connection: it is free again."""
        claim = claim or Claim()
        with Section(self) as section, self.lock:
            claim.permit = False
            self._never_opened(member)
            self._serve(section)

    # --------------------------------------------------------------------------------------------- a checkin

    def give_back(self, member: Member, entry: Entry, keep: bool) -> None:
        """A connection is no longer in use; `keep` says that it could be used again.

        May be called by the garbage collector in the middle of any decision, so it never waits for the lock:
        whoever holds that looks here again after giving it up.
        """
        lock, mine, section = self.lock, False, None
        try:
            (mine,) = map(lock.acquire, _AT_ONCE)  # no interrupt comes between the two, as it would after a call
            if not mine:
                self.returned.append((member, entry, keep))
                self.drain()
                return
            stack = member.idle.get(entry.owner)
            if stack is None or not keep or self._queues or entry.epoch != member.epoch:
                section = Section(self)
                self._take_back(member, entry, keep, section)
                self._serve(section)
            elif member.idle_count < member.idle_max:  # what nearly every checkin comes to
                stack.append(entry)
            else:
                section = Section(self)
                self._close(member, entry, section)
                self._serve(section)
        finally:
            if mine:
                lock.release()
        if section is not None:
            self.settle(section)
        elif self.returned:
            self.drain()

    def drain(self) -> None:
        """Do what `give_back` had to leave."""
        while self.returned:
            section, mine = Section(self), False
            try:
                (mine,) = map(self.lock.acquire, _AT_ONCE)
                if not mine:
                    return
                while self.returned:
                    member, entry, keep = self.returned.popleft()
                    self._take_back(member, entry, keep, section)
                self._serve(section)
            finally:
                if mine:
                    self.lock.release()
            self._act(section)

    def gone(self, member: Member, entry: Entry) -> None:
        """A connection that was taken has been closed instead of used: its permit is free."""
        with Section(self) as section, self.lock:
            self._release(member, entry)
            self._serve(section)

    # ---------------------------------------------------------------------------------------------- the rest

    def begin_attempt(self, member: Member) -> None:
        """Ask the breaker.

        Raises:
            ShardUnavailable: it is open, or another attempt probes.
        """
        with Section(self), self.lock:
            now = self._clock()
            if not member.breaker.begin(now):
                raise self._blocked(member, now)

    def end_attempt(self, member: Member, down: str | None, jitter: float) -> None:
        """Tell the breaker. `down` is why the endpoint did not answer, None if it did.

        When the breaker opens, those who wait for this endpoint get the error at once.
        """
        with Section(self) as section, self.lock:
            now = self._clock()
            if down is None:
                member.breaker.succeeded()
            elif member.breaker.failed(now, down, jitter):
                for ticket in list(member.waiting):
                    ticket.error = self._blocked(member, now)
                    section.wake.append(ticket)
                    self._forget(member, ticket)
            self._serve(section)

    def give_up_attempt(self, member: Member) -> None:
        """The attempt was cancelled; the breaker learns nothing."""
        with Section(self) as section, self.lock:
            member.breaker.given_up(self._clock())
            self._serve(section)

    def close_idle(self, members: Iterable[Member], wanted: Callable[[Entry], bool]) -> int:
        """Close the idle connections that are `wanted`. Returns how many."""
        closed = 0
        with Section(self) as section, self.lock:
            for member in members:
                taken = member.take_idle(wanted)
                closed += len(taken)
                for entry in taken:
                    self._release(member, entry)
                section.close += taken
            self._serve(section)
        return closed

    def outdate(self, member: Member) -> None:
        """No connection opened so far is to be used again: idle ones close now, the others when they come back."""
        with Section(self), self.lock:
            member.epoch += 1
        self.close_idle((member,), lambda entry: True)

    def reap(self, idle_s: float) -> int:
        """Close what has been idle for long, has lived its life, or belongs to a loop that is gone."""
        now = self._clock()
        return self.close_idle(
            self.members(),
            lambda e: e.idle_since + idle_s <= now or e.expires_at <= now or self._owner_gone(e.owner),
        )

    def close_owner(self, owner: object) -> None:
        """Close the idle connections of an event loop."""
        self.close_idle(self.members(), lambda entry: entry.owner is owner)

    def members(self) -> list[Member]:
        """The pools that exist."""
        with Section(self), self.lock:
            return list(self._members)

    def after_fork_in_child(self) -> None:
        """The child starts with nothing open and nobody waiting."""
        self.lock = threading.Lock()
        self.returned, self._queues, self.open = deque(), {}, 0
        for member in list(self._members):
            member.size = member.connecting = 0
            member.idle, member.waiting = {}, OrderedDict()
            member.epoch += 1
            member.breaker.succeeded()

    # -------------------------------------------------------------------------- actions, without the lock

    def settle(self, section: Section) -> None:
        """Act on what was decided, then on what came back meanwhile."""
        if section.close or section.wake:
            self._act(section)
        if self.returned:
            self.drain()

    def _act(self, section: Section) -> None:
        for ticket in section.wake:
            ticket.waiter.wake()
        for entry in section.close:
            try:
                entry.close()
            except Exception:  # a listener of the pool's close event: the connection is out of the pool all the same
                log.exception("closing a connection")
