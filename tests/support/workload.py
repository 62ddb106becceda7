"""A client process of the fault tests: writes and strong reads through a sharded engine, and what it was told of each.

Run as ``python -m tests.support.workload`` with a JSON object of `Settings` as its only argument. It writes one JSON
line an operation to `out`, and ends by itself, or when it is told to (`end_of`).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from sqlalchemy import BigInteger, Column, MetaData, String, Table, insert, select, update
from sqlalchemy.exc import DBAPIError

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.dsn import Dsn
from shardlib.errors import CommitOutcomeUnknown, RetryableError
from tests.support.history import Read, Write

metadata = MetaData()
KEY: dict[str, Any] = {"info": {"shard_key": True}}
bag = Table("bag", metadata, Column("key", String, nullable=False, **KEY), Column("uid", String, nullable=False))
counter = Table(
    "counter", metadata, Column("key", String, primary_key=True, **KEY), Column("v", BigInteger, nullable=False)
)
register = Table(
    "register", metadata, Column("key", String, primary_key=True, **KEY), Column("v", BigInteger, nullable=False)
)


@dataclass(frozen=True)
class Settings:
    """One client: it alone raises the registers of the keys in `own`; it reads and writes all of `keys`."""

    url: str
    out: str
    seed: str
    seconds: float
    own: list[str]
    keys: list[str]
    facade: str = "sync"
    threads: int = 2
    pgbouncer: bool = False
    endpoints: dict[str, str] = field(default_factory=dict)
    """Shard id -> DSN to use instead of the primary's own: a proxy or a pooler in front of it."""
    isolation: str | None = None
    plant: str | None = None
    """A fault to put in on purpose, to show that the checks see it: `no gate`."""


def end_of(out: str | Path) -> Path:
    """The file that ends the client with this output, when it is there, before its time is over."""
    return Path(out).with_suffix(".end")


