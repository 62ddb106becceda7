"""How far a stream is, and waiting for it to be further. No I/O."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from shardlib_ops.reshard.stream.faults import StreamStopped

__all__ = ["Lag", "Progress"]

_SAMPLES_MAX: Final = 4_096


class Progress:
    """Wakes whoever waits for a condition, each time something may have changed.

    Attributes:
        failure: what ended the stream; None while it runs or before it ran.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: set[asyncio.Future[None]] = set()
        self.failure: BaseException | None = None

    def changed(self) -> None:
        """Let the waiting look again."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def next(self) -> None:
        """Wait for the next change."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    async def until(self, condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        """Wait until `condition` holds.

        Raises:
            TimeoutError: it does not after `timeout_s` seconds; says `what` was waited for.
            StreamStopped: the stream ended before it did.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    if self.failure is not None:
                        raise StreamStopped(
                            self._name, str(self.failure) or type(self.failure).__name__
                        ) from self.failure
                    await self.next()
        except TimeoutError:
            raise TimeoutError(f"stream {self._name!r}: {what} not within {timeout_s:g} s") from None


class Lag:
    """The distance between two ends, from samples of the one that is ahead.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES_MAX)
        self._last: int | None = None

    def sample(self, lsn: int) -> None:
        """The origin has everything up to `lsn` on its disk, now."""
        self._last = lsn
        if not self._samples or lsn > self._samples[-1][1]:
            self._samples.append((self._clock(), lsn))

    @property
    def last(self) -> int | None:
        """The last sample; None before the first."""
        return self._last

    def bytes(self, applied: int) -> int | None:
        """WAL between the last sample and `applied`; None before the first sample."""
        return None if self._last is None else max(0, self._last - applied)

    def seconds(self, applied: int) -> float | None:
        """How long ago the origin first had something that is not applied; 0 if there is no such thing."""
        if self._last is None:
            return None
        while self._samples and self._samples[0][1] <= applied:
            self._samples.popleft()
        return max(0.0, self._clock() - self._samples[0][0]) if self._samples else 0.0
