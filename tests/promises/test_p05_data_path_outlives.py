"""P5: with the catalog down the data path goes on, and an application can start from what it saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.errors import CatalogUnavailable
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.topologies import changed

pytestmark = [pytest.mark.fault, pytest.mark.promise("P5")]

KEYS = [f"tenant-{number}" for number in range(12)]


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as started:
        yield started


def total(engine: ShardedEngine) -> int:
    """Write one row for each key, and count all rows on both shards."""
    found: dict[str, int] = {}
    for key in KEYS:
        with engine.connect(key) as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS p5 (key text NOT NULL)"))
            connection.execute(text("INSERT INTO p5 VALUES (:key)"), {"key": key})
            count = connection.execute(text("SELECT count(*) FROM p5")).scalar_one()
            connection.commit()
        found[engine.shard_for(key).id] = count
    assert len(found) == 2, "the keys live on both shards"
    return sum(found.values())


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_reads_and_writes_go_on_and_an_application_starts_without_the_catalog(
    cluster: LocalCluster, tmp_path: Path, fault: str
) -> None:
    saved, etcd = tmp_path / "topology", cluster.etcd[0]
    engine = ShardedEngine(cluster.url, topology_file=saved)
    assert total(engine) == len(KEYS)
    eventually(saved.exists, 5, "the topology is saved")
    getattr(etcd, fault)()

    assert total(engine) == 2 * len(KEYS), "a running application goes on"
    started = ShardedEngine(cluster.url, topology_file=saved)
    assert total(started) == 3 * len(KEYS), "an application starts from its file"
    with pytest.raises(CatalogUnavailable):
        ShardedEngine(cluster.url).shard_for("tenant-1")
    operator = open_catalog(cluster.url, timeout_s=1)
    topology = started.topology
    with pytest.raises(CatalogUnavailable):
        operator.publish(changed(topology), expected=topology.version)

    if fault == "kill":
        etcd.start()
    else:
        etcd.resume()
    following = changed(topology)
    eventually(
        lambda: operator.publish(following, expected=topology.version) is None, 15, "published",
        ignore=CatalogUnavailable,
    )  # fmt: skip
    for one in (engine, started):
        eventually(lambda one=one: one.topology.version == following.version, 15, "both follow again")  # type: ignore[misc]
        one.dispose()
    operator.close()
