"""P3: what was acknowledged is there once, whatever is killed while rows move between live shards.

`tests/faults/test_reshard_under_load.py` and `test_soak.py` show the same for longer, with client processes.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, update
from sqlalchemy.exc import DBAPIError

from shardlib import ShardedEngine, ShardedSession
from shardlib.errors import CommitOutcomeUnknown, RetryableError
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Status
from shardlib_ops.reshard.resharder import Resharder
from tests.support.eventually import eventually
from tests.support.job_runner import run_and_die

pytestmark = [pytest.mark.promise("P3"), pytest.mark.fault, pytest.mark.timeout(420)]

KEYS = [f"key-{number}" for number in range(40)]
WRITERS = 4

metadata = MetaData()
receipt = Table(
    "receipt", metadata,
    Column("key", String, primary_key=True, info={"shard_key": True}), Column("uid", String, primary_key=True),
)  # fmt: skip
total = Table(
    "total", metadata,
    Column("key", String, primary_key=True, info={"shard_key": True}), Column("count", Integer, nullable=False),
)  # fmt: skip


class Writers:
    """Threads that write a receipt and count it, in one unit of work, and keep what they were told."""

    def __init__(self, engine: ShardedEngine) -> None:
        self._engine, self._stop = engine, threading.Event()
        self.told: dict[str, set[str]] = {"done": set(), "unknown": set(), "refused": set()}

    def work(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            key, uid = rng.choice(KEYS), uuid4().hex

            def unit(session: ShardedSession, key: str = key, uid: str = uid) -> None:
                session.execute(insert(receipt).values(key=key, uid=uid))
                session.execute(update(total).where(total.c.key == key).values(count=total.c.count + 1))

            try:
                self._engine.run(unit, shard_key=key)
            except CommitOutcomeUnknown:
                self.told["unknown"].add(uid)
            except (RetryableError, DBAPIError):
                self.told["refused"].add(uid)
            else:
                self.told["done"].add(uid)

    def stop(self) -> None:
        self._stop.set()

    def work_on(self) -> None:
        """Wait until they have done some more."""
        enough = len(self.told["done"]) + 100
        eventually(lambda: len(self.told["done"]) > enough, 60, "the writers work on")


async def run(url: str, job: int) -> None:
    async with Resharder(url, lease_ttl_s=2.0) as resharder, asyncio.timeout(150):
        ended = await resharder.run(job, complete=True)
    assert ended.status is Status.COMPLETED, ended.error


async def split(url: str) -> int:
    async with Manager(url) as manager:
        return (await manager.split("shard-01", targets=[{"shard_id": "shard-02"}])).id


def test_p3_killed_runner_and_killed_server_while_rows_move(rng: random.Random) -> None:
    with LocalCluster(shards=2) as cluster, ShardedEngine(cluster.url, reroute_timeout_s=20) as engine:
        engine.create_all(metadata)
        for key in KEYS:
            with engine.session(key) as session:
                session.execute(insert(total).values(key=key, count=0))
                session.commit()
        before = {key: engine.shard_for(key).id for key in KEYS}
        writers = Writers(engine)
        with ThreadPoolExecutor(WRITERS + 1) as threads:
            futures = [threads.submit(writers.work, random.Random(rng.random())) for _ in range(WRITERS)]
            try:
                writers.work_on()
                job = asyncio.run(split(cluster.url))
                run_and_die(cluster.url, job, rng.choice(["leg_copied", "gates_closed", "switched"]))
                taken_over = threads.submit(asyncio.run, run(cluster.url, job))
                for _ in range(3):
                    victim = rng.choice(cluster.servers)
                    victim.kill()
                    victim.start()
                    writers.work_on()
                taken_over.result(180)
                writers.work_on()
            finally:
                writers.stop()
            for future in futures:
                future.result(60)
        engine.refresh()
        moved = [key for key in KEYS if engine.shard_for(key).id != before[key]]
        assert moved, "a split that moves nothing shows nothing"

        receipts: Counter[str] = Counter()
        per_key: Counter[str] = Counter()
        counted: Counter[str] = Counter()
        for server in cluster.servers:
            with server.connect() as conn:
                for key, uid in conn.execute("SELECT key, uid FROM receipt"):
                    receipts[uid] += 1
                    per_key[key] += 1
                    assert engine.shard_for(key).name == server.shard, f"a row of {key} where the key does not live"
                counted.update(dict(conn.execute("SELECT key, count FROM total").fetchall()))
        print({what: len(uids) for what, uids in writers.told.items()}, f"{len(moved)} keys moved")
        assert set(receipts.values()) == {1}, "a row is there twice"
        assert writers.told["done"] - receipts.keys() == set(), "an acknowledged write is lost"
        assert writers.told["refused"] & receipts.keys() == set(), "a write that was refused is there"
        assert receipts.keys() <= writers.told["done"] | writers.told["unknown"]
        assert counted == per_key, "a unit of work was applied in part, or twice"
