"""A job's record never goes back, also when the task that stores it is cancelled as it is stored."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from shardlib.catalog import Catalog, Lease, open_catalog
from shardlib_ops.reshard.job import Job, Kind, Status, legs_of
from shardlib_ops.reshard.servers import Servers
from shardlib_ops.reshard.store import JobStore
from tests.support.topologies import make_topology


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    with closing(open_catalog("memory://a-record-never-goes-back")) as made:
        yield made


class Slow(JobStore):
    """The first record that is saved arrives when `arrives` is set."""

    def __init__(self, catalog: Catalog) -> None:
        super().__init__(catalog)
        self.sent, self.arrives, self.arrived = threading.Event(), threading.Event(), threading.Event()

    def save(self, job: Job, lease: Lease) -> None:
        first = not self.sent.is_set()
        self.sent.set()
        if first:
            assert self.arrives.wait(20)
        super().save(job, lease)
        if first:
            self.arrived.set()


async def test_what_a_cancelled_task_has_sent_does_not_overwrite_what_follows(catalog: Catalog) -> None:
    topology = make_topology(2)
    catalog.publish(topology, expected=None)
    source, target = topology.shards
    legs = legs_of([(source.id, target.id, topology.ring.ranges_of(source.id))])
    store = Slow(catalog)
    job = store.create(Job(0, Kind.SPLIT, legs, status=Status.VALIDATION))
    lease = catalog.acquire(job.lease_name, ttl_s=30.0, holder="test", wait_s=1.0)
    assert lease is not None
    world = Servers(catalog, lease, job, topology, store=store)
    noting = asyncio.create_task(world.save(job.changed(error="it waits")))
    assert await asyncio.to_thread(store.sent.wait, 20)
    asyncio.get_running_loop().call_later(0.3, store.arrives.set)
    noting.cancel()
    await asyncio.wait([noting], timeout=20)
    assert noting.cancelled()
    await world.save(job.to(Status.CLEANUP, outcome=Status.COMPLETED, purging=True))
    assert await asyncio.to_thread(store.arrived.wait, 20)
    found = store.load(job.id)
    assert (found.status, found.purging) == (Status.CLEANUP, True)
