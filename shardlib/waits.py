"""The one place of the library that waits: in threads, or in greenlets over an event loop.

Everything above is written once, as plain functions. An engine chooses `ThreadWaits` or `GreenletWaits` when
it is made and hands it down; no other module on the way of a statement sleeps, starts a thread for work, or asks
whether it runs under asyncio. Below it, the catalog blocks, in threads of its own or in those of `call`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Generic, Protocol, TypeVar, cast

from sqlalchemy.util import await_only, greenlet_spawn

from shardlib.errors import InvalidArgument

__all__ = ["GreenletWaits", "ThreadWaits", "Ticker", "Waiter", "Waits", "forget_after_fork"]

T = TypeVar("T")
log = logging.getLogger("shardlib.waits")

WORKERS_MAX: Final = 32
CHILDREN_MAX: Final = 128


class Waiter(Protocol):
    """A one-shot signal. It belongs to the thread, or the event loop, that made it and waits on it."""

    def wake(self) -> None:
        """Let `wait` return True. From any thread or loop, any number of times; never blocks."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for `wake`. Returns False when `timeout_s` seconds passed without one."""


class Waits(Protocol):
    """How this engine waits. Both implementations promise the same; see `ThreadWaits` and `GreenletWaits`."""

    is_async: bool

    def run_all(self, calls: Sequence[Callable[[], T]], timeout_s: float | None = None) -> list[T]:
        """Run the calls side by side and return their results in order.

        Every call has ended when this returns or raises, so nothing that a call uses is still in use. A
        single call runs inline. The side-by-side number is bounded; context variables are those of the
        caller.

        Args:
            calls: functions without arguments.
            timeout_s: after so many seconds, calls that have not begun are left out; those running are cancelled
                where that is possible (greenlets) and waited for everywhere.

        Raises:
            The error of the first failed call by position, itself; the others are its notes (`__notes__`).
            TimeoutError: no call failed, and some did not finish within `timeout_s`.
        """

    def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""

    def call(self, fn: Callable[..., T], *args: object) -> T:
        """Run a function that blocks (file, catalog client) without blocking others."""

    def waiter(self) -> Waiter:
        """A new one-shot signal of the current thread or loop."""

    def owner(self) -> object:
        """To whom what is opened now belongs: the running event loop, or None where threads share everything."""

    def owner_gone(self, owner: object) -> bool:
        """Whether the loop that `owner` names has been closed."""

    def at_owner_end(self, callback: Callable[[object], None]) -> None:
        """Call `callback(owner)` when the current event loop is shut down; nothing for threads. Kept weakly."""

    def await_(self, awaitable: Awaitable[T]) -> T:
        """The result of an awaitable; only where `is_async`."""

    def readable(self, descriptor: int, timeout_s: float) -> bool:
        """Wait until a socket has something to read. False: it had not within `timeout_s` seconds."""

    def close(self) -> None:
        """Give back threads. `run_all` still works afterwards, one call after the other."""


# --------------------------------------------------------------------------------------------------- fork


class _Forkable(Protocol):
    def after_fork_in_child(self) -> None: ...


_forkables: weakref.WeakSet[Any] = weakref.WeakSet()


def forget_after_fork(holder: _Forkable) -> None:
    """Have `holder.after_fork_in_child()` called in each forked child. Keeps no strong reference."""
    _forkables.add(holder)


def _in_child() -> None:
    for holder in list(_forkables):
        try:
            holder.after_fork_in_child()
        except Exception:  # one holder's fault must not leave the others with the parent's sockets
            log.exception("a forked child could not reset %r", type(holder).__name__)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


# ------------------------------------------------------------------------------------------------- outcomes


class _Outcome(Generic[T]):
    """What became of one call: `value`, `error`, or neither (it was left out or cancelled by us)."""

    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None


