"""Waiting for something to become true, with a limit and with what was seen instead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


def eventually(
    condition: Callable[[], T],
    within_s: float,
    what: str = "",
    *,
    every_s: float = 0.02,
    ignore: type[Exception] | tuple[type[Exception], ...] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Ask until the answer is true, and return it.

    Args:
        condition: asked again and again.
        within_s: limit in seconds.
        what: said in the failure; the condition's name if left out.
        every_s: pause between two questions, in seconds.
        ignore: errors of the condition that mean "not yet".
        sleep: waits that many seconds; one that lets tasks of an event loop go on, where there are some.

    Raises:
        AssertionError: it did not become true; the message holds the last answer or error.
    """
    limit = _Limit(condition, within_s, what)
    while True:
        seen: object
        try:
            answer = condition()
        except ignore as error:
            seen = error
        else:
            if answer:
                return answer
            seen = answer
        limit.not_yet(seen)
        sleep(every_s)


async def eventually_async(
    condition: Callable[[], Awaitable[T]],
    within_s: float,
    what: str = "",
    *,
    every_s: float = 0.02,
    ignore: type[Exception] | tuple[type[Exception], ...] = (),
) -> T:
    """`eventually` for a coroutine function."""
    limit = _Limit(condition, within_s, what)
    while True:
        seen: object
        try:
            answer = await condition()
        except ignore as error:
            seen = error
        else:
            if answer:
                return answer
            seen = answer
        limit.not_yet(seen)
        await asyncio.sleep(every_s)


class _Limit:
    """The time that a condition has to become true."""

    def __init__(self, condition: Callable[[], Any], within_s: float, what: str) -> None:
        self._within_s, self._deadline = within_s, time.monotonic() + within_s
        self._name = what or getattr(condition, "__name__", repr(condition))

    def not_yet(self, seen: object) -> None:
        """Raise AssertionError if there is no time left; `seen` is the last answer, or the error that counts as one."""
        if time.monotonic() >= self._deadline:
            raise AssertionError(f"not within {self._within_s:g} s: {self._name}; last seen: {seen!r}")
