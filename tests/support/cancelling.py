"""Cancel a coroutine at one chosen suspension, in each way in which a cancellation can meet it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Literal

How = Literal["waiting", "waking"]
"""`waiting`: while the future is pending. `waking`: when it is done and the task has not seen that yet."""


class CancelAt:
    """Awaits a coroutine and cancels the task that does so at its suspension number `at`, counted from 1.

    Attributes:
        fired: whether there was such a suspension.
        seen: how many there were.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], at: int, how: How, times: int = 1) -> None:
        self._work, self._at, self._how, self._times = work, at, how, times
        self.fired = False
        self.seen = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        inner = self._work.__await__()
        throw: BaseException | None = None
        while True:
            try:
                waited: Any = inner.send(None) if throw is None else inner.throw(throw)
            except StopIteration as end:
                return end.value
            throw = None
            self.seen += 1
            if self._at <= self.seen < self._at + self._times:
                self.fired = True
                if self._how == "waiting" or waited is None:  # None: a bare sleep(0)
                    task.get_loop().call_soon(task.cancel)
                else:
                    waited.add_done_callback(lambda _: task.cancel())
            try:
                yield waited
            except BaseException as error:  # noqa: BLE001 - handed on into the coroutine
                throw = error
