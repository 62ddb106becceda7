"""Somebody else is faster while a shard or a job is made: one of the two is refused, and no job stays for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from shardlib import ShardedEngine
from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.topology import Shard
from shardlib_ops import LocalCluster
from shardlib_ops.manager import shards
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.reshard.store import JobStore
from tests.support.writers import metadata

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(metadata)
        yield made


@pytest.fixture
async def manager(cluster: LocalCluster) -> AsyncIterator[Manager]:
    async with Manager(cluster.url) as made:
        yield made


def database(cluster: LocalCluster, name: str) -> str:
    """An empty database on the first shard's server."""
    with cluster.servers[0].connect() as conn:
        conn.execute(f"CREATE DATABASE {name}".encode())
    return make_conninfo(cluster.servers[0].dsn, dbname=name)


def overtaken(monkeypatch: pytest.MonkeyPatch, theirs: Callable[[], Any]) -> None:
    """The next shard's database is prepared, and then somebody else publishes first."""
    prepare, left = shards.prepare_shard, [theirs]

    def prepared(*args: Any, **more: Any) -> None:
        prepare(*args, **more)
        if left:
            left.pop()()

    monkeypatch.setattr(shards, "prepare_shard", prepared)


async def test_two_shards_are_made_at_one_moment(
    manager: Manager, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = database(cluster, "one"), database(cluster, "two")

    def theirs() -> None:
        with Manager.sync(cluster.url) as other:
            other.create_shard("two", primary_endpoint=two)

    overtaken(monkeypatch, theirs)
    made = await manager.create_shard("one", primary_endpoint=one)
    assert [(shard.id, shard.name) for shard in await manager.list_shards()][2:] == [("s3", "two"), ("s4", "one")]
    assert made.id == "s4"


async def test_a_database_that_is_a_shard_by_another_name_is_not_taken(manager: Manager, cluster: LocalCluster) -> None:
    await manager.create_shard("one", primary_endpoint=database(cluster, "one"))
    server = cluster.servers[0]
    alias = make_conninfo(server.dsn, dbname="one", host="localhost")
    assert alias != make_conninfo(server.dsn, dbname="one")
    with pytest.raises(InvalidArgument, match="this database is that shard already"):
        await manager.create_shard("again", primary_endpoint=alias)
    assert len(await manager.list_shards()) == 3


async def test_a_job_for_two_new_shards_of_which_the_first_got_another_number(
    manager: Manager, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, left = manager.create_shard, ["other"]

    async def overtaken_create(name: str, **more: Any) -> Shard:
        if left:
            async with Manager(cluster.url) as other:
                await other.create_shard(left.pop(), primary_endpoint=database(cluster, "other"))
        return await create(name, **more)

    monkeypatch.setattr(manager, "create_shard", overtaken_create)
    targets = [{"name": name, "primary_endpoint": database(cluster, name)} for name in ("one", "two")]
    job = await manager.split("shard-01", targets=targets)
    topology = await manager.topology()
    assert job.targets == (topology.shard("one").id, topology.shard("two").id)


class Deleted(JobStore):
    """The target is taken out of the cluster just before the job is stored."""

    def __init__(self, store: JobStore, url: str) -> None:
        self.__dict__.update(store.__dict__)
        self._url = url

    def create(self, job: Job) -> Job:
        with Manager.sync(self._url) as other:
            other.delete_shard("one")
        return super().create(job)


async def test_a_job_whose_target_was_taken_out_of_the_cluster_ends(manager: Manager, cluster: LocalCluster) -> None:
    await manager.create_shard("one", primary_endpoint=database(cluster, "one"))
    store = manager._jobs
    manager._jobs = Deleted(store, cluster.url)
    with pytest.raises(InvalidTopology, match="there is no shard 's3'"):
        await manager.split("shard-01", targets=[{"shard_id": "one"}])
    manager._jobs = store
    job = (await manager.list_jobs())[-1]
    async with Resharder(cluster.url) as resharder, asyncio.timeout(20):
        job = await resharder.run(job.id)
    assert job.status is Status.CANCELLED
    # And it is in nobody's way.
    await manager.split("shard-01", targets=[{"shard_id": "shard-02"}])
