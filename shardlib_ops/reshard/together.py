"""Several things at once, of which none goes on alone when another has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

__all__ = ["first_of", "together"]

T = TypeVar("T")


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all calls, in their order. When one fails, the others are cancelled and have ended.

    Not a `TaskGroup`: before Python 3.13 one inside another takes the outer one's cancellation for its own when parts
    of both fail at one moment (cpython 116720), and the outer one waits for ever.

    Raises:
        CancelledError: this task was cancelled; also if a call has failed as well.
        BaseException: what the first of them raised, as it was.
    """
    failed: list[asyncio.Task[T]] = []

    def ended(task: asyncio.Task[T]) -> None:
        if not task.cancelled() and task.exception() is not None:
            failed.append(task)

    tasks = [asyncio.create_task(call) for call in calls]
    for task in tasks:
        task.add_done_callback(ended)
    cancelled: asyncio.CancelledError | None = None
    ending = False
    while left := [task for task in tasks if not task.done()]:
        if not ending and (failed or cancelled is not None):
            ending = True  # once: a second cancellation would disturb what a call does to end
            for task in left:
                task.cancel()
        try:
            await asyncio.wait(left, return_when=asyncio.ALL_COMPLETED if ending else asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    if failed:
        failed[0].result()
    return [task.result() for task in tasks]


def first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group, however deep the groups are."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
