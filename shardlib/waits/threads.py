"""Waiting in threads: the caller's own, and idle ones of a bounded pool that help it."""

from __future__ import annotations

import contextlib
import contextvars
import select
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Generic, TypeVar

from shardlib.errors import InvalidArgument
from shardlib.waits.contract import Waiter
from shardlib.waits.forks import forget_after_fork
from shardlib.waits.outcomes import Outcome, settle

__all__ = ["ThreadWaits"]

T = TypeVar("T")
WORKERS_MAX: Final = 32


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
        self.outcomes: list[Outcome[T]] = [Outcome() for _ in calls]
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
        return settle(batch.outcomes, timeout_s)

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
