"""Whether a connection attempt to an endpoint makes sense now: a circuit breaker without clock or chance of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Breaker", "BreakerState"]


class BreakerState(StrEnum):
    """What the breaker lets through."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


@dataclass(slots=True)
class Breaker:
    """After `failures_max` failed attempts in a row it opens; after a wait, one attempt probes whether it may close.

    The wait doubles with each failed probe, up to `wait_s_max`, and is shortened by the jitter of the caller,
    so that many processes do not come back at the same moment. Times are seconds of one monotonic clock,
    given by the caller, who also makes sure that calls do not overlap.

    Source: M. Nygard, "Release It!", the circuit breaker; exponential backoff with jitter.
    """

    failures_max: int
    wait_s_first: float
    wait_s_max: float
    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    reason: str = ""
    _until: float = 0.0
    _opened: int = 0

    def blocked_s(self, now: float) -> float:
        """0 if an attempt may begin now; else seconds until it is worth asking again."""
        if self.state is BreakerState.CLOSED:
            return 0.0
        if self.state is BreakerState.PROBING:
            return self.wait_s_first
        return max(self._until - now, 0.0)

    def begin(self, now: float) -> bool:
        """An attempt wants to begin. False: it must not. True: one of the three calls below has to follow."""
        if self.blocked_s(now) > 0:
            return False
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.PROBING
        return True

    def succeeded(self) -> None:
        """The endpoint answered, be it with a refusal such as a wrong password: it is there."""
        self.state, self.failures, self.reason, self._opened = BreakerState.CLOSED, 0, "", 0

    def failed(self, now: float, reason: str, jitter: float) -> bool:
        """The endpoint did not answer. Returns whether the breaker is open from now on.

        Args:
            now: seconds of the caller's clock.
            reason: shown to those who are refused meanwhile.
            jitter: from 0.5 to 1, drawn by the caller; the wait is that part of the full one.
        """
        self.failures += 1
        self.reason = reason
        if self.state is BreakerState.OPEN:
            return True  # an attempt that began before it opened: the wait goes on as set
        if self.state is BreakerState.CLOSED and self.failures < self.failures_max:
            return False
        self.state = BreakerState.OPEN
        self._until = now + min(self.wait_s_max, self.wait_s_first * 2.0 ** min(self._opened, 60)) * jitter
        self._opened += 1
        return True

    def given_up(self, now: float) -> None:
        """The attempt ended without an answer for a reason of ours (cancelled): the next one may probe at once."""
        if self.state is BreakerState.PROBING:
            self.state, self._until = BreakerState.OPEN, now
