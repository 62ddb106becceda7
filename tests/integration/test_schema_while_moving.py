"""The cluster's tables stay as they are while rows move: a table that came later would leave its rows behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import closing

import pytest
from sqlalchemy import Column, MetaData, String, Table

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog, publish_change
from shardlib.engine.schema import records
from shardlib.errors import UnsupportedOperation
from shardlib.topology.change import record_tables
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Status
from shardlib_ops.reshard.resharder import Resharder

pytestmark = pytest.mark.timeout(240)


def named(*names: str) -> MetaData:
    metadata = MetaData()
    for name in names:
        Table(name, metadata, Column("tenant", String, primary_key=True, info={"shard_key": True}))
    return metadata


KEY = "moving"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as running:
        with ShardedEngine(running.url) as engine:
            engine.create_all(named("known"))
        yield running


@pytest.fixture
async def engine(cluster: LocalCluster) -> AsyncIterator[ShardedEngine]:
    with ShardedEngine(cluster.url) as engine:
        yield engine


async def job_of(cluster: LocalCluster, engine: ShardedEngine) -> int:
    source = engine.shard_for(KEY).id
    async with Manager(cluster.url) as manager:
        job = await manager.move_keys([KEY], target={"shard_id": "s2" if source == "s1" else "s1"})
    return job.id


async def test_no_table_is_recorded_while_rows_move(cluster: LocalCluster, engine: ShardedEngine) -> None:
    job_id = await job_of(cluster, engine)
    async with Resharder(cluster.url) as resharder, asyncio.timeout(100):
        rested = await resharder.run(job_id)
        assert rested.status is Status.VALIDATION, rested.error
        tables = engine.refresh().tables
        with pytest.raises(UnsupportedOperation, match=f"job {job_id} is moving rows"):
            engine.register(named("known", "late"))
        for known in (engine.register, engine.create_all):
            known(named("known"))  # nothing changes: an application that starts now does so
        assert engine.refresh().tables == tables
        done = await resharder.run(job_id, complete=True)
    assert done.status is Status.COMPLETED, done.error
    engine.register(named("known", "late"))
    assert {table.name for table in engine.refresh().tables} == {"known", "late"}
    engine.drop_all(named("late"))


async def test_a_job_that_is_announced_while_tables_are_made(cluster: LocalCluster, engine: ShardedEngine) -> None:
    """What was asked before the tables were made is asked once more when they are published."""
    job_id = await job_of(cluster, engine)
    change = engine._schema_change()
    everywhere = change._everywhere

    def slowly(*given: object) -> None:
        everywhere(*given)  # type: ignore[arg-type]
        asyncio.run(moved())

    async def moved() -> None:
        async with Resharder(cluster.url) as resharder, asyncio.timeout(100):
            assert (await resharder.run(job_id)).status is Status.VALIDATION

    change._everywhere = slowly  # type: ignore[method-assign,assignment]
    with pytest.raises(UnsupportedOperation, match=f"job {job_id} is moving rows"):
        await asyncio.to_thread(change.create_all, named("slow"), app_roles=(), checkfirst=True)
    assert engine.refresh().table("slow") is None
    async with Resharder(cluster.url) as resharder, asyncio.timeout(100):
        assert (await resharder.run(job_id, complete=True)).status is Status.COMPLETED
    engine.create_all(named("slow"))
    engine.drop_all(named("slow"))


@pytest.mark.parametrize("step", ["sides_prepared", "leg_compared"], ids=["the announcement", "the switch"])
async def test_a_table_that_was_recorded_all_the_same(cluster: LocalCluster, engine: ShardedEngine, step: str) -> None:
    """Before the moves are announced, or by a client of an older release: neither is refused."""
    job_id = await job_of(cluster, engine)
    source = engine.shard_for(KEY).id

    def record() -> None:
        with closing(open_catalog(cluster.url)) as catalog:
            late = records(named("unseen"))
            publish_change(catalog, lambda now: record_tables(now, late, nonce=f"late-{job_id}"))

    async def at(name: str) -> None:
        if name == step and engine.refresh().table("unseen") is None:
            await asyncio.to_thread(record)

    try:
        async with Resharder(cluster.url, on_step=at) as resharder, asyncio.timeout(100):
            job = await resharder.run(job_id)
        assert job.status is Status.FAILED, job
        assert "'s tables changed after the job had begun (unseen)" in (job.error or "")
        topology = engine.refresh()
        assert not topology.moves
        assert engine.shard_for(KEY).id == source
    finally:
        engine.drop_all(named("unseen"))
