"""Hidden rows and topologies that change: what counts is the one that a transaction began with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shardlib import errors
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.hidden import JOB, SOURCE, TARGET, Moving
from tests.support.models import Base, Customer

TABLE: Any = Customer.__table__


@pytest.fixture
def moving() -> Iterator[Moving]:
    """A move that has been announced; each test takes it further."""
    with LocalCluster(shards=2) as cluster:
        made = Moving(cluster, [Base.metadata])
        made.fill({TABLE: [{"tenant_id": f"tenant-{n}", "id": 1, "name": "x"} for n in range(160)]})
        try:
            made.copying()
            yield made
        finally:
            made.close()


@pytest.fixture(params=["sync", "asyncio"])
def facade(request: pytest.FixtureRequest, moving: Moving) -> Iterator[Any]:
    kind = {"sync": SyncFacade, "asyncio": AsyncFacade}[request.param]
    made = kind(moving.cluster.url, pool_size=2, reroute_timeout_s=1.0)
    yield made
    made.close()


def unaware(facade: Any) -> Any:
    """The facade's engine learns of newer topologies only by asking."""
    facade.core._cache._watch.close()
    return facade


def tenants(session: Any) -> Counter[str]:
    return Counter(session.scalars(select(Customer.tenant_id)).all())


def all_tenants(moving: Moving) -> Counter[str]:
    with Session(moving.plain) as session:
        return tenants(session)


def a_tenant_of(moving: Moving, shard_id: str) -> str:
    topology = moving.catalog.load()
    for tenant in sorted(all_tenants(moving)):
        if topology.shard_of(moving.token(tenant.encode())).id == shard_id:
            return tenant
    raise AssertionError(f"no tenant lives on {shard_id}")


def end_the_move(moving: Moving) -> int:
    """The job is over and nothing is left of it: the topology's version."""
    for table in reversed(Base.metadata.sorted_tables):
        if "tenant_id" in table.c:
            moving.run(
                TARGET,
                f"DELETE FROM {table.name} t USING shardlib.job_{JOB}_keys k WHERE k.k = t.tenant_id",
            )
    version = moving.publish(moving.over(), close=False).version
    for shard_id in (SOURCE, TARGET):
        moving.run(shard_id, f"DROP TABLE shardlib.job_{JOB}_keys")
    return version


def test_a_session_that_began_before_the_switch_sees_each_row_once(facade: Any, moving: Moving) -> None:
    expected = all_tenants(moving)

    def body(s: Any) -> None:
        assert tenants(s) == expected
        before = s._now.topology.version
        after = moving.switched(close=False).version
        eventually(lambda: facade.core.topology.version == after, 5.0)
        assert tenants(s) == expected
        assert s._now.topology.version == before
        changed = s.execute(
            update(Customer).values(name="y").execution_options(all_shards=True, synchronize_session=False)
        )
        assert changed.rowcount == sum(expected.values())
        s.rollback()
        assert tenants(s) == expected
        assert s._now.topology.version == after

    facade.session(body, twophase=True)
    moving.sweep(moving.catalog.load())
    assert facade.session(tenants) == expected


def test_work_not_begun_goes_on_when_the_key_table_is_gone(facade: Any, moving: Moving) -> None:
    expected = all_tenants(moving)
    assert unaware(facade).session(tenants) == expected
    version = end_the_move(moving)
    assert facade.core.topology.version < version
    assert facade.session(tenants) == expected
    assert facade.core.topology.version == version


def test_work_that_has_begun_is_told(facade: Any, moving: Moving) -> None:
    tenant = a_tenant_of(moving, SOURCE)
    unaware(facade).session(tenants)
    end_the_move(moving)

    def body(s: Any) -> int:
        assert s.scalars(select(Customer).where(Customer.tenant_id == tenant)).one()
        return sum(tenants(s).values())

    with pytest.raises(errors.StaleTopology):
        facade.session(body)
    facade.core.refresh()
    assert facade.session(body) == 160


def test_a_pinned_connection_is_told(facade: Any, moving: Moving) -> None:
    tenant = a_tenant_of(moving, TARGET)
    count = select(func.count()).select_from(TABLE)
    before = unaware(facade).connect(lambda conn: conn.scalar(count), tenant)
    end_the_move(moving)
    with pytest.raises(errors.StaleTopology, match=f"key table of job {JOB}|gate"):
        facade.connect(lambda conn: conn.scalar(count), tenant)
    facade.core.refresh()
    assert facade.connect(lambda conn: conn.scalar(count), tenant) == before


def test_a_key_table_that_is_gone_for_good_is_an_error_in_time(facade: Any, moving: Moving) -> None:
    moving.run(TARGET, f"DROP TABLE shardlib.job_{JOB}_keys")
    with pytest.raises(errors.StaleTopology):
        facade.session(tenants)
    tenant = a_tenant_of(moving, TARGET)
    keyed = select(Customer.tenant_id).where(Customer.tenant_id == tenant)
    assert facade.session(lambda s: s.scalars(keyed).all()) == [tenant]
