"""A statement whose answer is lost still runs in its server: it has no effect once the runner has begun a new round."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from psycopg import AsyncConnection

from shardlib import ShardedEngine
from shardlib.catalog import Catalog, open_catalog
from shardlib.dsn import Dsn
from shardlib_ops import LocalCluster
from shardlib_ops.reshard import control
from shardlib_ops.reshard.connect import Runner, connect, is_superseded
from shardlib_ops.reshard.job import Job, Kind, legs_of
from shardlib_ops.reshard.servers import Servers
from shardlib_ops.reshard.store import JobStore
from shardlib_ops.reshard.world import Blocked, Lost, Superseded
from tests.support.models import Base

_jobs = itertools.count(701)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as running:
        with ShardedEngine(running.url) as engine:
            engine.create_all(Base.metadata)
        yield running


@pytest.fixture
def catalog(cluster: LocalCluster) -> Iterator[Catalog]:
    opened = open_catalog(cluster.url)
    yield opened
    opened.close()


@pytest.fixture
async def world(catalog: Catalog) -> AsyncIterator[Servers]:
    """A job's world on two real servers; the job is known here alone."""
    topology = catalog.load()
    first, second = topology.shards
    job = Job(next(_jobs), Kind.SPLIT, legs_of([(first.id, second.id, topology.ring.ranges_of(first.id)[:1])]))
    lease = catalog.acquire(job.lease_name, ttl_s=30.0, holder="test", wait_s=1.0)
    assert lease is not None
    made = Servers(catalog, lease, job, topology, store=JobStore(catalog))
    try:
        yield made
    finally:
        await made.close()
        lease.release()


@pytest.fixture
async def look(cluster: LocalCluster) -> AsyncIterator[AsyncConnection[tuple[object, ...]]]:
    async with await AsyncConnection.connect(cluster.servers[0].dsn, autocommit=True) as conn:
        yield conn


async def count(look: AsyncConnection[tuple[object, ...]], query: str, *params: object) -> int:
    row = await (await look.execute(query.encode(), params)).fetchone()
    assert row is not None
    assert isinstance(row[0], int)
    return row[0]


async def test_a_statement_of_a_lost_connection_is_ended_before_the_runner_goes_on(
    world: Servers, look: AsyncConnection[tuple[object, ...]]
) -> None:
    side, job = world.side("s1"), world.runner.job
    await world.anew()
    await side.claim()
    conn = await side.open("control")
    pid = conn.info.backend_pid
    await conn.execute("BEGIN")
    await conn.execute(control.claimed(world.runner))
    await conn.execute("INSERT INTO shardlib.copied VALUES (%s, 1, 'late', '0/1', 1)", (job,))
    # The rest is under way when the connection is lost, which the server does not notice while it works.
    conn.pgconn.send_query(b"SELECT pg_sleep(2); COMMIT")
    conn.pgconn.finish()
    assert await count(look, "SELECT count(*)::int FROM pg_stat_activity WHERE pid = %s", pid) == 1

    await world.anew()
    await side.claim()
    assert await count(look, "SELECT count(*)::int FROM pg_stat_activity WHERE pid = %s", pid) == 0
    await asyncio.sleep(2.2)  # until it would have committed, had it lived on
    assert await count(look, "SELECT count(*)::int FROM shardlib.copied WHERE job = %s", job) == 0


async def test_a_connection_that_ends_by_itself_while_a_claim_ends_others_is_none_that_stays(
    world: Servers, look: AsyncConnection[tuple[object, ...]]
) -> None:
    await world.anew()
    side = world.side("s1")
    await side.claim()
    old = {conn.info.backend_pid: conn for conn in [await side.open("control"), await side.open("observe")]}
    found = await look.execute("SELECT pid FROM pg_stat_activity WHERE pid = ANY(%s)", (list(old),))
    slow, ends = [pid for (pid,) in await found.fetchall() if isinstance(pid, int)]
    await world.anew()
    os.kill(slow, signal.SIGSTOP)
    try:
        claim = asyncio.create_task(side.claim())
        done, _ = await asyncio.wait([claim], timeout=0.7)
        assert not done, "it waits for the first of them"
        await old[ends].close()
        async with asyncio.timeout(40):
            while await count(look, "SELECT count(*)::int FROM pg_stat_activity WHERE pid = %s", ends):  # noqa: ASYNC110 - told by nobody
                await asyncio.sleep(0.02)
    finally:
        os.kill(slow, signal.SIGCONT)
    await claim
    await old[slow].close()


async def test_what_a_pooler_still_holds_back_is_refused_when_it_arrives(world: Servers) -> None:
    """It has another name, so nobody can end it: its token is of an earlier round."""
    await world.anew()
    side = world.side("s1")
    await side.claim()
    sent = control.claimed(world.runner).as_string()
    await world.anew()
    await side.claim()
    async with side.using() as conn:
        with pytest.raises(psycopg.Error) as refused:
            await conn.execute(sent.encode())
        assert is_superseded(refused.value)
        await conn.execute(control.claimed(world.runner))


async def test_a_claim_waits_for_a_transaction_that_it_cannot_end(
    world: Servers, look: AsyncConnection[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_CLAIM_S", 1)
    await world.anew()
    side = world.side("s1")
    await side.claim()
    await look.execute("BEGIN")  # its name is none of a job's
    await look.execute(control.claimed(world.runner))
    await world.anew()
    with pytest.raises(TimeoutError, match="a transaction of an earlier round of job"):
        await side.claim()
    claim = asyncio.create_task(side.claim())
    done, _ = await asyncio.wait([claim], timeout=0.3)
    assert not done
    await look.execute("COMMIT")
    await claim


async def test_rounds_rise_within_a_lease_and_from_lease_to_lease(world: Servers) -> None:
    runner = Runner.of_lease(7, 3)
    tokens = [runner.token]
    for _ in range(3):
        assert runner.next_round()
        tokens.append(runner.token)
    assert tokens == sorted(set(tokens))
    runner.token = Runner.of_lease(7, 4).token - 1
    assert not runner.next_round()
    assert runner.token < Runner.of_lease(7, 4).token


async def test_a_later_runner_is_not_ended_by_an_earlier_one(
    cluster: LocalCluster, world: Servers, look: AsyncConnection[tuple[object, ...]]
) -> None:
    await world.anew()
    side, job = world.side("s1"), world.runner.job
    await side.claim()
    later = Runner(job, world.runner.token + (1 << 20))
    async with await connect(
        Dsn(cluster.servers[0].dsn), shard="shard-01", application=later.application("control")
    ) as conn:
        await control.claim(conn, later)
        with pytest.raises(Lost):
            await side.claim()  # its connection was ended
        with pytest.raises(Superseded):
            await side.claim()
        await conn.execute(control.claimed(later))
    await look.execute("DELETE FROM shardlib.job WHERE id = %s", (job,))


async def test_a_comparison_waits_for_the_session_that_holds_the_slot_of_the_one_before(
    world: Servers, look: AsyncConnection[tuple[object, ...]]
) -> None:
    await world.anew()
    await world.side("s1").claim()
    leg = legs_of([("s1", "s2", world.side("s1").ranges)])[0]
    name = f"{world.link(leg).slot}_cmp"
    await look.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput', true)", (name,))
    export = world._export(leg)
    with pytest.raises(Blocked, match=name):
        async with export():
            pass
    await look.execute("SELECT pg_drop_replication_slot(%s)", (name,))
    async with export() as snapshot:
        assert snapshot.slot == name
