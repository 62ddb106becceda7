"""P3 and P6: rows move between live shards while clients write and read, and nothing is lost, doubled or misread."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from shardlib.catalog import open_catalog
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder
from tests.support.hammer import Hammer, Verdict, soak_seconds

pytestmark = [pytest.mark.promise("P3"), pytest.mark.promise("P6"), pytest.mark.fault, pytest.mark.timeout(400)]

CLIENTS = 4


def identify(cluster: LocalCluster) -> None:
    """The bag has no key: what a change tells of the old row has to be all of it."""
    for server in cluster.servers:
        with psycopg.connect(server.dsn) as conn:
            conn.execute("ALTER TABLE bag REPLICA IDENTITY FULL")


async def run_job(url: str, job: Job, *, complete: bool = False) -> Job:
    async with Resharder(url) as resharder, asyncio.timeout(180):
        return await resharder.run(job.id, complete=complete)


async def life(url: str, spare: str, told: Callable[[str], None]) -> None:
    """Split one shard, take it back, split it again, and merge what was split."""
    async with Manager(url) as manager:
        source = (await manager.list_shards())[0]
        job = await manager.split(source.name, targets=[{"name": "second", "primary_endpoint": spare}])
        rested = await run_job(url, job)
        assert rested.status is Status.VALIDATION, rested.error
        told("split")
        await manager.rollback(job.id)
        rested = await run_job(url, job)
        assert rested.status is Status.ROLLED_BACK, rested.error
        told("rolled back")
        job = await manager.split(source.name, targets=[{"shard_id": "second"}])
        rested = await run_job(url, job, complete=True)
        assert rested.status is Status.COMPLETED, rested.error
        told("split again")
        job = await manager.merge(["second"], target={"shard_id": source.name})
        rested = await run_job(url, job, complete=True)
        assert rested.status is Status.COMPLETED, rested.error
        told("merged")


def test_p3_split_rollback_split_and_merge_under_load(tmp_path: Path, rng: random.Random) -> None:
    keys = [f"key-{number}" for number in range(60)]
    seconds = soak_seconds(30)
    with LocalCluster(shards=2) as cluster:
        spare = cluster.spare("spare-1")
        hammer = Hammer(tmp_path, [cluster.url], keys, rng)
        hammer.prepare(cluster.url)
        identify(cluster)
        done: list[str] = []
        failed: list[BaseException] = []

        def moves() -> None:
            try:
                asyncio.run(life(cluster.url, spare.dsn, done.append))
            except BaseException as error:
                failed.append(error)
                raise

        thread = threading.Thread(target=moves)
        with hammer.clients(CLIENTS, seconds):
            thread.start()
            thread.join(timeout=seconds + 120)
            print(done)
        thread.join(timeout=120)
        assert not failed, failed
        assert not thread.is_alive(), "the jobs do not rest"
        assert done == ["split", "rolled back", "split again", "merged"]
        catalog = open_catalog(cluster.url)
        topology = catalog.load()
        catalog.close()
        assert topology.moves == ()
        verdict: Verdict = hammer.verdict(topology)
        print(verdict)
        assert verdict.violations == []
        assert verdict.outcomes["ok"] > 10 * seconds
        # What runs in one transaction that had begun may be told to be stale; the rest is routed anew, unseen.
        assert verdict.outcomes["failed"] <= verdict.outcomes["ok"] * 0.05, verdict
        assert verdict.outcomes["unknown"] == 0
        for server in (*cluster.servers, spare):
            with psycopg.connect(server.dsn) as conn:
                slots = conn.execute("SELECT slot_name FROM pg_replication_slots").fetchall()
                assert slots == []
                left = conn.execute(
                    "SELECT relname FROM pg_class"
                    " WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^job_[0-9]'"
                ).fetchall()
                assert left == []
