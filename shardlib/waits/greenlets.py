"""Waiting in greenlets over an event loop, through SQLAlchemy's bridge."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy.util import await_only, greenlet_spawn

from shardlib.errors import InvalidArgument
from shardlib.waits.contract import Waiter
from shardlib.waits.forks import forget_after_fork
from shardlib.waits.outcomes import Outcome, settle

__all__ = ["GreenletWaits"]

T = TypeVar("T")
log = logging.getLogger("shardlib.waits")
CHILDREN_MAX: Final = 128


class _LoopWaiter:
    """A signal of one loop, given from wherever.

    The future is awaited itself: unlike `wait_for`, that never swallows a cancellation that meets the wake-up.
    """

    __slots__ = ("_awake", "_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._awake = False
        self._future: asyncio.Future[None] | None = None

    def wake(self) -> None:
        try:
            running: object = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            self._set()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: its tasks were cancelled, nobody waits
            self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._awake = True
        self._end()

    def _end(self) -> None:
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)

    def wait(self, timeout_s: float) -> bool:
        if not self._awake:
            self._future = self._loop.create_future()
            timer = self._loop.call_later(max(timeout_s, 0.0), self._end)
            try:
                await_only(self._future)
            finally:
                timer.cancel()
        return self._awake


class GreenletWaits:
    """Waits in greenlets: every method is called from code that runs inside `sqlalchemy.util.greenlet_spawn`.

    One object may be used from several event loops at once. Cancelling the task of a caller of `run_all`
    cancels its children and waits for them before the cancellation goes on.

    Args:
        children_max: greenlets of one `run_all` at the same time.
    """

    is_async = True

    def __init__(self, children_max: int = CHILDREN_MAX) -> None:
        if children_max < 1:
            raise InvalidArgument("children_max", children_max, "at least 1 greenlet")
        self._children_max = children_max
        self._ends: dict[asyncio.AbstractEventLoop, _LoopEnd] = {}
        self._lock = threading.Lock()
        forget_after_fork(self)

    def run_all(self, calls: Sequence[Callable[[], T]], timeout_s: float | None = None) -> list[T]:
        """See `Waits.run_all`."""
        if not calls:
            return []
        if len(calls) == 1 and timeout_s is None:
            return [calls[0]()]
        outcomes: list[Outcome[T]] = [Outcome() for _ in calls]
        await_only(self._side_by_side(calls, outcomes, timeout_s))
        return settle(outcomes, timeout_s)

    async def _side_by_side(
        self, calls: Sequence[Callable[[], T]], outcomes: Sequence[Outcome[T]], timeout_s: float | None
    ) -> None:
        slots = asyncio.Semaphore(self._children_max)

        async def child(call: Callable[[], T], outcome: Outcome[T]) -> None:
            async with slots:
                try:
                    outcome.value = await greenlet_spawn(call)
                    outcome.done = True
                except asyncio.CancelledError:
                    if not stopping:  # the call's own doing: it is this call's error
                        outcome.error = asyncio.CancelledError("a call was cancelled from inside")
                    raise
                except BaseException as error:  # noqa: BLE001 - raised by run_all, in the caller's greenlet
                    outcome.error = error

        stopping = False
        tasks = [asyncio.create_task(child(call, outcome)) for call, outcome in zip(calls, outcomes, strict=True)]
        try:
            _, pending = await asyncio.wait(tasks, timeout=timeout_s)
        except asyncio.CancelledError:
            stopping = True
            await _cancel(tasks)
            raise
        if pending:
            stopping = True
            await _cancel(pending)

    def sleep(self, seconds: float) -> None:
        """See `Waits.sleep`."""
        await_only(asyncio.sleep(max(seconds, 0.0)))

    def call(self, fn: Callable[..., T], *args: object) -> T:
        """See `Waits.call`: runs in the loop's default thread pool. A cancelled caller leaves the thread to end."""
        return await_only(asyncio.to_thread(fn, *args))

    def waiter(self) -> Waiter:
        """See `Waits.waiter`."""
        return _LoopWaiter()

    def owner(self) -> object:
        """See `Waits.owner`."""
        return asyncio.get_running_loop()

    def owner_gone(self, owner: object) -> bool:
        """See `Waits.owner_gone`."""
        return isinstance(owner, asyncio.AbstractEventLoop) and owner.is_closed()

    def at_owner_end(self, callback: Callable[[object], None]) -> None:
        """See `Waits.at_owner_end`. Called at `loop.shutdown_asyncgens()`, which `asyncio.run` always does."""
        loop = asyncio.get_running_loop()
        with self._lock:
            for gone in [known for known in self._ends if known.is_closed()]:
                del self._ends[gone]
            end = self._ends.get(loop)
            fresh = end is None
            if end is None:
                end = self._ends[loop] = _LoopEnd(loop)
            end.add(callback)
        if fresh:
            await_only(end.begin(self._forget))

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._ends.pop(loop, None)

    def await_(self, awaitable: Awaitable[T]) -> T:
        """See `Waits.await_`."""
        return await_only(awaitable)

    def readable(self, descriptor: int, timeout_s: float) -> bool:
        """See `Waits.readable`. Nobody else may wait for this descriptor in the same loop."""
        waiter = _LoopWaiter()
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, waiter.wake)
        try:
            return waiter.wait(timeout_s)
        finally:
            loop.remove_reader(descriptor)

    def close(self) -> None:
        """See `Waits.close`: nothing is held."""

    def after_fork_in_child(self) -> None:
        """The parent's loops do not run here."""
        self._lock = threading.Lock()
        self._ends = {}


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait until each has ended, whatever cancels us meanwhile (that is raised afterwards)."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    again: asyncio.CancelledError | None = None
    while pending:
        try:
            _, left = await asyncio.wait(pending)
            pending = list(left)
        except asyncio.CancelledError as error:
            again = error
            pending = [task for task in pending if not task.done()]
    if again is not None:
        raise again


class _LoopEnd:
    """Callbacks for the end of one event loop.

    A loop finishes its unfinished async generators when it is shut down; one suspended generator is therefore
    a notice of that moment, given while the loop still runs.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._callbacks: list[weakref.ref[Callable[[object], None]]] = []
        self._notice: AsyncGenerator[None, None] | None = None

    def add(self, callback: Callable[[object], None]) -> None:
        kept = [ref for ref in self._callbacks if ref() is not None]
        ref = weakref.WeakMethod(callback) if hasattr(callback, "__self__") else weakref.ref(callback)
        if ref not in kept:
            kept.append(ref)
        self._callbacks = kept

    async def begin(self, forget: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        self._notice = self._until_end(forget)
        await anext(self._notice)

    async def _until_end(self, forget: Callable[[asyncio.AbstractEventLoop], None]) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            loop = self._loop()
            for ref in self._callbacks:
                callback = ref()
                if callback is None or loop is None:
                    continue
                try:
                    callback(loop)
                except Exception:
                    log.exception("closing what belongs to an event loop that ends")
            if loop is not None:
                forget(loop)
