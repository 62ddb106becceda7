"""Rates and trends of counts that only rise, from samples of the last seconds. Pure: the caller has the clock."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Final

__all__ = ["Rate", "Trend"]

_LEAST_S: Final = 0.5
_PARTS: Final = 3


class Rate:
    """How fast a count rises.

    Args:
        window_s: seconds that are looked at.
    """

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, count: int) -> None:
        """The count is so high now. One that is lower than before begins anew."""
        if self._samples and count < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, count))
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window_s:
            self._samples.popleft()

    @property
    def per_s(self) -> float | None:
        """None until half a second is known of."""
        if not self._samples:
            return None
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended - began >= _LEAST_S else None


class Trend:
    """Whether one end of a stream outruns the other.

    Args:
        window_s: seconds that are looked at. Shorter bursts mean nothing.
        least_bytes: a lag up to this means nothing.
    """

    def __init__(self, window_s: float = 60.0, least_bytes: int = 1 << 20) -> None:
        self._window_s, self._least = window_s, least_bytes
        self._samples: deque[tuple[float, int, int]] = deque()

    def reset(self) -> None:
        """What was so far does not count, such as before a standstill that was asked for."""
        self._samples.clear()

    def sample(self, now: float, written: int, applied: int) -> None:
        """The origin has written up to one LSN, and up to the other it is applied, now."""
        self._samples.append((now, written, min(written, applied)))
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window_s:
            self._samples.popleft()

    def _over(self) -> tuple[float, int, int] | None:
        if not self._samples:
            return None
        first, last = self._samples[0], self._samples[-1]
        seconds = last[0] - first[0]
        return (seconds, last[1] - first[1], last[2] - first[2]) if seconds >= _LEAST_S else None

    @property
    def written_per_s(self) -> float | None:
        """Bytes that the origin writes in a second; None until half a second is known of."""
        return None if (over := self._over()) is None else over[1] / over[0]

    @property
    def applied_per_s(self) -> float | None:
        """Bytes that are worked off in a second; None until half a second is known of."""
        return None if (over := self._over()) is None else over[2] / over[0]

    @property
    def eta_s(self) -> float | None:
        """Seconds until nothing is left; None if that is not known, or will not be."""
        over = self._over()
        if over is None:
            return None
        lag = self._samples[-1][1] - self._samples[-1][2]
        if lag == 0:
            return 0.0
        gain = (over[2] - over[1]) / over[0]
        return lag / gain if gain > 0 else None

    @property
    def falls_behind(self) -> bool:
        """Whether the lag has grown in each third of a whole window, and is no trifle."""
        over = self._over()
        if over is None or over[0] < self._window_s * 0.9:
            return False
        lags = [written - applied for _, written, applied in self._samples]
        if lags[-1] <= self._least or len(lags) <= _PARTS:
            return False
        began, step = self._samples[0][0], over[0] / _PARTS
        ends = [
            next(lag for (at, _, _), lag in zip(self._samples, lags, strict=True) if at >= began + step * part - 1e-9)
            for part in range(_PARTS)
        ]
        ends.append(lags[-1])
        return all(after > before for before, after in pairwise(ends))
