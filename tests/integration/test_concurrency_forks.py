"""Engines made before a fork work on both sides of it, and neither side can disturb the other's connections."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import select as select_
import threading
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, select, text

from shardlib import AsyncShardedEngine, ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.fence import close_gate, open_gate
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.forks import in_child
from tests.support.models import Customer
from tests.support.quiet import assert_quiet
from tests.support.topologies import await_newer


@pytest.fixture
def engine(shop: LocalCluster) -> Iterator[ShardedEngine]:
    with ShardedEngine(shop.url, pool_size=2, max_overflow=0, application_name="forks") as engine:
        yield engine


def work(engine: ShardedEngine, prefix: str, times: int = 20) -> None:
    run = uuid4().hex[:8]
    for number in range(times):
        key = f"{prefix}-{run}-{number}"
        with engine.session(key) as s:
            s.execute(insert(Customer).values(tenant_id=key, id=os.getpid(), name=prefix))
            s.commit()
        with engine.session() as s:
            assert s.scalars(select(Customer.name).where(Customer.tenant_id == key)).all() == [prefix]


def test_workers_forked_from_a_master_with_an_engine(engine: ShardedEngine, shop: LocalCluster) -> None:
    """As gunicorn does it with preload: the engine is made, and used, before the fork."""
    work(engine, "master")
    waits = [in_child(lambda n=n: work(engine, f"worker-{n}"), within_s=60) for n in range(4)]
    work(engine, "beside")
    for wait in waits:
        wait()
    work(engine, "after")
    assert_quiet(engine, shop.servers)


def test_workers_that_end_tidily_close_nothing_of_the_master(engine: ShardedEngine, shop: LocalCluster) -> None:
    """A child that disposes, collects its garbage, and ends as a normal interpreter does."""
    with engine.session("held") as held:
        pid = held.scalar(text("SELECT pg_backend_pid()"))

        def child() -> None:
            work(engine, "child")
            engine.dispose()
            gc.collect()

        in_child(child, within_s=60)()
        assert held.scalar(text("SELECT pg_backend_pid()")) == pid
        held.execute(insert(Customer).values(tenant_id="held", id=random.randrange(2**31), name="held"))
        held.commit()
    work(engine, "master")
    assert_quiet(engine, shop.servers)


def test_a_session_open_at_the_fork_is_the_parents(engine: ShardedEngine, shop: LocalCluster) -> None:
    key = f"open-{uuid4().hex[:8]}"
    session = engine.session(key)
    session.execute(insert(Customer).values(tenant_id=key, id=os.getpid(), name="open"))

    def child() -> None:
        for finish in (session.commit, session.rollback, session.close):
            try:
                finish()
            except Exception as error:  # noqa: BLE001 - any error will do, as long as nothing is sent
                print(type(error).__name__, error)
        work(engine, "child", 3)

    in_child(child, within_s=60)()
    with engine.session() as other:
        assert other.scalars(select(Customer).where(Customer.tenant_id == key)).all() == [], "the child committed"
    session.commit()
    with engine.session() as other:
        assert len(other.scalars(select(Customer).where(Customer.tenant_id == key)).all()) == 1
    session.close()
    assert_quiet(engine, shop.servers)


def test_forked_while_threads_work(engine: ShardedEngine, shop: LocalCluster) -> None:
    """The locks that other threads held at that moment are not held in the child."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def busy(number: int) -> None:
        try:
            while not stop.is_set():
                with engine.session(f"busy-{number}") as s:
                    s.scalars(select(Customer).where(Customer.tenant_id == f"busy-{number}")).all()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(12):
            in_child(lambda turn=turn: work(engine, f"turn-{turn}", 3), within_s=60)()
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failures == []
    assert_quiet(engine, shop.servers)


def test_a_forked_child_follows_the_topology(engine: ShardedEngine, shop: LocalCluster) -> None:
    work(engine, "before", 2)
    ready, told = os.pipe()
    go, gone = os.pipe()

    def child() -> None:
        work(engine, "child", 2)
        os.write(told, b"1")
        os.read(go, 1)
        work(engine, "renewed", 12)

    wait = in_child(child, within_s=60)
    assert select_.select([ready], [], [], 30)[0], "the child does not come so far"
    catalog = open_catalog(shop.url)
    topology = catalog.load()
    for shard in topology.shards:
        server = next(one for one in shop.servers if one.shard == shard.name)
        after = renew_gates(topology, shard.id, nonce=f"fork-{shard.id}")
        with server.connect() as admin:
            for number in after.gates_of(shard.id):
                open_gate(admin, number)
            catalog.publish(after, expected=topology.version)
            for number in topology.gates_of(shard.id):
                assert close_gate(admin, number, budget_s=5).closed
        topology = after
    catalog.close()
    os.write(gone, b"1")
    wait()
    work(engine, "parent", 12)
    for end in (ready, told, go, gone):
        os.close(end)
    assert_quiet(engine, shop.servers)


def test_the_watch_of_a_forked_child_lives(engine: ShardedEngine, shop: LocalCluster) -> None:
    """It hears of a new version at once. Without its watch it would at the next poll, 7 to 10 seconds later."""
    catalog = open_catalog(shop.url)
    topology = catalog.load()
    ready, told = os.pipe()

    def child() -> None:
        os.write(told, b"1")
        await_newer(engine._cache, topology.version, 5, "the watch is dead")

    wait = in_child(child)
    assert select_.select([ready], [], [], 30)[0], "the child does not come so far"
    catalog.publish(topology.evolve(nonce="for the child"), expected=topology.version)
    catalog.close()
    wait()
    for end in (ready, told):
        os.close(end)


def test_an_asyncio_engine_made_before_the_fork(shop: LocalCluster) -> None:
    engine = AsyncShardedEngine(shop.url, pool_size=2)

    async def main(prefix: str) -> None:
        async def one(number: int) -> None:
            key = f"{prefix}-{uuid4().hex[:8]}-{number}"
            async with engine.session(key) as s:
                s.add(Customer(tenant_id=key, id=os.getpid(), name=prefix))
                await s.commit()

        await asyncio.gather(*[one(number) for number in range(10)])

    asyncio.run(main("parent"))
    waits = [in_child(lambda n=n: asyncio.run(main(f"child-{n}")), within_s=60) for n in range(3)]
    asyncio.run(main("beside"))
    for wait in waits:
        wait()
    assert_quiet(engine.sync_engine, shop.servers)
    asyncio.run(engine.dispose())


def test_a_fork_inside_a_running_loop(shop: LocalCluster) -> None:
    """The child starts a loop of its own; the parent's connections stay the parent's."""
    engine = AsyncShardedEngine(shop.url, pool_size=2)

    async def answer(key: str) -> Any:
        async with engine.session(key) as s:
            return await s.scalar(text("SELECT pg_backend_pid()"))

    def child() -> None:
        asyncio.set_event_loop(None)
        asyncio._set_running_loop(None)
        assert asyncio.run(answer("in-loop"))

    async def main() -> None:
        async with engine.session("in-loop") as held:
            pid = await held.scalar(text("SELECT pg_backend_pid()"))
            wait = in_child(child, within_s=60)
            assert await held.scalar(text("SELECT pg_backend_pid()")) == pid
            await asyncio.to_thread(wait)
            assert await held.scalar(text("SELECT pg_backend_pid()")) == pid
        await engine.dispose()

    asyncio.run(main())
    eventually(lambda: engine.sync_engine._core.pools.budget.open == 0, 5)
