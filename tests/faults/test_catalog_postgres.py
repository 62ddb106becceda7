"""The catalog's PostgreSQL killed, hung, or cut off: the newest topology arrives afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from shardlib.catalog import open_catalog
from shardlib.catalog.stored import StoredCatalog
from shardlib.errors import CatalogUnavailable
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from tests.support.eventually import eventually
from tests.support.topologies import changed, facts, make_topology

pytestmark = pytest.mark.fault

BACK_S = 20.0
"""After the server answers again, a watch tells of the newest version within this time."""
HUNG_S = 20.0
"""A server that hangs is noticed by a watch within this time."""


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        yield cluster.servers[0]


@pytest.fixture
def catalog(server: LocalServer, request: pytest.FixtureRequest) -> Iterator[StoredCatalog]:
    made = open_catalog(f"{server.dsn}?catalog={request.node.name[:60]}", timeout_s=2)
    assert isinstance(made, StoredCatalog)
    made.publish(make_topology(), expected=None)
    yield made
    made.close()


def publish_next(catalog: StoredCatalog) -> int:
    current = catalog.load()
    catalog.publish(changed(current), expected=current.version)
    return current.version + 1


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_the_watch_goes_on_after_the_server_is_back(server: LocalServer, catalog: StoredCatalog, fault: str) -> None:
    versions: list[int] = []
    alive: list[bool] = []
    watch = catalog.watch(versions.append, alive.append)
    eventually(lambda: versions and alive, 20, "the watch begins")
    getattr(server, fault)()
    began = time.monotonic()
    with pytest.raises(CatalogUnavailable) as raised:
        catalog.version()
    assert time.monotonic() - began < 10, "its limit is 2 s"
    assert server.dsn.split("@")[0].rsplit(":", 1)[1] not in f"{raised.value} {raised.value!r}"
    eventually(lambda: not alive[-1], HUNG_S, "the loss is told")
    if fault == "kill":
        server.start()
    else:
        server.resume()
    newest = eventually(lambda: publish_next(catalog), 30, "published", ignore=CatalogUnavailable)
    eventually(lambda: versions[-1] == newest, BACK_S, "the watch tells of the newest")
    began = time.monotonic()
    watch.close()
    assert time.monotonic() - began < 15, "the threads are told to end, and not left to their next poll"


def test_a_publish_that_was_cut_short_is_settled_by_its_nonce(server: LocalServer, catalog: StoredCatalog) -> None:
    following = changed(catalog.load())
    server.pause()
    with pytest.raises(CatalogUnavailable):
        catalog.publish(following, expected=1)
    server.resume()
    eventually(catalog.version, 30, "it answers", ignore=CatalogUnavailable)
    catalog.publish(following, expected=1)
    assert facts(catalog.load()) == facts(following)


def test_connections_that_the_server_ends_are_opened_anew(server: LocalServer, catalog: StoredCatalog) -> None:
    versions: list[int] = []
    watch = catalog.watch(versions.append, lambda alive: None)
    eventually(lambda: versions, 20, "the watch begins")
    with server.connect() as admin:
        ended = admin.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'shardlib-catalog'"
        ).fetchone()
    assert ended is not None
    assert ended[0] >= 2
    assert catalog.version() == 1
    newest = publish_next(catalog)
    eventually(lambda: versions[-1] == newest, BACK_S, "the watch tells of the newest")
    watch.close()
