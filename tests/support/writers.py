"""Threads and tasks that write through engines of this process, and what they were told of each write."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import psycopg
from sqlalchemy import Column, MetaData, String, Table, func, insert, select

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.dsn import Dsn

metadata = MetaData()
note = Table(
    "note",
    metadata,
    Column("key", String, primary_key=True, info={"shard_key": True}),
    Column("uid", String, primary_key=True),
)


@dataclass
class Told:
    """What the writers were told: uids that were acknowledged, the errors, and the longest wait for an answer."""

    acknowledged: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def add(self, uid: str, began: float, error: BaseException | None) -> None:
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        if error is None:
            self.acknowledged.append(uid)
        else:
            self.errors.append(f"{type(error).__name__}: {error}")

    def missing_on(self, dsns: Sequence[Dsn]) -> set[str]:
        """Acknowledged writes that none of these servers holds."""
        held: set[str] = set()
        for dsn in dsns:
            with psycopg.connect(dsn.conninfo(connect_timeout=5)) as conn:
                held |= {uid for (uid,) in conn.execute("SELECT uid FROM note")}
        return set(self.acknowledged) - held


@contextmanager
def writing(url: str, keys: Sequence[str], *, threads: int = 2, tasks: int = 2) -> Iterator[Told]:
    """Threads and tasks write and read a row at a time until the block ends. Errors are kept, not raised."""
    told, over = Told(), threading.Event()

    def by_thread(engine: ShardedEngine, number: int) -> None:
        turn = 0
        while not over.is_set():
            key, uid, began = keys[(turn + number) % len(keys)], uuid4().hex, time.monotonic()
            turn += 1
            try:
                with engine.session(key) as session:
                    session.execute(insert(note).values(key=key, uid=uid))
                    session.commit()
                with engine.session() as session:
                    session.scalar(select(func.count()).select_from(note).where(note.c.key == key))
            except Exception as error:  # noqa: BLE001 - what a client was told is what is looked at
                told.add(uid, began, error)
            else:
                told.add(uid, began, None)

    async def by_task(engine: AsyncShardedEngine, number: int) -> None:
        turn = 0
        while not over.is_set():
            key, uid, began = keys[(turn + number) % len(keys)], uuid4().hex, time.monotonic()
            turn += 1
            try:
                async with engine.session(key) as session:
                    await session.execute(insert(note).values(key=key, uid=uid))
                    await session.commit()
            except Exception as error:  # noqa: BLE001 - as above
                told.add(uid, began, error)
            else:
                told.add(uid, began, None)

    async def all_tasks() -> None:
        async with AsyncShardedEngine(url, pool_size=2, reroute_timeout_s=90) as engine:
            await asyncio.gather(*(by_task(engine, number) for number in range(tasks)))

    with ShardedEngine(url, pool_size=2, reroute_timeout_s=90) as engine:
        engine.create_all(metadata)
        working = [threading.Thread(target=by_thread, args=(engine, number)) for number in range(threads)]
        working.append(threading.Thread(target=lambda: asyncio.run(all_tasks())))
        for thread in working:
            thread.start()
        try:
            yield told
        finally:
            over.set()
            for thread in working:
                thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in working), "a writer hangs"
