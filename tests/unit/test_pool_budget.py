"""The accounts of the pools, without servers: limits, fairness, and that no permit is ever lost."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardlib.errors import InvalidArgument, ShardUnavailable
from shardlib.shard.accounts import Member, Ticket
from shardlib.shard.breaker import Breaker
from shardlib.shard.budget import ConnectionBudget, Section
from shardlib.shard.options import PoolOptions
from shardlib.waits import ThreadWaits


@dataclass(eq=False)
class Fake:
    """A connection as the accounts see it."""

    owner: object
    epoch: int
    idle_since: float = 0.0
    expires_at: float = 1e9
    counted: bool = True
    closed: int = 0

    def close(self) -> None:
        self.closed += 1


@dataclass(eq=False)
class World:
    """A budget with a clock of its own."""

    limit: int = 4
    now: float = 0.0
    gone: set[object] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.budget = ConnectionBudget(self.limit, lambda: self.now, lambda owner: owner in self.gone)

    def member(self, name: str, *, idle_max: int = 2, size_max: int = 3, connects_max: int = 2) -> Member:
        breaker = Breaker(failures_max=2, wait_s_first=1.0, wait_s_max=4.0)
        it = Member(name, idle_max=idle_max, size_max=size_max, connects_max=connects_max, breaker=breaker)
        self.budget.join(it)
        return it

    def take(self, member: Member, owner: object = None) -> Any:
        return self.budget.take(member, owner, ThreadWaits().waiter)

    def opened(self, member: Member, owner: object = None) -> Fake:
        """Take a permit and use it."""
        assert self.take(member, owner) is None
        self.budget.connected(member)
        return Fake(owner, member.epoch)

    def back(self, member: Member, entry: Fake, keep: bool = True) -> None:
        self.now += 1
        entry.idle_since = self.now
        self.budget.give_back(member, entry, keep)


def test_last_in_first_out_and_overflow_is_closed() -> None:
    world = World()
    a = world.member("a")
    one, two, three = (world.opened(a) for _ in range(3))
    for entry in (one, two, three):
        world.back(a, entry)
    assert three.closed, "only two are kept idle"
    assert (a.size, a.idle_count, world.budget.open) == (2, 2, 2)
    assert world.take(a) is two
    assert world.take(a) is one


def test_waiters_of_one_pool_are_served_in_turn() -> None:
    world = World()
    a = world.member("a")
    entries = [world.opened(a) for _ in range(3)]
    tickets = [world.take(a) for _ in range(3)]
    assert all(isinstance(ticket, Ticket) for ticket in tickets)
    for entry, ticket in zip(entries, tickets, strict=True):
        world.back(a, entry)
        assert ticket.entry is entry
        assert ticket.waiter.wait(0)


def test_a_full_budget_closes_the_longest_idle_connection_of_another_pool() -> None:
    world = World(limit=3)
    a, b, c = world.member("a"), world.member("b"), world.member("c")
    in_a, in_b = world.opened(a), world.opened(b)
    world.opened(c)
    world.back(b, in_b)
    world.back(a, in_a)
    assert world.take(c) is None
    assert (in_b.closed, in_a.closed) == (1, 0)
    assert (a.size, b.size, c.size, world.budget.open) == (1, 0, 2, 3)


def test_a_waiter_of_another_pool_who_came_first_goes_first() -> None:
    world = World(limit=2)
    a, b = world.member("a"), world.member("b")
    first, second = world.opened(a), world.opened(a)
    of_b, of_a = world.take(b), world.take(a)
    world.back(a, first)
    assert of_b.permit, "it came first, so the connection of the other pool is closed for it"
    assert first.closed
    world.back(a, second)
    assert of_a.entry is second


def test_connects_are_bounded_and_follow_each_other() -> None:
    world = World()
    a = world.member("a")
    assert world.take(a) is None
    assert world.take(a) is None
    third = world.take(a)
    assert isinstance(third, Ticket)
    world.budget.connected(a)
    assert third.permit


def test_a_failed_connect_gives_its_permit_to_the_next() -> None:
    world = World(limit=1)
    a, b = world.member("a"), world.member("b")
    assert world.take(a) is None
    waiting = world.take(b)
    world.budget.not_connected(a)
    assert waiting.permit
    assert (a.size, b.size, world.budget.open) == (0, 1, 1)


def test_an_open_breaker_fails_new_and_waiting_requests_but_not_idle_connections() -> None:
    world = World()
    a = world.member("a")
    idle = world.opened(a)
    assert world.take(a) is None
    assert world.take(a) is None
    waiting = world.take(a)
    for _ in range(2):
        world.budget.begin_attempt(a)
        assert not waiting.served, "an endpoint that has just failed gets one attempt at a time"
        world.budget.end_attempt(a, "refused", 1.0)
        world.budget.not_connected(a)
    assert isinstance(waiting.error, ShardUnavailable)
    with pytest.raises(ShardUnavailable, match="refused"):
        world.take(a)
    world.budget.give_back(a, idle, True)
    assert world.take(a) is idle
    world.now = 1.5
    assert world.take(a) is None, "one probe"
    world.budget.begin_attempt(a)
    with pytest.raises(ShardUnavailable, match="refused"):
        world.take(a)
    world.budget.end_attempt(a, None, 1.0)
    world.budget.connected(a)
    assert world.take(a) is None


def test_connections_of_another_loop_are_closed_for_a_waiter_not_handed_over() -> None:
    world = World()
    a = world.member("a", size_max=1)
    of_x = world.opened(a, "x")
    for_y = world.take(a, "y")
    world.back(a, of_x)
    assert for_y.permit
    assert of_x.closed
    world.budget.connected(a)
    of_y = Fake("y", a.epoch)
    world.back(a, of_y)
    assert world.take(a, "x") is None, "an idle one of another loop makes room"
    assert of_y.closed
    assert (a.size, world.budget.open) == (1, 1)


def test_nothing_is_given_to_a_loop_that_is_gone() -> None:
    world = World()
    a = world.member("a", size_max=1)
    of_x = world.opened(a, "x")
    lost, served = world.take(a, "y"), world.take(a, "z")
    world.gone |= {"x", "y"}
    world.back(a, of_x)
    assert of_x.closed
    assert not lost.served
    assert served.permit


@pytest.mark.parametrize("served", ["entry", "permit", "nothing"])
def test_an_abandoned_ticket_passes_on_what_it_got(served: str) -> None:
    world = World()
    a = world.member("a", size_max=1)
    entry = world.opened(a)
    first, second = world.take(a), world.take(a)
    if served != "nothing":
        world.back(a, entry, keep=served == "entry")
    world.budget.abandon(a, first)
    if served == "nothing":
        world.back(a, entry)
    assert second.entry is (None if served == "permit" else entry)
    assert second.permit is (served == "permit")


def test_what_comes_back_in_the_middle_of_a_decision_is_not_forgotten() -> None:
    """As when the garbage collector returns a connection in a thread that holds the lock."""
    world = World()
    a = world.member("a", size_max=1)
    entry = world.opened(a)
    with Section(world.budget), world.budget.lock:
        ticket = Ticket(ThreadWaits().waiter(), None, 99)
        a.waiting[ticket] = None
        world.budget._queues[a] = a.waiting
        world.back(a, entry)
        assert not ticket.served
    assert ticket.entry is entry


def test_outdated_connections_close_when_they_come_back() -> None:
    world = World()
    a = world.member("a")
    idle, used = world.opened(a), world.opened(a)
    world.back(a, idle)
    world.budget.outdate(a)
    assert idle.closed
    world.back(a, used)
    assert used.closed
    assert (a.size, world.budget.open) == (0, 0)


def test_reaping() -> None:
    world = World(limit=9)
    a = world.member("a", idle_max=9, size_max=9)
    old, expired, lonely, fresh = (world.opened(a, owner) for owner in (None, None, "x", None))
    for entry in (old, expired, lonely, fresh):
        world.back(a, entry)
    world.now, world.gone = 12.0, {"x"}
    old.idle_since, expired.expires_at = 1.0, 11.0
    fresh.idle_since = expired.idle_since = lonely.idle_since = 10.0
    assert world.budget.reap(5.0) == 3
    assert [e.closed for e in (old, expired, lonely, fresh)] == [1, 1, 1, 0]
    assert (a.size, a.idle_count, world.budget.open) == (1, 1, 1)


class Pools(RuleBasedStateMachine):
    """Any sequence of checkouts, returns, failures, cancellations and closings keeps the books right."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(limit=4)
        self.members = [self.world.member(name, idle_max=i + 1, size_max=i + 2) for i, name in enumerate("abc")]
        self.used: list[tuple[Member, Fake]] = []
        self.permits: list[tuple[Member, object]] = []
        self.tickets: list[tuple[Member, Ticket]] = []
        self.all: list[Fake] = []

    @rule(which=st.integers(0, 2), owner=st.sampled_from(["x", "y"]))
    def checkout(self, which: int, owner: str) -> None:
        member = self.members[which]
        try:
            taken = self.world.take(member, owner)
        except ShardUnavailable:
            return
        if taken is None:
            self.permits.append((member, owner))
        elif isinstance(taken, Ticket):
            self.tickets.append((member, taken))
        else:
            assert taken.owner == owner
            assert not taken.closed
            self.used.append((member, taken))

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), end=st.sampled_from(["open", "open", "down", "cancelled"]))
    def attempt(self, data: st.DataObject, end: str) -> None:
        member, owner = self.permits.pop(data.draw(st.integers(0, len(self.permits) - 1)))
        try:
            self.world.budget.begin_attempt(member)
        except ShardUnavailable:
            self.world.budget.not_connected(member)
            return
        if end == "cancelled":
            self.world.budget.give_up_attempt(member)
        else:
            self.world.budget.end_attempt(member, None if end == "open" else "down", 0.7)
        if end != "open":
            self.world.budget.not_connected(member)
            return
        entry = Fake(owner, member.epoch)
        self.world.budget.connected(member)
        self.all.append(entry)
        self.used.append((member, entry))

    @precondition(lambda self: self.used)
    @rule(data=st.data(), keep=st.booleans())
    def give_back(self, data: st.DataObject, keep: bool) -> None:
        member, entry = self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
        self.world.back(member, entry, keep)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), end=st.sampled_from(["use", "timeout", "cancel"]))
    def wait(self, data: st.DataObject, end: str) -> None:
        i = data.draw(st.integers(0, len(self.tickets) - 1))
        member, ticket = self.tickets[i]
        if end == "use" and not ticket.served:
            return
        del self.tickets[i]
        assert ticket.waiter.wait(0) is ticket.served, "woken exactly when served"
        if end == "cancel":
            self.world.budget.abandon(member, ticket)
        elif self.world.budget.leave(member, ticket):
            if ticket.entry is not None:
                self.used.append((member, ticket.entry))  # type: ignore[arg-type]
            elif ticket.permit:
                self.permits.append((member, ticket.owner))

    @rule(which=st.integers(0, 2))
    def outdate(self, which: int) -> None:
        self.world.budget.outdate(self.members[which])

    @rule(seconds=st.floats(0, 10))
    def reap(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.budget.reap(5.0)

    @invariant()
    def books_are_right(self) -> None:
        budget, held = self.world.budget, [(m, t) for m, t in self.tickets if t.permit or t.entry is not None]
        for member in self.members:
            idle = [e for stack in member.idle.values() for e in stack]
            in_use = sum(m is member for m, _ in self.used) + sum(m is member and t.entry is not None for m, t in held)
            opening = sum(m is member for m, _ in self.permits) + sum(m is member and t.permit for m, t in held)
            assert (member.idle_count, member.in_use, member.connecting) == (len(idle), in_use, opening)
            assert member.size <= member.size_max
            assert len(idle) <= member.idle_max
            assert not any(cast("Fake", e).closed for e in idle)
        assert budget.open == sum(m.size for m in self.members) <= budget.limit
        assert all(e.closed <= 1 for e in self.all)

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        budget = self.world.budget
        room = budget.open < budget.limit or any(m.idle_count for m in self.members)
        for member, ticket in self.tickets:
            if not ticket.served:
                assert not member.idle.get(ticket.owner)
                may = member.may_connect(self.world.now)
                assert not (may and room and (member.size < member.size_max or member.idle_count))


Pools.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPools = Pools.TestCase


def test_many_threads_on_the_real_lock() -> None:
    world = World(limit=5)
    members = [world.member(name, size_max=3) for name in "abcd"]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(300):
                member = members[(seed + turn) % 4]
                taken = world.take(member)
                if isinstance(taken, Ticket):
                    assert taken.waiter.wait(20), "a lost wake-up"
                    taken = taken.entry
                if taken is None:
                    world.budget.connected(member)
                    taken = Fake(None, member.epoch)
                assert world.budget.open <= 5
                world.budget.give_back(member, taken, turn % 7 != 0)
        except BaseException as error:  # noqa: BLE001 - shown by the test's thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert world.budget.open == sum(m.size for m in members) == sum(m.idle_count for m in members)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_size", -1), ("pool_size", 2.5), ("max_connections", 0), ("connect_timeout_s", 1),
        ("idle_s", 0), ("pool_timeout_s", -1), ("max_lifetime_s", "1h"), ("breaker_wait_s_max", 0.1),
        ("pre_ping_idle_s", -1), ("application_name", "a\nb"), ("prepare_threshold", -1), ("connects_max", True),
    ],
)  # fmt: skip
def test_options_out_of_bounds_are_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=name) as caught:
        PoolOptions(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="pool_size"):
        PoolOptions(pool_size=0, max_overflow=0)
