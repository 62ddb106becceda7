"""P8: from cutover to cleanup, the old side's database refuses whoever writes a row that has moved.

`tests/integration/test_reshard_guard.py` has the forms of writes, of keys and of servers.
"""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder

pytestmark = [pytest.mark.promise("P8"), pytest.mark.timeout(240)]

KEYS = [f"key-{number}" for number in range(40)]

metadata = MetaData()
item = Table(
    "item", metadata,
    Column("key", String, primary_key=True, info={"shard_key": True}), Column("id", Integer, primary_key=True),
    Column("note", String),
)  # fmt: skip

WRITES = {
    "INSERT": "INSERT INTO item VALUES (%s, 2, 'by hand')",
    "UPDATE": "UPDATE item SET note = 'by hand' WHERE key = %s",
    "DELETE": "DELETE FROM item WHERE key = %s",
}


async def split(url: str) -> Job:
    async with Manager(url) as manager:
        return await manager.split("shard-01", targets=[{"shard_id": "shard-02"}])


async def run(url: str, job: Job, *, complete: bool = False) -> Status:
    async with Resharder(url) as resharder, asyncio.timeout(90):
        ended = await resharder.run(job.id, complete=complete)
    return ended.status


def refused(conn: psycopg.Connection[tuple[object, ...]], statement: str, key: str) -> str | None:
    """The SQLSTATE with which the database refuses a write, which is undone if it does not."""
    with conn.transaction(force_rollback=True):
        try:
            conn.execute(statement.encode(), (key,))
        except psycopg.Error as error:
            return error.sqlstate
    return None


def test_p8_somebody_without_the_library_is_refused_at_the_old_side() -> None:
    with LocalCluster(shards=2) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(metadata)
        engine.bulk_load(item, [(key, 1, None) for key in KEYS], columns=["key", "id", "note"])
        before = {key: engine.shard_for(key).name for key in KEYS}
        old_side = next(server for server in cluster.servers if server.shard == "shard-01")
        with old_side.connect(application_name="nightly import") as psql:
            here = [key for key in KEYS if before[key] == "shard-01"]
            assert [refused(psql, write, key) for write in WRITES.values() for key in here] == [None] * 3 * len(here)

            job = asyncio.run(split(cluster.url))
            assert asyncio.run(run(cluster.url, job)) is Status.VALIDATION
            engine.refresh()
            moved = [key for key in here if engine.shard_for(key).name == "shard-02"]
            stayed = [key for key in here if key not in moved]
            assert moved
            assert stayed
            for name, write in WRITES.items():
                for key in moved:
                    assert refused(psql, write, key) == "SL002", f"{name} of {key}, which has moved"
                for key in stayed:
                    assert refused(psql, write, key) is None, f"{name} of {key}, which has not"
            with pytest.raises(psycopg.Error, match="truncated"):
                psql.execute("TRUNCATE item")

            assert asyncio.run(run(cluster.url, job, complete=True)) is Status.COMPLETED
            assert refused(psql, WRITES["INSERT"], stayed[0]) is None
            left = psql.execute("SELECT count(*) FROM item WHERE key = ANY(%s)", (moved,)).fetchone()
            assert left == (0,), "the old copies are gone"
