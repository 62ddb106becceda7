"""A task cancelled at any of its awaits leaves no connection out or dirty, holds no gate, and hides no outcome."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import func, insert, select

from shardlib import AsyncShardedEngine
from shardlib_ops import LocalCluster
from tests.support.cancelling import CancelAt, How
from tests.support.eventually import eventually_async
from tests.support.models import Customer
from tests.support.quiet import assert_quiet, out

pytestmark = pytest.mark.timeout(180)

SUSPENSIONS_MAX = 400


class Note:
    """What one attempt did: its row ids, and how far it came."""

    def __init__(self) -> None:
        self.name = uuid4().hex
        self.committing = False
        self.committed = False


Unit = Callable[[AsyncShardedEngine, list[str], Note], Awaitable[None]]


def row(key: str, note: Note) -> dict[str, Any]:
    return {"tenant_id": key, "id": random.SystemRandom().randrange(2**31), "name": note.name}


async def pinned(engine: AsyncShardedEngine, keys: list[str], note: Note) -> None:
    async with engine.session(keys[0]) as session:
        await session.execute(insert(Customer).values(**row(keys[0], note)))
        await session.scalar(select(func.count()).select_from(Customer))
        note.committing = True
        await session.commit()
        note.committed = True


async def routed(engine: AsyncShardedEngine, keys: list[str], note: Note) -> None:
    async with engine.session() as session:
        (await session.scalars(select(Customer).limit(None))).all()
        session.add(Customer(**row(keys[1], note)))
        await session.flush()
        async with session.begin_nested():
            await session.get(Customer, (keys[1], -1))
        note.committing = True
        await session.commit()
        note.committed = True


async def twophase(engine: AsyncShardedEngine, keys: list[str], note: Note) -> None:
    async with engine.session(twophase=True) as session:
        session.add_all([Customer(**row(key, note)) for key in keys])
        note.committing = True
        await session.commit()
        note.committed = True


async def core(engine: AsyncShardedEngine, keys: list[str], note: Note) -> None:
    async with engine.connect(keys[2]) as conn:
        await conn.execute(insert(Customer.__table__).values(**row(keys[2], note)))
        note.committing = True
        await conn.commit()
        note.committed = True


async def unit_of_work(engine: AsyncShardedEngine, keys: list[str], note: Note) -> None:
    async def work(session: Any) -> None:
        session.add(Customer(**row(keys[0], note)))
        await session.flush()
        note.committing = True

    await engine.run(work, shard_key=keys[0])
    note.committed = True


@pytest.fixture
async def engine(shop: LocalCluster) -> AsyncIterator[AsyncShardedEngine]:
    engine = AsyncShardedEngine(shop.url, pool_size=2, max_overflow=0, application_name="cancelled")
    yield engine
    await engine.dispose()


@pytest.fixture
def tenants(engine: AsyncShardedEngine) -> list[str]:
    found: dict[str, str] = {}
    for number in range(1000):
        found.setdefault(engine.shard_for(f"tenant-{number}").id, f"tenant-{number}")
    return list(found.values())


def rows_named(shop: LocalCluster, name: str) -> int:
    count = 0
    for server in shop.servers:
        with psycopg.connect(server.dsn) as conn:
            found = conn.execute("SELECT count(*) FROM customer WHERE name = %s", (name,)).fetchone()
            assert found is not None
            count += found[0]
    return count


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("how", ["waiting", "waking"])
@pytest.mark.parametrize("unit", [pinned, routed, twophase, core, unit_of_work])
async def test_cancelled_at_each_await(
    engine: AsyncShardedEngine, shop: LocalCluster, tenants: list[str], unit: Unit, how: How, cold: bool
) -> None:
    await unit(engine, tenants, Note())
    whole = 3 if unit is twophase else 1
    for at in range(1, SUSPENSIONS_MAX):
        if cold:
            await asyncio.to_thread(engine.sync_engine._core.pools.dispose)
        note = Note()
        cancelling = CancelAt(unit(engine, tenants, note), at, how)  # type: ignore[arg-type]

        async def attempt(it: CancelAt = cancelling) -> None:
            await it

        task = asyncio.create_task(attempt())
        done, _ = await asyncio.wait([task], timeout=20)
        assert done, f"suspension {at}: the cancelled task does not end"
        if not cancelling.fired:
            assert task.exception() is None
            break
        assert task.cancelled(), f"suspension {at}: the cancellation was lost: {task.exception()!r}"
        await eventually_async(lambda: asyncio.to_thread(lambda: not out(engine.sync_engine)), 5, f"suspension {at}")
        await asyncio.to_thread(assert_quiet, engine.sync_engine, shop.servers)
        there = await asyncio.to_thread(rows_named, shop, note.name)
        assert there in (0, whole), f"suspension {at}: {there} of {whole} rows"
        if not note.committing:
            assert there == 0, f"suspension {at}: a row is there that nobody committed"
        if note.committed:
            assert there == whole, f"suspension {at}: a committed row is gone"
    else:
        raise AssertionError(f"more than {SUSPENSIONS_MAX} suspensions")
    assert at > 5
    await unit(engine, tenants, Note())


@pytest.mark.parametrize("unit", [pinned, routed, twophase, core])
async def test_cancelled_again_while_it_cleans_up(
    engine: AsyncShardedEngine, shop: LocalCluster, tenants: list[str], unit: Unit
) -> None:
    """A second and third cancellation meet the awaits of the cleaning up after the first."""
    whole = 3 if unit is twophase else 1
    for at in range(1, SUSPENSIONS_MAX):
        note = Note()
        cancelling = CancelAt(unit(engine, tenants, note), at, "waiting", times=3)  # type: ignore[arg-type]

        async def attempt(it: CancelAt = cancelling) -> None:
            await it

        task = asyncio.create_task(attempt())
        await asyncio.wait([task], timeout=20)
        if not cancelling.fired:
            break
        assert task.cancelled(), f"suspension {at}: {task.exception()!r}"
        await asyncio.to_thread(assert_quiet, engine.sync_engine, shop.servers)
        there = await asyncio.to_thread(rows_named, shop, note.name)
        assert there in ((0, whole) if note.committing else (0,)), f"suspension {at}: {there} rows"
    await unit(engine, tenants, Note())


async def test_a_storm_of_cancellations(
    engine: AsyncShardedEngine, shop: LocalCluster, tenants: list[str], rng: random.Random
) -> None:
    """Many tasks on few connections, cancelled at random moments, some of them twice."""
    units: list[Unit] = [pinned, routed, twophase, core, unit_of_work]
    notes = [Note() for _ in range(200)]
    tasks = [asyncio.ensure_future(rng.choice(units)(engine, tenants, note)) for note in notes]
    while any(not task.done() for task in tasks):
        for task in rng.sample(tasks, 4):
            task.cancel()
        await asyncio.sleep(rng.choice((0, 0.001, 0.01)))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    strange = [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)]
    assert strange == []
    assert sum(isinstance(r, asyncio.CancelledError) for r in results) > 20
    await asyncio.to_thread(assert_quiet, engine.sync_engine, shop.servers)
    for note in notes:
        if note.committed or not note.committing:
            there = await asyncio.to_thread(rows_named, shop, note.name)
            assert bool(there) is note.committed
    for unit in units:
        await unit(engine, tenants, Note())