class Recorder:
    """Writes events as they end; thread-safe."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._lock = out, threading.Lock()

    def add(self, event: Any) -> None:
        """Write down an event, which is a dataclass."""
        line = json.dumps({"kind": type(event).__name__, **asdict(event)})
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()


class Client:
    """The operations, as plain functions of a session: the same for both facades."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._values = dict.fromkeys(settings.own, 0)

    def next_value(self, key: str) -> int | None:
        if key not in self._values:
            return None
        self._values[key] += 1
        return self._values[key]

    @staticmethod
    def write(session: Any, key: str, uid: str, value: int | None, pause_s: float) -> None:
        session.execute(insert(bag).values(key=key, uid=uid))
        if pause_s:
            time.sleep(pause_s)
        done = session.execute(update(counter).where(counter.c.key == key).values(v=counter.c.v + 1))
        if done.rowcount != 1:
            raise MissingRowError(key)
        if value is not None:
            session.execute(update(register).where(register.c.key == key).values(v=value))

    @staticmethod
    def read(session: Any, key: str) -> int | None:
        found: int | None = session.scalar(select(register.c.v).where(register.c.key == key))
        return found

    @staticmethod
    def scan(session: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for key, value in session.execute(select(register.c.key, register.c.v)):
            found.setdefault(key, []).append(value)
        return found


TWO_PHASE = "two-phase"
"""In the place of a pinned key: a transaction that may write on several shards."""


class MissingRowError(AssertionError):
    """A row that every key has was not there: the statement ran where the key does not live."""


def outcome_of(error: BaseException) -> str:
    """What the client was told: a COMMIT without an answer is unknown, everything else certainly left nothing."""
    return "unknown" if isinstance(error, CommitOutcomeUnknown) else "failed"


EXPECTED = (RetryableError, CommitOutcomeUnknown, DBAPIError)


class Worker:
    """One thread or task of a client."""

    def __init__(self, client: Client, recorder: Recorder, seed: str, own: list[str]) -> None:
        self.client, self.recorder, self.own = client, recorder, own
        self.random = random.Random(seed)
        self.until = time.monotonic() + client.settings.seconds
        self.end = end_of(client.settings.out)

    def plan(self) -> tuple[str, str, bool, float]:
        pick = self.random.random()
        others = [key for key in self.client.settings.keys if key not in self.client.settings.own]
        key = self.random.choice(self.own) if pick < 0.4 or not others else self.random.choice(others)
        what = "write" if pick < 0.6 else ("scan" if pick > 0.97 else "read")
        pause_s = self.random.choice((0.0, 0.0, 0.0, 0.002, 0.01))
        return what, key, self.random.random() < 0.5, pause_s

    def steps(self) -> Any:
        """Generator of (pinned key or None, session -> answer): a facade runs each and sends the result back."""
        while self.going():
            yield from self.one()

    def going(self) -> bool:
        """Whether there is time for one more."""
        return time.monotonic() < self.until and not self.end.exists()

    def one(self) -> Any:
        """One operation, as a part of `steps`."""
        what, key, pinned, pause_s = self.plan()
        pin = key if pinned else None
        if what == "write":
            uid, value = uuid4().hex, self.client.next_value(key)
            began = time.monotonic()

            def write(s: Any, key: str = key, uid: str = uid, value: int | None = value, p: float = pause_s) -> None:
                self.client.write(s, key, uid, value, p)

            error = (yield pin, write, True)[1]
            ended = time.monotonic()
            outcome = "ok" if error is None else outcome_of(error)
            if isinstance(error, MissingRowError):
                self.recorder.add(Read(key, None, began, ended, "update"))
            self.recorder.add(Write(key, uid, value, began, ended, outcome, _short(error)))  # type: ignore[arg-type]
        elif what == "read":
            began = time.monotonic()
            value, error = yield pin, lambda s, key=key: self.client.read(s, key), False
            if error is None:
                self.recorder.add(Read(key, value, began, time.monotonic(), "pinned" if pinned else "inferred"))
        else:
            began = time.monotonic()
            found, error = yield None, self.client.scan, False
            if error is None:
                ended = time.monotonic()
                for key in self.client.settings.keys:
                    values = found.get(key, [])
                    self.recorder.add(Read(key, values[0] if len(values) == 1 else None, began, ended, "scan"))


def _short(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"[:300]


def run_sync(settings: Settings, recorder: Recorder, work: type[Worker] = Worker) -> None:
    client = Client(settings)
    failures: list[BaseException] = []
    with ShardedEngine(settings.url, pool_size=3, reroute_timeout_s=10, pgbouncer=settings.pgbouncer) as engine:

        def body(number: int) -> None:
            own = settings.own[number :: settings.threads]
            worker = work(client, recorder, f"{settings.seed}:{number}", own or settings.own[:1])
            steps = worker.steps()
            answer: Any = None
            try:
                while True:
                    answer = _one_sync(engine, settings, *steps.send(answer))
            except StopIteration:
                pass
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=body, args=(number,)) for number in range(settings.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _session(engine: Any, pin: str | None) -> Any:
    if pin is None:
        return engine.session()
    return engine.session(twophase=True) if pin is TWO_PHASE else engine.session(pin)


def _one_sync(
    engine: ShardedEngine, settings: Settings, pin: str | None, work: Callable[[Any], Any], commits: bool
) -> Any:
    try:
        with _session(engine, pin) as session:
            if settings.isolation and pin not in (None, TWO_PHASE):
                session.connection(execution_options={"isolation_level": settings.isolation})
            answer = work(session)
            if commits:
                session.commit()
            return answer, None
    except (*EXPECTED, MissingRowError) as error:
        return None, error


async def run_async(settings: Settings, recorder: Recorder, work: type[Worker] = Worker) -> None:
    client = Client(settings)
    async with AsyncShardedEngine(
        settings.url, pool_size=3, reroute_timeout_s=10, pgbouncer=settings.pgbouncer
    ) as engine:

        async def body(number: int) -> None:
            own = settings.own[number :: settings.threads]
            worker = work(client, recorder, f"{settings.seed}:{number}", own or settings.own[:1])
            steps = worker.steps()
            answer: Any = None
            try:
                while True:
                    answer = await one(*steps.send(answer))
            except StopIteration:
                pass

        async def one(pin: str | None, work: Callable[[Any], Any], commits: bool) -> Any:
            try:
                async with _session(engine, pin) as session:
                    answer = await session.run_sync(work)
                    if commits:
                        await session.commit()
                    return answer, None
            except (*EXPECTED, MissingRowError) as error:
                return None, error

        await asyncio.gather(*[body(number) for number in range(settings.threads)])


def plant(name: str | None) -> None:
    """Break the library on purpose."""
    if name == "no gate":
        from shardlib.fence import gated

        gated.lock_sql = lambda gates: b"SELECT 1"
    elif name is not None:
        raise ValueError(name)


def go_through(endpoints: dict[str, str]) -> None:
    """Reach the shards by other addresses than those that the topology names."""
    direct = ShardedEngine._endpoint_of

    def endpoint_of(engine: ShardedEngine, shard_id: str, role: str) -> Dsn:
        other = endpoints.get(shard_id)
        return Dsn(other) if other is not None else direct(engine, shard_id, role)

    ShardedEngine._endpoint_of = endpoint_of  # type: ignore[method-assign]


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    plant(settings.plant)
    go_through(settings.endpoints)
    with Path(settings.out).open("w", encoding="utf-8") as out:
        if settings.facade == "sync":
            run_sync(settings, Recorder(out))
        else:
            asyncio.run(run_async(settings, Recorder(out)))


if __name__ == "__main__":
    main()
