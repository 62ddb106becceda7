"""Two managers make a job at one moment: the later one is refused, and its record is withdrawn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from shardlib import ShardedEngine
from shardlib.errors import InvalidTopology
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status, Wish
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.reshard.store import JobStore
from tests.support.writers import metadata

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(metadata)
        yield made


class Overtaken(JobStore):
    """Somebody else is faster: their job is made just before this one is stored."""

    def __init__(self, store: JobStore, url: str, *, over: bool) -> None:
        self.__dict__.update(store.__dict__)
        self._url, self._over = url, over
        self.theirs: Job | None = None

    def create(self, job: Job) -> Job:
        self.theirs = asyncio.run(self._overtake())
        return super().create(job)

    async def _overtake(self) -> Job:
        async with Manager(self._url) as manager:
            theirs = await manager.split("shard-01", targets=[{"shard_id": "shard-02"}])
        return await run(self._url, theirs.id) if self._over else theirs


async def run(url: str, job_id: int) -> Job:
    async with Resharder(url) as resharder, asyncio.timeout(100):
        return await resharder.run(job_id, complete=True)


@pytest.fixture
async def manager(cluster: LocalCluster) -> AsyncIterator[Manager]:
    async with Manager(cluster.url) as made:
        yield made


@pytest.mark.parametrize("over", [False, True])
async def test_a_job_that_was_overtaken_is_withdrawn(manager: Manager, cluster: LocalCluster, over: bool) -> None:
    store = Overtaken(manager._jobs, cluster.url, over=over)
    manager._jobs = store
    said = "were moved meanwhile" if over else "shard 'shard-01' takes part in job"
    with pytest.raises(InvalidTopology, match=said):
        await manager.split("shard-01", targets=[{"shard_id": "shard-02"}])
    theirs = store.theirs
    assert theirs is not None
    mine = (await manager.list_jobs())[-1]
    assert (mine.id, store.wish(mine.id), store.wish(theirs.id)) == (theirs.id + 1, Wish.CANCEL, Wish.RUN)
    assert (await run(cluster.url, mine.id)).status is Status.CANCELLED
    assert (await run(cluster.url, theirs.id)).status is Status.COMPLETED
    assert (await manager.topology()).moves == ()
