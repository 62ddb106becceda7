"""When a unit of work that failed may run again, and after how long. Pure: time and chance are arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy.exc import DBAPIError

from shardlib.checks import check_fields, seconds, whole
from shardlib.errors import (
    CatalogUnavailable,
    CommitOutcomeUnknown,
    InvalidArgument,
    RetryableError,
    ShardUnavailable,
    StaleTopology,
)

__all__ = ["RetryPolicy", "next_wait"]

# serialization_failure, deadlock_detected: the server rolled the transaction back and asks to run it again.
_AGAIN = frozenset({"40001", "40P01"})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often `engine.run` tries, and how long it waits between: exponential, capped, with jitter.

    Raises:
        InvalidArgument: a value out of its bounds.
    """

    attempts_max: int = 8
    wait_s_first: float = 0.02
    wait_s_max: float = 2.0

    def __post_init__(self) -> None:
        check_fields(_RULES, self)
        if self.wait_s_first > self.wait_s_max:
            raise InvalidArgument("wait_s_first", self.wait_s_first, "more than 0, and at most wait_s_max")


_RULES: Final = {"attempts_max": whole(1), "wait_s_first": seconds(), "wait_s_max": seconds()}


def may_run_again(error: BaseException) -> bool:
    """Whether the failed unit of work certainly left nothing behind and may do better next time.

    A lost connection qualifies: an unknown outcome of COMMIT has its own type, so the loss came before COMMIT was
    sent, and PostgreSQL rolls back what it was not asked to commit.
    """
    if isinstance(error, CommitOutcomeUnknown):
        return False
    if isinstance(error, StaleTopology | ShardUnavailable | CatalogUnavailable) and error.final:
        return False
    if isinstance(error, RetryableError):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or getattr(error.orig, "sqlstate", None) in _AGAIN
    return False


def next_wait(error: BaseException, attempt: int, policy: RetryPolicy, jitter: float) -> float | None:
    """Seconds before the next attempt, or None: let the error through.

    Args:
        error: what ended attempt number `attempt` (1 for the first).
        attempt: attempts made so far.
        policy: the bounds.
        jitter: a number in 0.5..1 that spreads clients that failed together.
    """
    if attempt >= policy.attempts_max or not may_run_again(error):
        return None
    wait_s: float = min(policy.wait_s_max, policy.wait_s_first * 2.0 ** (attempt - 1)) * jitter
    return wait_s
