"""The circuit breaker: a table of steps, and random sequences against what it promises."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardlib.shard.breaker import Breaker, BreakerState


def breaker() -> Breaker:
    return Breaker(failures_max=3, wait_s_first=1.0, wait_s_max=5.0)


def test_closed_until_so_many_failures_in_a_row() -> None:
    it = breaker()
    for _ in range(2):
        assert it.begin(0)
        assert not it.failed(0, "refused", 1)
    assert it.begin(0)
    it.succeeded()
    for last in (False, False, True):
        assert it.begin(0)
        assert it.failed(0, "refused", 1) is last
    assert it.state is BreakerState.OPEN
    assert it.reason == "refused"


def opened(at: float = 0.0) -> Breaker:
    it = breaker()
    for _ in range(3):
        it.begin(at)
        it.failed(at, "refused", 1)
    return it


def test_one_probe_at_a_time_after_the_wait() -> None:
    it = opened()
    assert it.blocked_s(0.25) == 0.75
    assert not it.begin(0.99)
    assert it.begin(1.0)
    assert it.state is BreakerState.PROBING
    assert not it.begin(1.0)
    assert it.blocked_s(100) > 0, "until the probe has an answer"
    it.succeeded()
    assert it.begin(1.1)
    assert it.blocked_s(1.1) == 0


def test_the_wait_doubles_up_to_its_limit_and_starts_anew() -> None:
    it, now, waits = opened(), 0.0, []
    for _ in range(5):
        now += it.blocked_s(now)
        assert it.begin(now)
        assert it.failed(now, "refused", 1)
        waits.append(it.blocked_s(now))
    assert waits == [2.0, 4.0, 5.0, 5.0, 5.0]
    assert it.begin(now + 5)
    it.succeeded()
    assert it.blocked_s(now) == 0
    for _ in range(3):
        it.begin(now)
        it.failed(now, "refused", 0.5)
    assert it.blocked_s(now) == 0.5, "shortened by the jitter"


def test_a_probe_that_was_given_up_lets_the_next_one_through_at_once() -> None:
    it = opened()
    assert it.begin(1)
    it.given_up(1)
    assert it.begin(1)
    it.succeeded()
    it.given_up(2)
    assert it.state is BreakerState.CLOSED, "nothing was under way"


def test_failures_of_attempts_from_before_do_not_prolong_the_wait() -> None:
    it = breaker()
    for _ in range(5):
        assert it.begin(0)
    for _ in range(3):
        it.failed(0, "refused", 1)
    assert it.failed(0.5, "refused too", 1)
    assert it.blocked_s(0.5) == 0.5


@given(st.lists(st.tuples(st.sampled_from("ffffsgt"), st.floats(0.5, 1))))
def test_random_steps(steps: list[tuple[str, float]]) -> None:
    """Never two probes; never blocked for longer than the longest wait; open only after enough failures."""
    it, now, flying, since = breaker(), 0.0, 0, 0
    for step, jitter in steps:
        if step == "t":
            now += 10 * jitter
            continue
        blocked = it.blocked_s(now)
        assert 0 <= blocked <= 5
        before = it.state
        if it.begin(now):
            assert blocked == 0
            flying += 1
            assert before is not BreakerState.PROBING
        elif not flying:
            assert before is BreakerState.OPEN
            continue
        flying -= 1
        if step == "f":
            since += 1
            it.failed(now, "no", jitter)
        elif step == "s":
            since = 0
            it.succeeded()
        else:
            it.given_up(now)
        assert (it.state is BreakerState.CLOSED) == (since < 3)
        assert it.state is not BreakerState.PROBING
