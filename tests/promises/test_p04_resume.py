"""P4: a job goes on from its last checkpoint after its runner was killed, in another process.

`tests/faults/test_reshard_kill_matrix.py` kills the runner at each of its steps, under load.
"""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Status
from shardlib_ops.reshard.resharder import Resharder
from tests.support.job_runner import run_and_die

pytestmark = [pytest.mark.promise("P4"), pytest.mark.fault, pytest.mark.timeout(300)]

KEYS = [f"key-{number}" for number in range(60)]

metadata = MetaData()
item = Table(
    "item", metadata,
    Column("key", String, primary_key=True, info={"shard_key": True}), Column("id", Integer, primary_key=True),
)  # fmt: skip


async def split(url: str) -> int:
    async with Manager(url) as manager:
        return (await manager.split("shard-01", targets=[{"shard_id": "shard-02"}])).id


async def run(url: str, job: int, *, complete: bool) -> Status:
    async with Resharder(url, lease_ttl_s=2.0) as resharder, asyncio.timeout(90):
        ended = await resharder.run(job, complete=complete)
    assert ended.error is None or ended.status is Status.COMPLETED, ended.error
    return ended.status


def asked(dsn: str, query: str) -> list[Any]:
    with psycopg.connect(dsn) as conn:
        return conn.execute(query.encode()).fetchall()


def test_p4_a_job_goes_on_from_its_checkpoint_in_another_process() -> None:
    with LocalCluster(shards=2) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(metadata)
        engine.bulk_load(item, [(key, number) for key in KEYS for number in range(50)], columns=["key", "id"])
        by_name = {server.shard: str(server.dsn) for server in cluster.servers}
        target = by_name["shard-02"]
        before = {key: engine.shard_for(key).name for key in KEYS}

        job = asyncio.run(split(cluster.url))
        run_and_die(cluster.url, job, "leg_copied")
        checkpoint = asked(target, f"SELECT table_name, lsn, rows FROM shardlib.copied WHERE job = {job}")
        assert checkpoint, "the copy was written down before the kill"
        xmin = "SELECT key, id, xmin::text FROM item ORDER BY 1, 2"
        rows = asked(target, xmin)
        with engine.session() as session:  # a change that the next runner has to bring along
            session.execute(insert(item).values(key=KEYS[0], id=1_000))
            session.commit()

        run_and_die(cluster.url, job, "switched")
        after_kills = asked(target, f"SELECT table_name, lsn, rows FROM shardlib.copied WHERE job = {job}")
        assert after_kills == checkpoint, "it was not copied a second time"
        kept = set(rows) & set(asked(target, xmin))
        assert len(kept) == len(rows), "no row that was copied is written again"
        assert asyncio.run(run(cluster.url, job, complete=False)) is Status.VALIDATION
        run_and_die(cluster.url, job, "slots_dropped", complete=True)
        assert asyncio.run(run(cluster.url, job, complete=True)) is Status.COMPLETED

        engine.refresh()
        owner = {key: engine.shard_for(key).name for key in KEYS}
        assert {key for key in KEYS if owner[key] != before[key]}, "a split that moves nothing shows nothing"
        expected = {(key, number) for key in KEYS for number in range(50)} | {(KEYS[0], 1_000)}
        for name, dsn in by_name.items():
            found = asked(dsn, "SELECT key, id FROM item")
            assert sorted(found) == sorted(pair for pair in expected if owner[pair[0]] == name)
            assert asked(dsn, "SELECT slot_name FROM pg_replication_slots") == []
            assert asked(dsn, "SELECT job FROM shardlib.copied") == []
