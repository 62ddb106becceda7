"""P5: with the catalog down, reads and writes go on; an application starts from the topology it saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import select

from shardlib import ShardedEngine, errors
from shardlib.catalog import Catalog, open_catalog
from shardlib.fence import close_gate, open_gate
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.models import Base, Customer
from tests.support.topologies import changed

pytestmark = [pytest.mark.promise("P5"), pytest.mark.fault]


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(Base.metadata)
        yield made


@pytest.fixture(params=[SyncFacade, AsyncFacade], ids=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def add(facade: Any, number: int) -> None:
    facade.session(lambda s: (s.add(Customer(tenant_id=f"t{number}", id=1, name="x")), s.commit()))


def open_operator(cluster: LocalCluster) -> closing[Catalog]:
    """The catalog as who changes topologies opens it."""
    return closing(open_catalog(cluster.url, timeout_s=1))


def count(facade: Any) -> int:
    return len(facade.session(lambda s: s.scalars(select(Customer)).all()))


def test_p5_work_goes_on_while_etcd_is_killed_and_stopped(cluster: LocalCluster, kind: Any) -> None:
    facade = kind(cluster.url, catalog_timeout_s=1)
    etcd = cluster.etcd[0]
    try:
        add(facade, 0)
        etcd.kill()
        for number in range(1, 6):
            add(facade, number)
        assert count(facade) == 6
        with pytest.raises(errors.CatalogUnavailable):
            facade.core.refresh()
        with open_operator(cluster) as operator, pytest.raises(errors.CatalogUnavailable):
            operator.publish(changed(facade.core.topology), expected=facade.core.topology.version)
        etcd.start()
        etcd.pause()
        for number in range(6, 10):
            add(facade, number)
        assert count(facade) == 10
        etcd.resume()
        with open_operator(cluster) as operator:  # and what changes afterwards is learned
            before = eventually(operator.load, 40, ignore=errors.CatalogUnavailable)
            operator.publish(changed(before), expected=before.version)
        eventually(lambda: facade.core.topology.version > before.version, 40)
    finally:
        facade.close()


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_p5_an_application_starts_from_its_saved_topology(
    cluster: LocalCluster, kind: Any, tmp_path: Path, fault: str
) -> None:
    file, etcd = tmp_path / "topology", cluster.etcd[0]
    first = kind(cluster.url, topology_file=file)
    add(first, 0)
    eventually(file.exists, 30)
    first.close()
    assert file.stat().st_mode & 0o077 == 0
    getattr(etcd, fault)()
    with pytest.raises(errors.CatalogUnavailable):
        kind(cluster.url, catalog_timeout_s=1)
    second = kind(cluster.url, topology_file=file, catalog_timeout_s=1)
    try:
        add(second, 1)
        assert count(second) == 2
        etcd.start() if fault == "kill" else etcd.resume()
        with open_operator(cluster) as operator:
            before = eventually(operator.load, 40, ignore=errors.CatalogUnavailable)
            operator.publish(changed(before), expected=before.version)
        eventually(lambda: second.core.topology.version > before.version, 40, "it follows the catalog again")
    finally:
        second.close()


def test_p5_an_old_saved_topology_is_safe(cluster: LocalCluster, kind: Any, tmp_path: Path) -> None:
    """The gates have changed since it was saved: its holder is refused, and goes on once the catalog is back."""
    file = tmp_path / "topology"
    first = kind(cluster.url, topology_file=file)
    eventually(file.exists, 30)
    first.close()
    catalog = open_catalog(cluster.url)
    topology = catalog.load()
    for shard in topology.shards:
        after = renew_gates(topology, shard.id, nonce=uuid4().hex)
        with psycopg.connect(shard.primary.conninfo(), autocommit=True) as conn:
            for number in after.gates_of(shard.id):
                open_gate(conn, number)
            catalog.publish(after, expected=topology.version)
            for number in topology.gates_of(shard.id):
                assert close_gate(conn, number, budget_s=5).closed
        topology = after
    catalog.close()
    cluster.etcd[0].kill()
    second = kind(cluster.url, topology_file=file, catalog_timeout_s=0.5, reroute_timeout_s=1)
    try:
        with pytest.raises(errors.StaleTopology):
            add(second, 0)
        with pytest.raises(errors.StaleTopology):
            count(second)
        cluster.etcd[0].start()
        eventually(lambda: second.core.topology.version == topology.version, 40)
        add(second, 0)
        assert count(second) == 1
    finally:
        second.close()
