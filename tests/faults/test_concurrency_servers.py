"""Many at work while a server is dead, hung or restarted: none waits for ever, and who needs another works on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from shardlib import AsyncShardedEngine, ShardedEngine, errors
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import RetryableError
from shardlib.fence import close_gate, open_gate
from shardlib.telemetry import TelemetryOptions
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from tests.support.eventually import eventually
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.faults import Proxy
from tests.support.models import Base, Customer
from tests.support.quiet import assert_quiet, out

pytestmark = [pytest.mark.fault, pytest.mark.timeout(180)]

FACADES = [pytest.param(SyncFacade, id="sync"), pytest.param(AsyncFacade, id="asyncio")]


class World:
    """Three shards, reached through proxies, and a key of each."""

    def __init__(self, stack: ExitStack) -> None:
        self.cluster = stack.enter_context(LocalCluster(shards=3))
        self.url = self.cluster.url
        with ShardedEngine(self.url) as engine:
            engine.create_all(Base.metadata)
            by_id: dict[str, str] = {}
            for number in range(1000):
                by_id.setdefault(engine.shard_for(f"tenant-{number}").id, f"tenant-{number}")
        self.proxies = [stack.enter_context(Proxy(server.dsn)) for server in self.cluster.servers]
        catalog = open_catalog(self.url)
        before = catalog.load()
        through = {Dsn(s.dsn): Dsn(p.dsn) for s, p in zip(self.cluster.servers, self.proxies, strict=True)}
        shards = tuple(replace(shard, primary=through[shard.primary]) for shard in before.shards)
        catalog.publish(before.evolve(shards=shards, nonce="proxied"), expected=before.version)
        catalog.close()
        names = {shard.name: shard.id for shard in before.shards}
        self.keys = [by_id[names[str(server.shard)]] for server in self.cluster.servers]

    @property
    def servers(self) -> tuple[LocalServer, ...]:
        return self.cluster.servers

    def mend(self) -> None:
        for server in self.servers:
            server.resume()
            server.start()
        for proxy in self.proxies:
            proxy.heal()


@pytest.fixture(scope="module")
def module_world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


@pytest.fixture
def world(module_world: World) -> Iterator[World]:
    module_world.mend()
    yield module_world
    module_world.mend()


def asked(facade: Any, key: str) -> Any:
    return facade.session(lambda s: s.scalar(text("SELECT 1")), key)


def assert_not_held_up(took: Sequence[float]) -> None:
    """Transactions of other shards take their usual time; now and then a busy machine has something else to do.

    Whoever waited for the shard that hangs would wait for seconds each time.
    """
    late = sorted(each for each in took if each > 1.0)
    assert len(late) <= 1 + len(took) // 20, f"{len(late)} of {len(took)} took longer than a second: {late}"


# ------------------------------------------------------------------------------------------- a dead shard


@pytest.mark.parametrize("make", FACADES)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_scan_with_a_dead_shard_fails_soon_and_leaves_nothing_begun(world: World, make: Any, warm: bool) -> None:
    facade = make(world.url, pool_size=2)
    if warm:
        facade.session(lambda s: s.scalars(select(Customer)).all())
    world.servers[1].kill()
    for _ in range(5):
        began = time.monotonic()
        with pytest.raises(errors.ShardUnavailable, match=str(world.servers[1].shard)):
            facade.session(lambda s: s.scalars(select(Customer)).all())
        assert time.monotonic() - began < 10
        assert_quiet(facade.core, [world.servers[0], world.servers[2]])
    world.servers[1].start()
    assert facade.run(lambda s: s.scalars(select(Customer)).all()) == []
    assert_quiet(facade.core, world.servers)
    facade.close()


def test_threads_that_need_other_shards_are_not_held_up(world: World) -> None:
    """One shard hangs with the door open, the worst of deaths; forty threads hang on it."""
    with ShardedEngine(world.url, pool_size=2, max_overflow=2, pool_timeout_s=2, connect_timeout_s=2) as engine:
        for key in world.keys:
            with engine.session(key) as s:
                s.execute(text("SELECT 1"))
        world.proxies[0].stall()
        stop = threading.Event()
        refused: list[str] = []

        def stuck() -> None:
            while not stop.is_set():
                try:
                    with engine.session(world.keys[0]) as s:
                        s.execute(text("SELECT 1"))
                except (RetryableError, DBAPIError) as error:
                    refused.append(type(error).__name__)
                    stop.wait(0.05)

        with ThreadPoolExecutor(40) as threads:
            for _ in range(40):
                threads.submit(stuck)
            try:
                eventually(lambda: len(refused) > 20, 20, "the breaker opens, or the pool says that it is full")
                took: list[float] = []
                for turn in range(60):
                    began = time.monotonic()
                    with engine.session(world.keys[1 + turn % 2]) as s:
                        s.execute(text("SELECT 1"))
                    took.append(time.monotonic() - began)
            finally:
                stop.set()
                world.proxies[0].cut()
                world.proxies[0].heal()
        assert_not_held_up(took)
        with engine.session(world.keys[0]) as s:
            assert engine.run(lambda s: s.scalar(text("SELECT 1")), shard_key=world.keys[0]) == 1
        assert_quiet(engine, world.servers)


async def test_tasks_that_need_other_shards_are_not_held_up(world: World) -> None:
    async with AsyncShardedEngine(
        world.url, pool_size=2, max_overflow=2, pool_timeout_s=2, connect_timeout_s=2
    ) as engine:
        for key in world.keys:
            async with engine.session(key) as s:
                await s.execute(text("SELECT 1"))
        await asyncio.to_thread(world.proxies[0].stall)

        async def stuck() -> None:
            async with engine.session(world.keys[0]) as s:
                await s.execute(text("SELECT 1"))

        tasks = [asyncio.ensure_future(stuck()) for _ in range(100)]
        took: list[float] = []
        for turn in range(100):
            began = time.monotonic()
            async with engine.session(world.keys[1 + turn % 2]) as s:
                await s.execute(text("SELECT 1"))
            took.append(time.monotonic() - began)
            await asyncio.sleep(0.02)
        assert_not_held_up(took)
        for task in tasks:
            task.cancel()
        began = time.monotonic()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - began < 30, "cancellation is delivered although the server does not answer"
        assert all(isinstance(r, asyncio.CancelledError | RetryableError | DBAPIError) for r in results)
        await asyncio.to_thread(world.proxies[0].cut)
        await asyncio.to_thread(world.proxies[0].heal)
        await asyncio.to_thread(eventually, lambda: not out(engine.sync_engine), 30)
        await engine.run(lambda s: s.execute(text("SELECT 1")), shard_key=world.keys[0])
        await asyncio.to_thread(assert_quiet, engine.sync_engine, world.servers)


# --------------------------------------------------------------------------------------------- half open


@pytest.mark.parametrize("what", ["begin", "statement", "scan", "commit"])
async def test_a_deadline_is_kept_while_a_server_does_not_answer(world: World, what: str) -> None:
    """Also the connection is not used again: its answers would come late, to somebody else."""
    async with AsyncShardedEngine(world.url, pool_size=1, max_overflow=0, connect_timeout_s=2) as engine:
        key = world.keys[2]
        proxy = world.proxies[2]
        async with engine.session() as s:
            await s.scalars(select(Customer))

        async def work() -> None:
            async with asyncio.timeout(1.0):
                if what == "begin":
                    await asyncio.to_thread(proxy.stall)
                    async with engine.session(key) as s:
                        await s.execute(text("SELECT 1"))
                elif what == "scan":
                    await asyncio.to_thread(proxy.stall)
                    async with engine.session() as s:
                        await s.scalars(select(Customer))
                else:
                    async with engine.session(key) as s:
                        s.add(Customer(tenant_id=key, id=1, name=what))
                        await s.flush()
                        await asyncio.to_thread(proxy.stall)
                        if what == "statement":
                            await s.execute(text("SELECT 1"))
                        await s.commit()

        began = time.monotonic()
        try:
            # What became of a COMMIT cannot be told from a deadline: then the deadline is not what is reported.
            with pytest.raises(errors.CommitOutcomeUnknown if what == "commit" else TimeoutError):
                await work()
            # A COMMIT is waited for longer: its outcome matters more than the deadline.
            assert time.monotonic() - began < (60 if what == "commit" else 25)
            await asyncio.to_thread(eventually, lambda: not out(engine.sync_engine), 30)
        finally:
            await asyncio.to_thread(proxy.cut)
            await asyncio.to_thread(proxy.heal)
        async with engine.session(key) as s:
            for number in range(20):
                assert await s.scalar(text(f"SELECT {number}")) == number
        await asyncio.to_thread(assert_quiet, engine.sync_engine, world.servers, 15.0)


# ----------------------------------------------------------------------------------------------- restarts


@pytest.mark.parametrize("make", FACADES)
def test_restarted_while_sessions_are_idle(world: World, make: Any) -> None:
    """Idle outside a transaction: nobody notices. Idle inside one: an error that says so, and then it goes on."""
    facade = make(world.url, pool_size=3)
    key = world.keys[0]

    def inside(s: Any) -> None:
        s.execute(text("SELECT 1"))
        s.commit()
        world.servers[0].stop()
        world.servers[0].start()
        assert s.scalar(text("SELECT 2")) == 2
        world.servers[0].kill()
        world.servers[0].start()
        with pytest.raises(DBAPIError) as caught:
            s.scalar(text("SELECT 3"))
        assert caught.value.connection_invalidated
        with pytest.raises(SQLAlchemyError):
            s.scalar(text("SELECT 4"))
        s.rollback()
        assert s.scalar(text("SELECT 5")) == 5

    facade.session(inside, key)
    assert_quiet(facade.core, world.servers)
    facade.close()


@pytest.mark.parametrize("make", FACADES)
def test_a_core_connection_survives_that_its_shard_was_away(world: World, make: Any) -> None:
    facade = make(world.url, pool_size=1, breaker_wait_s_max=0.3)
    key = world.keys[1]

    def body(conn: Any) -> None:
        assert conn.execute(text("SELECT 1")).scalar_one() == 1
        conn.commit()
        world.servers[1].kill()
        for _ in range(3):
            with pytest.raises(errors.ShardUnavailable):
                conn.execute(text("SELECT 2"))
            conn.rollback()
        world.servers[1].start()

        def works() -> bool:
            return bool(conn.execute(text("SELECT 3")).scalar_one() == 3)

        eventually(works, 30, ignore=errors.ShardUnavailable)
        conn.rollback()

    facade.connect(body, key)
    assert_quiet(facade.core, world.servers)
    facade.close()


# ------------------------------------------------------------------------------------ routed anew, in crowds


async def test_a_crowd_that_waits_for_a_topology_keeps_its_time_limit(world: World) -> None:
    """The gate of a shard is closed and the catalog hangs: each of 100 tasks is told in time, the others work on."""
    async with AsyncShardedEngine(world.url, pool_size=4, reroute_timeout_s=3) as engine:
        key = world.keys[0]
        place = engine.sync_engine.topology.place(engine.token(key))
        catalog = open_catalog(world.url)
        await asyncio.to_thread(world.cluster.etcd[0].pause)
        try:
            with world.servers[0].connect() as admin:
                assert close_gate(admin, place.gate, budget_s=5).closed
            took: list[float] = []
            beside: list[float] = []

            async def one() -> None:
                began = time.monotonic()
                with pytest.raises(errors.StaleTopology):
                    async with engine.session(key) as s:
                        await s.execute(text("SELECT 1"))
                took.append(time.monotonic() - began)

            tasks = [asyncio.ensure_future(one()) for _ in range(100)]
            while not all(task.done() for task in tasks):
                began = time.monotonic()
                async with engine.session(world.keys[1]) as s:
                    await s.execute(text("SELECT 1"))
                beside.append(time.monotonic() - began)
                await asyncio.sleep(0.05)
            await asyncio.gather(*tasks)
        finally:
            await asyncio.to_thread(world.cluster.etcd[0].resume)
            with world.servers[0].connect() as admin:
                await asyncio.to_thread(renew, catalog, admin, place.shard.id)
            catalog.close()
        assert_not_held_up(beside)
        assert max(took) < 3 + 10, f"limit 3 s, the slowest took {max(took):.1f} s"
        async with engine.session(key) as s:
            await s.execute(text("SELECT 1"))


def renew(catalog: Any, admin: psycopg.Connection[Any], shard_id: str) -> None:
    before = eventually(catalog.load, 30, ignore=errors.CatalogUnavailable)
    after = renew_gates(before, shard_id, nonce="renewed")
    for number in after.gates_of(shard_id):
        open_gate(admin, number)
    catalog.publish(after, expected=before.version)


def refusals(engine: ShardedEngine) -> int:
    """Transactions of this engine that a closed gate has refused as they began."""
    lines = [line for line in engine.metrics().splitlines() if line.startswith("shard_router_fence_refusals_total{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


def test_a_crowd_of_threads_passes_a_closed_gate_unseen(world: World) -> None:
    """The gates are closed before a topology names others: the crowd meets them, and no session is told."""
    telemetry = TelemetryOptions(metrics=True)
    with ShardedEngine(world.url, pool_size=3, max_overflow=3, telemetry=telemetry) as engine:
        key = world.keys[2]
        shard_id = engine.topology.place(engine.token(key)).shard.id
        catalog = open_catalog(world.url)
        stop = threading.Event()
        done: list[int] = []

        def work() -> None:
            while not stop.is_set():
                with engine.session(key) as s:
                    s.execute(select(func.count()).select_from(Customer).where(Customer.tenant_id == key))
                    s.commit()
                done.append(1)

        with world.servers[2].connect() as admin, ThreadPoolExecutor(30) as threads:
            futures = [threads.submit(work) for _ in range(30)]

            def reached(condition: Callable[[], bool], what: str) -> None:
                """Wait for it, unless a worker has ended, which then tells why below."""
                eventually(lambda: condition() or any(f.done() for f in futures), 40, what)

            try:
                for _ in range(10):
                    before = catalog.load()
                    after = renew_gates(before, shard_id, nonce=uuid4().hex)
                    for number in after.gates_of(shard_id):
                        open_gate(admin, number)
                    refused = refusals(engine)
                    for number in before.gates_of(shard_id):
                        assert close_gate(admin, number, budget_s=5).closed, "a crowd holds up who closes its gate"
                    reached(lambda refused=refused: refusals(engine) > refused, "the crowd meets the closed gate")
                    catalog.publish(after, expected=before.version)
                    target = len(done) + 60
                    reached(lambda target=target: len(done) > target, "the crowd works on")
            finally:
                stop.set()
            for future in futures:
                future.result(40)
        catalog.close()
        assert len(done) >= 600
        assert_quiet(engine, world.servers)
