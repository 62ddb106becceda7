"""Limits of our own for an answer: a frozen server keeps none, and its kernel acknowledges what it is sent."""

from __future__ import annotations

from collections.abc import Callable, Generator
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.abc import PQGen

from shardlib.shard.connect import explain
from shardlib.topology import Shard

__all__ = ["AskingConnection", "limited"]

T = TypeVar("T")


def limited(generator: Generator[Any, Any, T], limit_s: float, over: Callable[[], object]) -> Generator[Any, Any, T]:
    """A generator of psycopg that asks what to do when it has waited for so many seconds.

    The driver resumes it several times a second, also when nothing is ready.

    Args:
        generator: what talks with the server.
        limit_s: seconds.
        over: raises, which ends the generator; or returns, and it waits for as long again.
    """
    deadline = monotonic() + limit_s
    try:
        wanted = next(generator)
        while True:
            ready = yield wanted
            if not ready and monotonic() > deadline:
                over()
                deadline = monotonic() + limit_s
            wanted = generator.send(ready)
    except StopIteration as end:
        answer: T = end.value
        return answer


class AskingConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits for long statements, and now and then asks its server by another one whether it is there.

    What has no answer in time from a server that is not, raises psycopg.OperationalError; the connection is closed.
    """

    shard: Shard
    """Whose primary it leads to."""
    conninfo: str
    """How to get another one."""
    ask_after_s: float
    """Seconds without an answer until it asks."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """As psycopg's."""
        if timeout is None and hasattr(self, "ask_after_s"):
            gen = limited(gen, self.ask_after_s, self._ask)
        return super().wait(gen, interval, timeout)

    def _ask(self) -> None:
        try:
            psycopg.connect(self.conninfo).close()
        except psycopg.OperationalError as error:
            reason, silent = explain(error, self.shard.primary, self.conninfo)
            if not silent:
                return  # it has no slot to spare, for example
            self.pgconn.finish()
            raise pg.OperationalError(f"no answer within {self.ask_after_s:g} s, and then {reason}") from None