def _settle(outcomes: Sequence[_Outcome[T]], timeout_s: float | None) -> list[T]:
    """The values in order, or the one error that stands for all."""
    failed = [(i, outcome.error) for i, outcome in enumerate(outcomes) if outcome.error is not None]
    if failed:
        # Ctrl-C and the like go before the errors of shards: the caller asked to stop.
        failed.sort(key=lambda item: (isinstance(item[1], Exception), item[0]))
        first = failed[0][1]
        for i, error in failed[1:]:
            if error is not first:
                first.add_note(f"call {i + 1} of {len(outcomes)} also failed: {type(error).__name__}: {error}")
        try:
            raise first
        finally:
            del first, failed  # no cycle error -> traceback -> frame -> error
    if not all(outcome.done for outcome in outcomes):
        finished = sum(outcome.done for outcome in outcomes)
        raise TimeoutError(f"{finished} of {len(outcomes)} calls finished within {timeout_s} s")
    return [cast("T", outcome.value) for outcome in outcomes]


# -------------------------------------------------------------------------------------------------- threads


class _ThreadWaiter:
    """A lock taken at birth: `wake` releases it, `wait` takes it again."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # already awake
            self._lock.release()

    def wait(self, timeout_s: float) -> bool:
        return self._lock.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX))


class _Batch(Generic[T]):
    """The calls of one `run_all`, taken one by one by the caller and by helpers from the pool."""

    def __init__(self, calls: Sequence[Callable[[], T]]) -> None:
        self.outcomes: list[_Outcome[T]] = [_Outcome() for _ in calls]
        self._todo = deque(
            (call, contextvars.copy_context(), outcome) for call, outcome in zip(calls, self.outcomes, strict=True)
        )
        self._left = len(calls)
        self._lock = threading.Lock()
        self._finished = threading.Event()

    def work(self) -> None:
        """Run calls until none is left to begin."""
        while True:
            try:
                call, context, outcome = self._todo.popleft()
            except IndexError:
                return
            try:
                outcome.value = context.run(call)
                outcome.done = True
            except Exception as error:  # noqa: BLE001 - raised by run_all, in the caller's thread
                outcome.error = error
            except BaseException as error:  # noqa: BLE001 - the same
                outcome.error = error
                self.leave_out()
            self._count(1)

    def leave_out(self) -> None:
        """Begin no further call."""
        dropped = 0
        while True:
            try:
                self._todo.popleft()
            except IndexError:
                break
            dropped += 1
        self._count(dropped)

    def _count(self, ended: int) -> None:
        with self._lock:
            self._left -= ended
            if self._left == 0:
                self._finished.set()

    def join(self) -> None:
        """Wait for the calls that helpers run; Ctrl-C leaves out the rest and still waits for those running."""
        try:
            self._finished.wait()
        except BaseException:
            self.leave_out()
            self._finished.wait()
            raise


class ThreadWaits:
    """Waits in threads.

    The caller of `run_all` works on its own calls, and idle threads of a bounded pool help it: so calls
    within calls cannot starve each other, and a pool whose threads all hang on a dead shard slows other
    callers down but never stops them. After a fork the child starts with a new pool.

    Args:
        workers_max: helping threads of the process for this engine.
    """

    is_async = False

    def __init__(self, workers_max: int = WORKERS_MAX) -> None:
        if workers_max < 1:
            raise InvalidArgument("workers_max", workers_max, "at least 1 thread")
        self._workers_max = workers_max
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        forget_after_fork(self)

    def run_all(self, calls: Sequence[Callable[[], T]], timeout_s: float | None = None) -> list[T]:
        """See `Waits.run_all`. Running calls cannot be cancelled; they are waited for."""
        if len(calls) == 1 and timeout_s is None:
            return [calls[0]()]
        batch = _Batch(calls)
        timer = None
        if timeout_s is not None:
            timer = threading.Timer(timeout_s, batch.leave_out)
            timer.daemon = True
            timer.start()
        try:
            self._help(batch, min(len(calls) - 1, self._workers_max))
            batch.work()
            if calls:
                batch.join()
        finally:
            if timer is not None:
                timer.cancel()
        return _settle(batch.outcomes, timeout_s)

    def _help(self, batch: _Batch[T], helpers: int) -> None:
        with self._lock:
            if self._closed or helpers < 1:
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers_max, thread_name_prefix="shardlib")
            pool = self._pool
        try:
            for _ in range(helpers):
                pool.submit(batch.work)
        except RuntimeError:  # closed meanwhile, or the interpreter is ending: the caller does the work alone
            return

    def sleep(self, seconds: float) -> None:
        """See `Waits.sleep`."""
        time.sleep(max(seconds, 0.0))

    def call(self, fn: Callable[..., T], *args: object) -> T:
        """See `Waits.call`: runs here, since this thread is the caller's own."""
        return fn(*args)

    def waiter(self) -> Waiter:
        """See `Waits.waiter`."""
        return _ThreadWaiter()

    def owner(self) -> object:
        """See `Waits.owner`: always None."""
        return None

    def owner_gone(self, owner: object) -> bool:
        """See `Waits.owner_gone`: never."""
        return False

    def at_owner_end(self, callback: Callable[[object], None]) -> None:
        """See `Waits.at_owner_end`: nothing to do."""

    def await_(self, awaitable: Awaitable[T]) -> T:
        """Not here: there is no event loop to await in."""
        raise TypeError(f"{type(awaitable).__name__} cannot be awaited by a blocking engine")

    def readable(self, descriptor: int, timeout_s: float) -> bool:
        """See `Waits.readable`."""
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(max(timeout_s, 0.0) * 1000))

    def close(self) -> None:
        """See `Waits.close`. Does not wait for calls of other threads."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)

    def after_fork_in_child(self) -> None:
        """The parent's threads are not here."""
        self._lock = threading.Lock()
        self._pool = None


