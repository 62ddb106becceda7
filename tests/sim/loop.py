"""An event loop whose time is a number: it jumps to the next timer when nothing is left to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

__all__ = ["SimLoop", "Stuck"]


class Stuck(Exception):  # noqa: N818 - a verdict, not an error of the program
    """Nothing can happen any more, or time has run out."""


class _Task(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address: `TaskGroup` cancels in the order of a set."""

    number = 0
    _log_destroy_pending = False

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Timers:
    """In the place of a selector: waiting is adding to the time."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("every task waits for another")
        if timeout > 0:
            self._loop.virtual_s += timeout
            if self._loop.virtual_s > self._loop.until_s:
                raise Stuck(f"not done after {self._loop.until_s:g} virtual seconds")
        return []


class SimLoop(asyncio.BaseEventLoop):
    """Runs tasks in one order for one program. Has no sockets, threads or signals.

    Attributes:
        virtual_s: the time.
        until_s: the time at which a run is given up.
        surprises: what was raised where nobody looked.
    """

    def __init__(self, until_s: float) -> None:
        super().__init__()
        self.virtual_s, self.until_s = 1_000.0, 1_000.0 + until_s
        self.surprises: list[str] = []
        self._clock_resolution = 1e-9
        self._selector = _Timers(self)
        self._tasks_made = 0
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]  # a factory of a subclass
        self.set_exception_handler(self._surprised)

    def time(self) -> float:
        """The virtual time."""
        return self.virtual_s

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], context: Context | None = None
    ) -> _Task:
        self._tasks_made += 1
        _Task.number = self._tasks_made  # hashed while it is made
        task = _Task(coro, loop=loop, context=context)
        task.number = self._tasks_made
        return task

    def _surprised(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not getattr(error, "expected", False):
            self.surprises.append(f"{context.get('message')}: {error!r}")

    def _process_events(self, event_list: list[Any]) -> None:
        """Nothing comes from outside."""

    def _write_to_self(self) -> None:
        """Nobody calls from another thread."""

    def run(self, main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine to its end, then end every other task and close the loop.

        Raises:
            Stuck: it cannot end.
        """
        asyncio.set_event_loop(self)
        try:
            return self.run_until_complete(main())
        finally:
            self.until_s = float("inf")
            left = sorted((task for task in asyncio.all_tasks(self)), key=lambda task: getattr(task, "number", 0))
            for task in left:
                task.cancel()
            if left:
                self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            asyncio.set_event_loop(None)
            self.close()
