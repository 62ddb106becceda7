"""How an asyncio connection waits for answers: a future of its loop's `SocketWatch` for each, and no timer."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any, Final, TypeVar, cast

import psycopg
from psycopg import errors as pg
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait

from shardlib.waits.sockets import SocketWatch, give_way, watch_of

__all__ = ["LoopedConnection"]

T = TypeVar("T")

_INTERVAL_S: Final = 0.1
_BUSY_MAX_S: Final = 0.005
_COARSE_S: Final = 1.0
"""A limit of so much may be kept to a tenth of a second."""
_READ: Final = Wait.R
_READY: Final = Ready.R
_NOT_READY: Final = Ready.NONE


class LoopedConnection(psycopg.AsyncConnection[Any]):
    """An `AsyncConnection` whose waits cost about a third of psycopg's own."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: SocketWatch | None = None
        self._gave_way = 0.0

    async def wait(
        self,
        gen: PQGen[T],
        interval: float = _INTERVAL_S,
        timeout: float | None = None,  # noqa: ASYNC109 - psycopg's signature
    ) -> T:
        """As psycopg's, for the waits that nearly all are: for an answer, without a time limit or with a coarse one.

        All others, and what follows a cancellation, are left to psycopg in the middle of the generator.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._watch = loop, watch_of(loop)
        watch = self._watch
        if watch is None or (timeout is not None and timeout < _COARSE_S):
            return await self._driver_waits(gen, interval, timeout)
        deadline = None if timeout is None else monotonic() + timeout
        try:
            state = next(gen)
        except StopIteration as end:
            if monotonic() - self._gave_way > _BUSY_MAX_S:  # many short steps in a row, as of a COPY
                await give_way()
                self._gave_way = monotonic()
            return cast("T", end.value)
        try:
            while state == _READ:
                ready = await watch.readable(loop, self.pgconn.socket)
                self._gave_way = monotonic()
                state = gen.send(_READY if ready else _NOT_READY)
                if not ready and deadline is not None and monotonic() >= deadline:
                    raise pg._WaitTimeout("wait timeout expired")  # noqa: SLF001 - as psycopg's
        except StopIteration as end:
            return cast("T", end.value)
        except OSError as error:
            raise psycopg.OperationalError("the connection's socket is closed") from error
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
            return await self._driver_waits(_Resumed(gen, error), interval, None)
        left_s = None if deadline is None else max(0.0, deadline - monotonic())
        return await self._driver_waits(_Resumed(gen, state), interval, left_s)

    async def _driver_waits(self, gen: Any, interval: float, timeout_s: float | None) -> T:
        waited: Any = await super().wait(gen, interval, timeout_s)
        return cast("T", waited)


class _Resumed:
    """A generator in the middle of its work, for someone who begins with `next`: first it gives, or raises, `first`."""

    __slots__ = ("_first", "_gen")

    def __init__(self, gen: PQGen[Any], first: Wait | BaseException) -> None:
        self._gen = gen
        self._first: Wait | BaseException | None = first

    def __next__(self) -> Wait:
        first, self._first = self._first, None
        if first is None:
            return next(self._gen)
        if isinstance(first, BaseException):
            try:
                raise first
            finally:
                del first  # no cycle error -> traceback -> frame -> error
        return first

    def send(self, ready: Ready) -> Wait:
        return self._gen.send(ready)
