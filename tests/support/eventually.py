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
) -> T:
    """Ask until the answer is true, and return it.

    Args:
        condition: asked again and again.
        within_s: limit in seconds.
        what: said in the failure; the condition's name if left out.
        every_s: pause between two questions, in seconds.
        ignore: errors of the condition that mean "not yet".

    Raises:
        AssertionError: it did not become true; the message holds the last answer or error.
    """
    deadline = time.monotonic() + within_s
    while True:
        seen, answer = _ask(condition, ignore)
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise AssertionError(_failure(condition, what, within_s, seen))
        time.sleep(every_s)


async def eventually_async(
    condition: Callable[[], Awaitable[T]],
    within_s: float,
    what: str = "",
    *,
    every_s: float = 0.02,
    ignore: type[Exception] | tuple[type[Exception], ...] = (),
) -> T:
    """`eventually` for a coroutine function."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            answer = await condition()
            if answer:
                return answer
            seen = repr(answer)
        except ignore as error:
            seen = repr(error)
        if time.monotonic() >= deadline:
            raise AssertionError(_failure(condition, what, within_s, seen))
        await asyncio.sleep(every_s)


def _ask(condition: Callable[[], T], ignore: type[Exception] | tuple[type[Exception], ...]) -> tuple[str, T | None]:
    try:
        answer = condition()
    except ignore as error:
        return repr(error), None
    return repr(answer), answer


def _failure(condition: Callable[[], Any], what: str, within_s: float, seen: str) -> str:
    name = what or getattr(condition, "__name__", repr(condition))
    return f"not within {within_s:g} s: {name}; last seen: {seen}"
