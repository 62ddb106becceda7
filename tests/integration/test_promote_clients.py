"""P2: clients that learn late of a promotion are refused by the old primary, wait, and go to the new one unseen."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from shardlib import ShardedEngine
from shardlib.dsn import Dsn
from shardlib.fence.connection import FencedConnection, start
from shardlib.fence.verdict import GateClosed
from shardlib.shard.pool import ShardPool
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.promote import Demoted
from tests.support.eventually import eventually
from tests.support.writers import metadata, note

pytestmark = [pytest.mark.promise("P2"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=1, replicas=1) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(metadata)
        yield made


@contextmanager
def cut_off(engine: ShardedEngine) -> Iterator[None]:
    """The engine learns of no newer topology until the block ends; then it asks."""
    cache: Any = engine._cache
    cache._accept = lambda new, seen: None
    try:
        yield
    finally:
        del cache._accept
    engine.refresh()


async def promote(cluster: LocalCluster, *, rejoin: bool = True) -> Dsn:
    """The other server becomes the primary; the old one is given back."""
    async with Manager(cluster.url) as manager:
        old = (await manager.get_shard("shard-01")).primary
        await manager.promote_replica("shard-01", rejoin=cluster.rejoin if rejoin else None)
        return old


async def bring_back(cluster: LocalCluster, old: Dsn) -> None:
    """What an operator does by hand."""
    async with Manager(cluster.url) as manager:
        new = (await manager.get_shard("shard-01")).primary
        await cluster.rejoin(Demoted("shard-01", old, new))
        shard = await manager.add_replica("shard-01", old.reveal())
        assert shard.replicas == (old,)


def write(engine: ShardedEngine, uid: str) -> None:
    with engine.session("k") as session:
        session.execute(insert(note).values(key="k", uid=uid))
        session.commit()


def count(engine: ShardedEngine, uid: str) -> int | None:
    with engine.session("k") as session:
        return session.scalar(select(func.count()).select_from(note).where(note.c.key == "k", note.c.uid == uid))


@contextmanager
def at_work(call: Any, *arguments: object) -> Iterator[list[object]]:
    """Runs a call in a thread meanwhile; its answer, or its error, is in the list at the end."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(call(*arguments))
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ended
    finally:
        thread.join(timeout=60)
    assert not thread.is_alive(), "it hangs"


@pytest.mark.parametrize("rejoined", [False, True])
@pytest.mark.parametrize("warm", [True, False])
def test_who_learns_late_goes_to_the_new_primary_unseen(cluster: LocalCluster, rejoined: bool, warm: bool) -> None:
    uid = f"late-{rejoined}-{warm}"
    with ShardedEngine(cluster.url, reroute_timeout_s=30) as engine:
        if warm:
            write(engine, f"{uid}-before")  # leaves a connection to the old primary in the pool
        with cut_off(engine):
            old = asyncio.run(promote(cluster, rejoin=rejoined))
            with at_work(write, engine, uid) as written, at_work(count, engine, "none") as counted:
                core: Any = engine._core
                eventually(lambda: len(core._waiting) == 2, within_s=40, what="they do not wait at the closed gates")
                assert (written, counted) == ([], [])
                del engine._cache._accept  # type: ignore[method-assign]
                engine.refresh()
            engine._cache._accept = None  # type: ignore[assignment,method-assign]  # for the block's end
        assert (written, counted) == ([None], [0])
        assert count(engine, uid) == 1
        assert engine.topology.shard("shard-01").primary != old
    if not rejoined:
        asyncio.run(bring_back(cluster, old))


def test_a_connection_that_was_being_opened_is_not_kept(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled, go_on = threading.Event(), threading.Event()
    dial = ShardPool._dial

    def slow(pool: ShardPool, conninfo: str) -> Any:
        connection = dial(pool, conninfo)
        if threading.current_thread().name == "slow":
            dialled.set()
            assert go_on.wait(90)
        return connection

    monkeypatch.setattr(ShardPool, "_dial", slow)
    with ShardedEngine(cluster.url, reroute_timeout_s=10) as engine:
        ended: list[object] = []

        def work() -> None:
            try:
                ended.append(write(engine, "slow"))
            except BaseException as error:  # noqa: BLE001 - looked at below
                ended.append(error)

        thread = threading.Thread(target=work, name="slow")
        thread.start()
        assert dialled.wait(20)
        before = engine.topology.version
        old = asyncio.run(promote(cluster, rejoin=False))
        eventually(lambda: engine.topology.shard("shard-01").primary != old, within_s=20)
        assert engine.topology.version > before
        go_on.set()
        thread.join(timeout=60)
        assert ended == [None], "it came to the fenced primary again and again"
    asyncio.run(bring_back(cluster, old))


def test_a_replica_lets_nobody_in_who_wants_the_primary(cluster: LocalCluster) -> None:
    with ShardedEngine(cluster.url) as engine:
        shard = engine.topology.shard("shard-01")
        gate = engine.topology.default_gate(shard.id)
        with cluster.server("shard-01-a").connect() as a, cluster.server("shard-01-b").connect() as b:
            ports = {conn.execute("SELECT pg_is_in_recovery()").fetchone()[0]: conn.info.port for conn in (a, b)}  # type: ignore[index]
        assert str(ports[False]) == shard.primary.port
        for in_recovery, dsn in ((False, shard.primary), (True, shard.replicas[0])):
            with closing(FencedConnection.connect(dsn.conninfo())) as driver:
                if in_recovery:
                    with pytest.raises(GateClosed):
                        start(driver, (gate,))
                    assert driver.info.transaction_status.name == "IDLE"
                    driver.primary_only = False  # who reads there knows it
                start(driver, (gate,))
                driver.rollback()
