"""Shards that a transaction could not take quite: their commit keeps all or nothing, and tells which."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import psycopg
import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from shardlib import AsyncShardedEngine, errors
from shardlib_ops import LocalCluster
from tests.support.cancelling import CancelAt, How
from tests.support.models import Customer, Order
from tests.support.shop import one_key_a_shard


def kept(shop: LocalCluster) -> int:
    count = 0
    for server in shop.servers:
        with psycopg.connect(server.dsn) as conn:
            found = conn.execute("SELECT count(*) FROM orders").fetchone()
            count += 0 if found is None else found[0]
    return count


def shard_ids(facade: Any, keys: list[str]) -> list[str]:
    return [facade.core.shard_for(key).id for key in keys]


def dies_as_it_begins(facade: Any, session: Any, shard_id: str) -> list[str]:
    """The connection to this shard is lost once, before anything is sent on it; where it was."""
    died: list[str] = []

    @event.listens_for(session, "after_begin")
    def after_begin(_session: Any, _transaction: Any, conn: Any) -> None:
        if conn.shard_id == shard_id and not died:
            died.append(shard_id)
            with psycopg.connect(facade.core.topology.shard(shard_id).primary.conninfo(), autocommit=True) as killer:
                killer.execute("SELECT pg_terminate_backend(%s, 5000)", (conn.driver.info.backend_pid,))

    return died


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_savepoint_that_could_not_be_set(facade: Any, shop: LocalCluster, keys: list[str], dead: int) -> None:
    """The application goes on without what it read inside of it; the commit is refused and keeps nothing."""

    def body(s: Any) -> None:
        if dead:
            s.add(Order(tenant_id=keys[0], id=1))
            s.flush()
        died = dies_as_it_begins(facade, s, shard_ids(facade, keys)[dead])
        with pytest.raises(SQLAlchemyError), s.begin_nested():
            s.execute(select(Customer)).all()
        assert died
        if dead:
            s.execute(insert(Order), [{"tenant_id": keys[3 - dead], "id": 2}])
        s.commit()

    for _ in range(3):  # SQLAlchemy commits its connections in no order
        with pytest.raises(SQLAlchemyError):
            facade.session(body, twophase=True)
        assert kept(shop) == 0


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_listener_fails_as_shards_are_taken(facade: Any, shop: LocalCluster, keys: list[str], fails_at: int) -> None:
    """What was taken by then is prepared as any other."""
    prepared: list[str] = []

    def body(s: Any) -> None:
        s.add(Order(tenant_id=keys[0], id=1))
        s.flush()
        seen: list[str] = []

        @event.listens_for(s, "after_begin")
        def after_begin(_session: Any, _transaction: Any, conn: Any) -> None:
            seen.append(conn.shard_id)
            if len(seen) == fails_at:
                raise TimeoutError("once")

        with pytest.raises(TimeoutError):
            s.execute(select(Customer)).all()
        before: Callable[[Any], None] = s.two_phase._prepare
        s.two_phase._prepare = lambda leg: (prepared.append(leg.shard.id), before(leg))
        s.execute(insert(Order), [{"tenant_id": keys[shard_ids(facade, keys).index(seen[0])], "id": 2}])
        s.commit()

    facade.session(body, twophase=True)
    assert len(prepared) == 1
    assert kept(shop) == 2


def test_a_listener_fails_on_the_first_shard(facade: Any, shop: LocalCluster, keys: list[str]) -> None:
    """There is one connection to it, before and after."""

    def body(s: Any) -> None:
        seen: list[Any] = []

        @event.listens_for(s, "after_begin")
        def after_begin(_session: Any, _transaction: Any, conn: Any) -> None:
            seen.append(conn)
            if len(seen) == 1:
                raise TimeoutError("once")

        with pytest.raises(TimeoutError):
            s.execute(select(Customer).where(Customer.tenant_id == keys[0]))
        s.execute(insert(Order), [{"tenant_id": keys[0], "id": 1}])
        s.commit()
        assert len(seen) == 1

    facade.session(body)
    assert kept(shop) == 1


@pytest.mark.parametrize("twophase", [False, True])
@pytest.mark.parametrize("how", ["waiting", "waking"])
@pytest.mark.parametrize("facade", ["asyncio"], indirect=True)
def test_a_task_cancelled_in_a_savepoint(
    facade: Any, shop: LocalCluster, how: How, twophase: Literal[True, False]
) -> None:
    """At each of its steps: a commit after it keeps what was written before, or raises and keeps nothing."""
    steps = asyncio.run(_cancelled_at_each_step(shop, how, twophase))
    assert steps > 2


async def _cancelled_at_each_step(shop: LocalCluster, how: How, twophase: bool) -> int:
    async with AsyncShardedEngine(shop.url, pool_size=2) as engine:
        keys = list(one_key_a_shard(engine.sync_engine).values())
        async with engine.session() as s:
            await s.execute(select(Customer))  # every pool has a connection

        async def inside(s: Any) -> None:
            async with s.begin_nested():
                await s.execute(select(Customer).where(Customer.tenant_id == keys[1]))
                if twophase:
                    await s.execute(insert(Order), [{"tenant_id": keys[2], "id": at}])

        for at in range(1, 40):
            before = kept(shop)
            async with engine.session(twophase=twophase) as s:
                s.add(Order(tenant_id=keys[0], id=at))
                await s.flush()
                cancel = CancelAt(inside(s), at, how)
                await asyncio.gather(asyncio.ensure_future(_until_done(cancel)), return_exceptions=True)
                try:
                    await s.commit()
                    raised = False
                except SQLAlchemyError:
                    raised = True
            rows = kept(shop) - before
            assert (rows == 0) is raised, f"cancelled at step {at}, {rows} rows are kept, raised: {raised}"
            if not cancel.fired:
                return at - 1
    raise AssertionError("it never ran to its end")


async def _until_done(cancel: CancelAt) -> None:
    await cancel


@pytest.mark.parametrize("twophase", [False, True])
@pytest.mark.parametrize("locks", [False, True])
def test_rows_of_a_listener_are_lost_to_nobody(
    facade: Any, shop: LocalCluster, keys: list[str], locks: bool, twophase: bool
) -> None:
    """A listener of `after_begin` writes on a shard that is only read otherwise, whose connection is then lost."""
    read, written, _ = keys
    ids = shard_ids(facade, keys)
    dsn = facade.core.topology.shard(ids[0]).primary.conninfo()

    def body(s: Any) -> None:
        @event.listens_for(s, "after_begin")
        def audit(_session: Any, _transaction: Any, conn: Any) -> None:
            key = keys[ids.index(conn.shard_id)]
            conn.execute(text("INSERT INTO orders (tenant_id, id, total) VALUES (:key, 9, 1)"), {"key": key})

        query = select(Customer).where(Customer.tenant_id == read)
        s.execute(query.with_for_update() if locks else query).all()
        s.add(Order(tenant_id=written, id=1))
        s.flush()
        pid = s._unit.legs[ids[0]].connection.driver.info.backend_pid
        decider = s._unit.legs[ids[1]].connection

        @event.listens_for(decider, "commit")
        def lost(_conn: Any) -> None:
            with psycopg.connect(dsn, autocommit=True) as killer:
                killer.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

        s.commit()

    told: list[type[Exception]] = []
    try:
        facade.session(body, twophase=twophase)
    except (SQLAlchemyError, errors.CommitOutcomeUnknown) as error:
        told.append(type(error))
    rows = kept(shop)
    assert told == [errors.CommitOutcomeUnknown] or rows == (0 if told else 3), (told, rows)


@pytest.mark.parametrize("locks", [False, True])
def test_a_listener_that_only_reads_does_not_count(facade: Any, keys: list[str], locks: bool) -> None:
    """A setting for each transaction is no write, and its commit none: the unit is run again as any other."""
    read, written, _ = keys
    attempts: list[int] = []

    def work(s: Any) -> None:
        @event.listens_for(s, "after_begin")
        def settings(_session: Any, _transaction: Any, conn: Any) -> None:
            conn.execute(text("SET LOCAL application_name = 'mine'"))

        attempts.append(1)
        query = select(Customer).where(Customer.tenant_id == read)
        s.execute(query.with_for_update() if locks else query).all()
        s.add(Order(tenant_id=written, id=1))
        s.flush()
        decider = s._unit.legs[facade.core.shard_for(written).id].connection

        @event.listens_for(decider, "commit")
        def once(_conn: Any) -> None:
            if len(attempts) == 1:
                raise errors.ShardUnavailable("another", "before the commit that decides")

    facade.run(work)
    assert attempts == [1, 1]
