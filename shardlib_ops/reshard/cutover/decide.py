"""Whether to try a cutover now. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardlib.errors import InvalidArgument

__all__ = ["Limits", "ready"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a cutover may cost the writers, and when it is worth trying.

    Attributes:
        budget_s: seconds for which the moving ranges may be closed in one attempt.
        close_s: of them, those for closing the gates.
        lag_bytes: WAL that may be left to apply when an attempt begins.
        changed_keys: keys changed since the last comparison that may be left to compare when an attempt begins.
        changed_rows: rows that may have changed during that comparison when an attempt begins.
        pause_s: seconds from an attempt that gave way to the next one; it grows up to `pause_max_s`.
        pause_max_s: the longest such pause.
    """

    budget_s: float = 2.0
    close_s: float = 1.0
    lag_bytes: int = 256 * 1024
    changed_keys: int = 2_000
    changed_rows: int = 20_000
    pause_s: float = 0.25
    pause_max_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0.05 <= self.close_s <= self.budget_s <= 60:
            raise InvalidArgument("budget_s", self.budget_s, "0.05 to 60 seconds, and no less than close_s")
        if min(self.lag_bytes, self.changed_keys, self.changed_rows) < 0:
            raise InvalidArgument("lag_bytes", self.lag_bytes, "0 or more, like changed_keys and changed_rows")


def ready(lags: Sequence[int | None], limits: Limits) -> str | None:
    """None if a cutover may be tried; else what it waits for, for the operator.

    Args:
        lags: bytes of each stream that are not applied. An unknown lag is never ready.
        limits: when it is worth trying.
    """
    if any(lag is None for lag in lags):
        return "a stream has not told yet how far behind it is"
    worst = max((lag for lag in lags if lag is not None), default=0)
    if worst > limits.lag_bytes:
        return f"a stream is {worst:,} bytes behind, {limits.lag_bytes:,} are few enough"
    return None
