"""Clients that read and write flights while their shard is split: threads, and one that uses asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Final, Self

from sqlalchemy import update

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib_ops.demo.models import Flight
from shardlib_ops.local.process import wait_until

__all__ = ["Clients", "FlightKey", "Sample", "delay_further"]

FlightKey = tuple[str, datetime, int]
"""The primary key of a flight: tail number, departure, number."""

_EVERY_S: Final = 0.05
"""From one transaction of a client to its next: the machine is also that of all servers."""
_JOIN_S: Final = 60.0


def delay_further(engine: ShardedEngine, flight: FlightKey) -> int | None:
    """One transaction of a client: read a flight, write it, and give back what was read."""
    with engine.session(flight[0]) as session:
        found = session.get_one(Flight, flight)
        before = found.delay
        found.delay = Flight.delay + 1
        session.commit()
        return before


async def delay_further_async(engine: AsyncShardedEngine, flight: FlightKey) -> int | None:
    """The same, awaited."""
    async with engine.session(flight[0]) as session:
        found = await session.get_one(Flight, flight)
        before = found.delay
        found.delay = Flight.delay + 1
        await session.commit()
        return before


@dataclass(frozen=True, slots=True)
class Sample:
    """One transaction that was acknowledged: its times by the monotonic clock, and whether its key is to move."""

    began: float
    ended: float
    moving: bool

    @property
    def ms(self) -> float:
        """How long it took."""
        return (self.ended - self.began) * 1000


@dataclass(slots=True)
class _Client:
    """One flight and who works on it. Nobody else writes it, so each read must show what was acknowledged before."""

    flight: FlightKey
    moving: bool
    acknowledged: int = 0
    first: int | None = None

    def read(self, delay: int | None) -> str:
        """What is wrong with what a transaction read, empty if nothing is."""
        if self.first is None:
            self.first = delay
        if delay is None or self.first is None or delay != self.first + self.acknowledged:
            return f"{self.flight[0]}: read {delay}, expected {self.first} and {self.acknowledged} more"
        return ""


class Clients:
    """Clients at work: a thread for each flight, and tasks of one event loop for some more.

    Use as a context manager. When it ends they have stopped, and each flight is set back by what was acknowledged:
    it is as before if each acknowledged write was done exactly once.

    Args:
        engine: what the threads use.
        url: the catalog, for the engine of the tasks.
        threads: the flights of the threads, and whether they are to move.
        tasks: those of the tasks.

    Attributes:
        samples: of the transactions that were acknowledged, as they ended.
        failures: what went wrong: an error, or a read that did not show a write before it. Nothing is tried again.
    """

    def __init__(
        self,
        engine: ShardedEngine,
        url: str,
        threads: Sequence[tuple[FlightKey, bool]],
        tasks: Sequence[tuple[FlightKey, bool]],
    ) -> None:
        self._engine, self._url = engine, url
        self._of_threads = [_Client(*each) for each in threads]
        self._of_tasks = [_Client(*each) for each in tasks]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(each,), daemon=True) for each in self._of_threads]
        self._threads.append(threading.Thread(target=self._work_with_tasks, daemon=True))
        self.samples: list[Sample] = []  # append is atomic, as for `failures`
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
            if thread.is_alive():
                self.failures.append(f"a client did not end within {_JOIN_S:g} s")
        if kind is None:
            for client in (*self._of_threads, *self._of_tasks):
                self._set_back(client)

    def work_until(self, moment: float, timeout_s: float = 20.0) -> bool:
        """Wait until every kind of client was acknowledged a transaction that began after a moment."""

        def so() -> bool:
            late = {sample.moving for sample in self.samples[-200:] if sample.began > moment}
            return late == {True, False} or bool(self.failures)

        return wait_until(so, timeout_s)

    def _work(self, client: _Client) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            began = time.monotonic()
            due = max(due + _EVERY_S, began)
            try:
                self._done(client, began, delay_further(self._engine, client.flight))
            except Exception as error:  # noqa: BLE001 - counted, shown, and a check that fails
                self._failed(client, error)

    def _work_with_tasks(self) -> None:
        try:
            asyncio.run(self._tasks())
        except Exception as error:  # noqa: BLE001 - as above
            self.failures.append(f"{type(error).__name__}: {error}")

    async def _tasks(self) -> None:
        async with await AsyncShardedEngine.open(self._url, pool_size=len(self._of_tasks)) as engine:

            async def work(client: _Client) -> None:
                while not self._stop.is_set():
                    began = time.monotonic()
                    try:
                        self._done(client, began, await delay_further_async(engine, client.flight))
                    except Exception as error:  # noqa: BLE001 - as above
                        self._failed(client, error)
                    await asyncio.sleep(max(0.0, began + _EVERY_S - time.monotonic()))

            async with asyncio.TaskGroup() as group:
                for client in self._of_tasks:
                    group.create_task(work(client))

    def _done(self, client: _Client, began: float, read: int | None) -> None:
        if wrong := client.read(read):
            self.failures.append(wrong)
        client.acknowledged += 1
        self.samples.append(Sample(began, time.monotonic(), client.moving))

    def _failed(self, client: _Client, error: Exception) -> None:
        self.failures.append(f"{client.flight[0]}: {type(error).__name__}: {error}")

    def _set_back(self, client: _Client) -> None:
        tailnum, departs, number = client.flight
        flight = update(Flight).where(Flight.tailnum == tailnum, Flight.departs == departs, Flight.number == number)
        with self._engine.session(tailnum) as session:
            session.execute(flight.values(delay=Flight.delay - client.acknowledged))
            session.commit()
