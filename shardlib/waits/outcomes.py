"""What became of calls that ran side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, cast

__all__ = ["Outcome", "settle"]

T = TypeVar("T")


class Outcome(Generic[T]):
    """What became of one call: `value`, `error`, or neither (it was left out or cancelled by us)."""

    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None


def settle(outcomes: Sequence[Outcome[T]], timeout_s: float | None) -> list[T]:
    """The values in order, or the one error that stands for all."""
    failed = [(i, outcome.error) for i, outcome in enumerate(outcomes) if outcome.error is not None]
    if failed:
        # Ctrl-C and the like go before the errors of shards: the caller asked to stop.
        failed.sort(key=lambda item: (isinstance(item[1], Exception), item[0]))
        first = failed[0][1]
        for i, error in failed[1:]:
            if error is not first:
                first.add_note(f"call {i + 1} of {len(outcomes)} also failed: {type(error).__name__}: {error}")
        try:
            raise first
        finally:
            del first, failed  # no cycle error -> traceback -> frame -> error
    if not all(outcome.done for outcome in outcomes):
        finished = sum(outcome.done for outcome in outcomes)
        raise TimeoutError(f"{finished} of {len(outcomes)} calls finished within {timeout_s} s")
    return [cast("T", outcome.value) for outcome in outcomes]
