"""A client process of a schedule: works until SIGTERM.

Beside what `workload` does it appends to lists, and moves coins between accounts, on several shards at once.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import BigInteger, Column, MetaData, String, Table, Text, select, update

from tests.support.appends import Append, Look, Transfer
from tests.support.schedules import plants
from tests.support.schedules.processes import speak_to
from tests.support.workload import (
    KEY,
    TWO_PHASE,
    MissingRowError,
    Recorder,
    Settings,
    Worker,
    _short,
    go_through,
    outcome_of,
    run_async,
    run_sync,
)

more = MetaData()
lists = Table("lists", more, Column("key", String, primary_key=True, **KEY), Column("elements", Text, nullable=False))
account = Table(
    "account", more, Column("key", String, primary_key=True, **KEY), Column("coins", BigInteger, nullable=False)
)
ballast = Table(
    "ballast",
    more,
    Column("key", String, primary_key=True, **KEY),
    Column("n", BigInteger, primary_key=True),
    Column("text", Text, nullable=False),
)

stopping = threading.Event()
two_phase = False
_PAUSE_S = 0.15


class ScheduleWorker(Worker):
    """Until told to stop."""

    def going(self) -> bool:
        return not stopping.is_set() and time.monotonic() < self.until

    def one(self) -> Any:
        yield None, lambda _: time.sleep(self.random.random() * _PAUSE_S), False
        pick = self.random.random()
        if pick < 0.65:
            yield from super().one()
        elif pick < 0.8:
            yield from self.append()
        elif pick < 0.93 or not two_phase:
            yield from self.look()
        else:
            yield from self.transfer()

    def some(self, most: int) -> list[str]:
        # In one order, so that two transactions on two shards do not wait for each other.
        return sorted(self.random.sample(self.client.settings.keys, self.random.randint(1, most)))

    def append(self) -> Any:
        keys, element = self.some(2 if two_phase else 1), uuid4().hex[:12]
        began = time.monotonic()

        def work(session: Any) -> None:
            for key in keys:
                where = update(lists).where(lists.c.key == key)
                if session.execute(where.values(elements=lists.c.elements + f"{element} ")).rowcount != 1:
                    raise MissingRowError(key)

        error = (yield TWO_PHASE if len(keys) > 1 else keys[0], work, True)[1]
        ended = time.monotonic()
        if isinstance(error, MissingRowError):
            self.recorder.add(Look({str(error): None}, began, ended))
        outcome = "ok" if error is None else outcome_of(error)
        self.recorder.add(Append(element, keys, began, ended, outcome, _short(error)))  # type: ignore[arg-type]

    def look(self) -> Any:
        (key,) = self.some(1)
        began = time.monotonic()
        seen, error = yield (
            key if self.random.random() < 0.5 else None,
            lambda s: s.scalar(select(lists.c.elements).where(lists.c.key == key)),
            False,
        )
        if error is None:
            self.recorder.add(Look({key: None if seen is None else seen.split()}, began, time.monotonic()))

    def transfer(self) -> Any:
        giver, taker = self.random.sample(self.client.settings.keys, 2)

        def work(session: Any) -> None:
            for key in sorted((giver, taker)):
                coins = account.c.coins + (1 if key == taker else -1)
                if session.execute(update(account).where(account.c.key == key).values(coins=coins)).rowcount != 1:
                    raise MissingRowError(key)

        error = (yield TWO_PHASE, work, True)[1]
        outcome = "ok" if error is None else outcome_of(error)
        self.recorder.add(Transfer(giver, taker, outcome, _short(error)))  # type: ignore[arg-type]


def main(settings: Settings, several: bool, plant: str | None, log: str) -> None:
    """The process.

    Args:
        settings: as for `workload`.
        several: whether to write on several shards in one transaction.
        plant: a fault to put in.
        log: file that its output is appended to.
    """
    global two_phase  # noqa: PLW0603 - of this process, before anything runs
    two_phase = several
    speak_to(log)
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    if plant is not None:
        plants.plant(plant)
    go_through(settings.endpoints)
    with Path(settings.out).open("w", encoding="utf-8") as out:
        if settings.facade == "sync":
            run_sync(settings, Recorder(out), ScheduleWorker)
        else:
            asyncio.run(run_async(settings, Recorder(out), ScheduleWorker))
