"""Programs that run jobs: they wait, are paused, are killed at any await, and what they had sent may still arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any, Protocol, TypeVar

from shardlib_ops.reshard.world import Blocked, Failure, Lost, Superseded

__all__ = ["Killed", "Process", "Weather", "ring"]

T = TypeVar("T")

_LATE_S = 8.0


class Killed(BaseException):
    """The process is gone: nothing of it runs any more. Raised at its awaits, and at every verb after that."""

    expected = True


class Weather(Protocol):
    """What a process asks of the simulation."""

    rng: Random

    def delay(self) -> float:
        """Seconds of one way over the network, or of a little work."""
        ...

    def fate(self) -> str:
        """What becomes of a call: `ok`, `before` (lost on its way there) or `after` (on its way back)."""
        ...

    def tick(self, process: Process) -> None:
        """One await more; may kill or pause the process."""
        ...


class Process:
    """One program. Every await of its world goes through `wait`."""

    def __init__(self, weather: Weather, name: str) -> None:
        self.weather, self.name = weather, name
        self.dead = self.paused = False
        self._pending: dict[asyncio.Future[Any], None] = {}
        self._sleepers: list[asyncio.Future[None]] = []

    def kill(self) -> None:
        """From now on it does nothing."""
        if self.dead:
            return
        self.dead = True
        for future in list(self._pending):
            if not future.done():
                future.set_exception(Killed())

    def pause(self, seconds: float) -> None:
        """Stop it for a while; its timers run out meanwhile."""
        self.paused = True
        asyncio.get_running_loop().call_later(seconds, self.resume)

    def resume(self) -> None:
        """Let it go on."""
        self.paused = False
        sleepers, self._sleepers = self._sleepers, []
        for future in sleepers:
            if not future.done():
                future.set_result(None)

    def check(self) -> None:
        """Raises Killed if it is dead."""
        if self.dead:
            raise Killed

    async def wait(self, future: asyncio.Future[T]) -> T | None:
        """Await a future that nobody else awaits. A cancellation is noticed only by a process that is not paused."""
        self.check()
        self.weather.tick(self)
        self.check()
        cancelled: asyncio.CancelledError | None = None
        result = None
        self._pending[future] = None
        try:
            result = await future
        except asyncio.CancelledError as error:
            cancelled = error
        finally:
            del self._pending[future]
        while self.paused and not self.dead:
            until: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._sleepers.append(until)
            self._pending[until] = None
            try:
                await until
            except asyncio.CancelledError as error:
                cancelled = error
            finally:
                del self._pending[until]
        self.check()
        if cancelled is not None:
            raise cancelled
        return result

    async def sleep(self, seconds: float) -> None:
        """Wait that long."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        handle = loop.call_later(seconds, ring, future)
        try:
            await self.wait(future)
        finally:
            handle.cancel()

    async def call(self, effect: Callable[[], T], *, late: bool = False, away: bool = False) -> T:
        """Have something done at a server, there and back.

        Args:
            effect: what happens there, at once.
            late: whether what was sent may arrive after the sender has given up.
            away: the server does not answer now.

        Raises:
            Lost: it may have happened; with `late` it may happen still.
        """
        weather, rng = self.weather, self.weather.rng
        fate = "before" if away else weather.fate()
        try:
            await self.sleep(weather.delay())
        except (asyncio.CancelledError, Killed) as error:
            if rng.random() < 0.5:
                if late or isinstance(error, Killed):
                    _later(rng.uniform(0, _LATE_S), effect)
                else:
                    _quietly(effect)
            raise
        if fate == "before":
            if late and rng.random() < 0.5:
                _later(rng.uniform(0, _LATE_S), effect)
            await self.sleep(rng.uniform(0.01, 3.0))
            raise Lost("no answer")
        result = effect()
        if fate == "after":
            await self.sleep(rng.uniform(0.01, 3.0))
            raise Lost("the answer was lost")
        await self.sleep(weather.delay())
        return result


def ring(future: asyncio.Future[None]) -> None:
    """A timer is over."""
    if not future.done():
        future.set_result(None)


def _later(seconds: float, effect: Callable[[], Any]) -> None:
    asyncio.get_running_loop().call_later(seconds, _quietly, effect)


def _quietly(effect: Callable[[], Any]) -> None:
    with suppress(Superseded, Blocked, Lost, Failure):
        effect()
