"""Who gets a connection, who waits, what is closed: the accounts of all pools of one engine.

Everything here decides under one lock and does no I/O there; connections to close and waiters to wake are
collected and acted on after the lock is free. A connection, open or being opened, holds one permit of its
pool and of the process.

Ctrl-C can end any function as it begins and after any call in it. So what belongs together is changed without a call
in between, and a connection that is lost on its way gives its permit back as it is collected (`Entry.counted`).

Between two decisions this always holds, so nobody can overtake: a waiter that could be served has been
served, and a connection lies idle only if no waiter could use it or its permit.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Protocol, Self

from shardlib.errors import InvalidArgument, ShardlibError, ShardUnavailable
from shardlib.shard.breaker import Breaker
from shardlib.waits import Waiter, forget_after_fork

__all__ = ["Claim", "ConnectionBudget", "Entry", "Member", "Section", "Ticket"]

log = logging.getLogger("shardlib.shard")

_AT_ONCE: Final = (False,)
"""Arguments of `lock.acquire`: without waiting."""


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


class Section:
    """`with Section(budget), budget.lock:`: what to do once the lock is free.

    Nothing else takes the lock and waits for it: a connection that comes back meanwhile is left to whoever
    holds it. The lock is taken by `with` itself: an interrupt (Ctrl-C) that meets a function which takes it would
    leave it taken for ever.
    """

    __slots__ = ("_budget", "close", "wake")

    def __init__(self, budget: ConnectionBudget) -> None:
        self._budget = budget
        self.close: list[Entry] = []
        self.wake: list[Ticket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._budget.settle(self)


class ConnectionBudget:
    """The bound on all connections of one engine in this process, and the queues for them.

    Args:
        limit: connections to all endpoints together.
        clock: monotonic seconds.
        owner_gone: whether an owner (event loop) no longer exists.
    """

    def __init__(self, limit: int, clock: Callable[[], float], owner_gone: Callable[[object], bool]) -> None:
        if limit < 1:
            raise InvalidArgument("max_connections", limit, "at least 1")
        self.limit: Final = limit
        self.lock = threading.Lock()
        self.open = 0
        """Permits held by all pools together."""
        self.returned: deque[tuple[Member, Entry, bool]] = deque()
        self._clock, self._owner_gone = clock, owner_gone
        self._members: weakref.WeakSet[Member] = weakref.WeakSet()
        self._queues: dict[Member, OrderedDict[Ticket, None]] = {}
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

    # -------------------------------------------------------------------------- decisions, under the lock

    def _permit(self, member: Member, now: float, section: Section, holder: Claim | Ticket) -> bool:
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
        section.close += giver.take_idle(lambda entry: entry is victim)
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

    def _serve(self, section: Section) -> None:
        """Give permits to waiters, the oldest first, as long as there are any."""
        while self._queues:
            now = self._clock()
            for member in sorted(self._queues, key=_head_seq):
                ticket = self._head(member)
                if ticket is not None and self._permit(member, now, section, ticket):
                    section.wake.append(ticket)
                    self._forget(member, ticket)
                    break
            else:
                return

    def _take_back(self, member: Member, entry: Entry, keep: bool, section: Section) -> None:
        """Hand a returned connection to the next waiter, or keep it, or close it and free its permit."""
        keep = keep and entry.epoch == member.epoch and not self._owner_gone(entry.owner)
        if keep and self._queues:
            head = self._head(member)
            older = self._older_elsewhere(member, head)
            if head is not None and head.owner is entry.owner and not older:
                head.entry = entry
                section.wake.append(head)
                self._forget(member, head)
                return
            keep = not older and head is None
        if keep and member.idle_count < member.idle_max:
            member.push(entry)
            return
        self._close(member, entry, section)

    def _close(self, member: Member, entry: Entry, section: Section) -> None:
        self._release(member, entry)
        section.close.append(entry)

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


def _head_seq(member: Member) -> int:
    return next(iter(member.waiting)).seq
