"""What both ways of waiting promise."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

__all__ = ["Waiter", "Waits"]

T = TypeVar("T")


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
