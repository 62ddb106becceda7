"""While a switch holds a range closed, those who wait open a connection to where its rows go."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from shardlib import ShardedSession
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.hidden import SOURCE, TARGET, Moving
from tests.support.models import Base, Customer

TABLE: Any = Customer.__table__


@pytest.fixture
def moving() -> Iterator[Moving]:
    with LocalCluster(shards=2) as cluster:
        made = Moving(cluster, [Base.metadata])
        made.fill({TABLE: [{"tenant_id": f"tenant-{n}", "id": 1, "name": "x"} for n in range(160)]})
        try:
            made.copying()
            yield made
        finally:
            made.close()


@pytest.fixture(params=[SyncFacade, AsyncFacade])
def facade(request: pytest.FixtureRequest, moving: Moving) -> Iterator[Any]:
    with ThreadPoolExecutor(1) as thread:  # everything of one event loop in one thread
        made = thread.submit(request.param, moving.cluster.url, reroute_timeout_s=20.0).result()
        made.start = lambda body, key: thread.submit(made.session, body, key)
        yield made
        thread.submit(made.close).result()


@pytest.fixture
def tenant(moving: Moving) -> str:
    ((key,), *_) = moving.run(TARGET, "SELECT k FROM shardlib.job_7_keys ORDER BY k")
    return str(key)


def name(session: ShardedSession) -> Any:
    return session.scalars(select(Customer.name)).first()


def connections(facade: Any, shard_id: str) -> int:
    return sum(pool.idle + pool.in_use for pool in facade.core.pool_status() if pool.shard == shard_id)


def test_who_waits_for_a_switch_has_a_connection_when_it_comes(moving: Moving, facade: Any, tenant: str) -> None:
    assert facade.start(name, tenant).result(30) == "x"
    assert connections(facade, TARGET) == 0
    moving.shut()
    waiting = facade.start(name, tenant)
    assert eventually(lambda: connections(facade, TARGET), 10) == 1
    assert not waiting.done()
    moving.switched()
    assert waiting.result(30) == "x"
    assert connections(facade, TARGET) == 1


def test_the_way_back_as_well(moving: Moving, facade: Any, tenant: str) -> None:
    moving.switched()
    assert facade.start(name, tenant).result(30) == "x"
    assert connections(facade, SOURCE) == 0
    moving.shut()
    waiting = facade.start(name, tenant)
    assert eventually(lambda: connections(facade, SOURCE), 10) == 1
    moving.given_back()
    assert waiting.result(30) == "x"


def test_a_target_that_is_down_keeps_nobody_from_the_source(moving: Moving, facade: Any, tenant: str) -> None:
    assert facade.start(name, tenant).result(30) == "x"
    moving.shut()
    moving.cluster.servers[1].kill()
    waiting = facade.start(name, tenant)
    try:
        moving.renewed()
        assert waiting.result(30) == "x"
        assert connections(facade, TARGET) == 0
    finally:
        moving.cluster.servers[1].start()


def test_no_room_for_one_is_no_reason_to_wait_for_room(moving: Moving, tenant: str) -> None:
    facade = SyncFacade(moving.cluster.url, max_connections=1, reroute_timeout_s=20.0)
    with ThreadPoolExecutor(1) as thread:
        assert facade.session(name, tenant) == "x"
        moving.shut()
        waiting = thread.submit(facade.session, name, tenant)
        moving.renewed()
        assert waiting.result(30) == "x"
        assert connections(facade, TARGET) == 0
    facade.close()