# ------------------------------------------------------------------------------------------------- greenlets


class _LoopWaiter:
    """A future of one loop, set from wherever."""

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

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
        if not self._future.done():
            self._future.set_result(None)

    def wait(self, timeout_s: float) -> bool:
        if not self._future.done():
            # asyncio.wait, unlike wait_for, never swallows a cancellation that meets the wake-up
            await_only(asyncio.wait((self._future,), timeout=max(timeout_s, 0.0)))
        return self._future.done()


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
        outcomes: list[_Outcome[T]] = [_Outcome() for _ in calls]
        await_only(self._side_by_side(calls, outcomes, timeout_s))
        return _settle(outcomes, timeout_s)

    async def _side_by_side(
        self, calls: Sequence[Callable[[], T]], outcomes: Sequence[_Outcome[T]], timeout_s: float | None
    ) -> None:
        slots = asyncio.Semaphore(self._children_max)

        async def child(call: Callable[[], T], outcome: _Outcome[T]) -> None:
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


# --------------------------------------------------------------------------------------------------- ticker


class Ticker:
    """A daemon thread that calls a method every `interval_s` seconds, until `stop` or its object is gone.

    In a forked child it runs again from the next `start` on.
    """

    def __init__(self, interval_s: float, tick: Callable[[], None], name: str) -> None:
        if interval_s <= 0:
            raise InvalidArgument("interval_s", interval_s, "more than 0 seconds")
        self._interval_s, self._name = interval_s, name
        self._tick = weakref.WeakMethod(tick)
        self._lock = threading.Lock()
        self._stop: threading.Event | None = None
        forget_after_fork(self)

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._stop is not None

    def start(self) -> None:
        """Start the thread unless it runs already."""
        with self._lock:
            if self._stop is None:
                stop = self._stop = threading.Event()
                arguments = (stop, self._interval_s, self._tick)
                threading.Thread(target=_tick_until, args=arguments, name=self._name, daemon=True).start()

    def stop(self) -> None:
        """End the thread soon; it is not waited for."""
        with self._lock:
            stop, self._stop = self._stop, None
        if stop is not None:
            stop.set()

    def after_fork_in_child(self) -> None:
        """The parent's thread is not here."""
        self._lock, self._stop = threading.Lock(), None


def _tick_until(stop: threading.Event, interval_s: float, tick: weakref.WeakMethod[Callable[[], None]]) -> None:
    while not stop.wait(interval_s):
        method = tick()
        if method is None:
            return
        try:
            method()
        except Exception:  # the next tick tries again
            log.exception("periodic work failed")
        del method
