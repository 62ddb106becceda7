"""psycopg's connections behind the fence: a gate in the first round trip of each transaction, an honest COMMIT.

psycopg starts a transaction with a generator that its blocking and its asyncio connection share, so what they do
here is written once too: `Talking` < `Gated` (the start) < `Ending`, each a part of both classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any, ClassVar, TypeVar, cast

import psycopg
from psycopg import errors as pg
from sqlalchemy.util import await_only

from shardlib.fence.cursor import AsyncFencedCursor, AsyncFencedServerCursor, FencedCursor, FencedServerCursor
from shardlib.fence.ending import Ending, UnknownCommit, outcome_of
from shardlib.fence.gated import begins_without_gate
from shardlib.fence.looped import LoopedConnection
from shardlib.fence.verdict import Silent

__all__ = [
    "AsyncFencedConnection",
    "FencedConnection",
    "UnknownCommit",
    "begins_without_gate",
    "drive",
    "drive_within",
    "lock_gates",
    "start",
]

T = TypeVar("T")


class FencedConnection(Ending, psycopg.Connection[Any]):
    """A blocking psycopg connection behind the fence."""

    is_async: ClassVar[bool] = False

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.cursor_factory = FencedCursor
        self.server_cursor_factory = FencedServerCursor
        self.add_notice_handler(self._see_notice)

    def rollback(self) -> None:
        """Roll back; see `roll_back_unheard`."""
        if not self.roll_back_unheard():
            super().rollback()


class AsyncFencedConnection(Ending, LoopedConnection):  # type: ignore[misc]
    """An asyncio psycopg connection behind the fence."""

    is_async: ClassVar[bool] = True

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.cursor_factory: Any = AsyncFencedCursor
        self.server_cursor_factory: Any = AsyncFencedServerCursor
        self.add_notice_handler(self._see_notice)

    async def rollback(self) -> None:  # type: ignore[override]
        """Roll back; see `roll_back_unheard`. Nothing is awaited, so a cancellation cannot leave it half done."""
        if not self.roll_back_unheard():
            await cast("Awaitable[None]", super().rollback())

    async def commit(self) -> None:  # type: ignore[override]
        """Commit; a cancellation that arrives meanwhile is kept back until the outcome is known.

        Passing it on would cancel the statement in the server, which ends the wait for a synchronous replica while
        the row stays: acknowledged to nobody, visible to all.
        """
        running = asyncio.ensure_future(cast("Awaitable[None]", super().commit()))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await outcome_of(running)
            raise


def drive(driver: FencedConnection | AsyncFencedConnection, generator: Generator[Any, Any, T]) -> T:
    """Run a generator of the connection to its end: blocking, or inside SQLAlchemy's greenlet for asyncio."""
    answer: Any = driver.wait(generator)
    return await_only(answer) if driver.is_async else answer  # type: ignore[no-any-return]


def drive_within(
    driver: FencedConnection | AsyncFencedConnection, generator: Generator[Any, Any, T], limit_s: float | None
) -> T:
    """`drive`, for so many seconds at most (None: any number): a frozen server closes no connection.

    Raises:
        Silent: it took longer.
    """
    try:
        answer: Any = driver.wait(generator, timeout=limit_s)
        return await_only(answer) if driver.is_async else answer  # type: ignore[no-any-return]
    except pg._WaitTimeout:  # noqa: SLF001 - psycopg asks its callers to convert it
        driver.pgconn.finish()
        raise Silent(f"no answer within {limit_s} s") from None


def start(
    driver: FencedConnection | AsyncFencedConnection, gates: tuple[int, ...], limit_s: float | None = None
) -> None:
    """Begin a transaction that holds these gates, in one round trip.

    Args:
        driver: the connection.
        gates: their numbers.
        limit_s: seconds that it may take (None: any number); one that waits for a gate which is being closed takes
            milliseconds.

    Raises:
        Silent: it took longer, and the connection is closed.
        GateClosed: one of them is gone; nothing ran, and the connection is idle again.
        InvalidTopology: the schema is missing or the role may not take the gate.
        psycopg.Error: the connection was lost, or the server refused for another reason.
    """
    driver.arm(gates)
    drive_within(driver, driver.begin(), limit_s)


def lock_gates(driver: FencedConnection | AsyncFencedConnection, gates: tuple[int, ...]) -> None:
    """Take more gates inside the running transaction, in one round trip.

    Raises:
        GateClosed: one of them is gone; the transaction has failed and can only be rolled back.
    """
    drive(driver, driver.lock_more(gates))
