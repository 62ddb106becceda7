"""The pytest plugin of the distribution: real shards for an application's tests.

::

    def test_orders(sharded_engine):
        sharded_engine.create_all(Base.metadata)
        with sharded_engine.session("tenant-42") as session:
            ...

Loading it imports nothing but pytest: what a fixture needs is imported when a test asks for that fixture.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from shardlib import AsyncShardedEngine, ShardedEngine

__all__ = ["RunningCluster", "ShardedCluster", "async_sharded_engine", "sharded_cluster", "sharded_engine"]


class ShardedCluster(Protocol):
    """What `sharded_cluster` gives: a `LocalCluster`, or one that was running already."""

    @property
    def url(self) -> str:
        """URL of the catalog, for `ShardedEngine`."""
        ...


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that somebody else started (`--shardlib-url`)."""

    url: str


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the plugin; each has an ini setting of the same name with underscores."""
    group = parser.getgroup("shardlib", "shardlib: real PostgreSQL shards and a catalog")
    for name, default, what in (
        ("shards", "2", "number of shards of the cluster"),
        ("replicas", "0", "replicas of each shard"),
        ("url", "", "catalog URL of a cluster that runs already; the tests empty its tables"),
        ("pg-bin", "", "folder of the PostgreSQL programs to start, instead of those of the extra `local`"),
    ):
        setting = "shardlib_" + name.replace("-", "_")
        group.addoption(f"--shardlib-{name}", dest=setting, default=None, help=what)
        parser.addini(setting, what, default=default)


def _option(config: pytest.Config, name: str) -> str:
    given = config.getoption(name)
    return str(config.getini(name) if given is None else given)


def _count(config: pytest.Config, name: str) -> int:
    text = _option(config, name)
    if not text.isdecimal():
        option = "--" + name.replace("_", "-")
        raise pytest.UsageError(f"{option} {text!r}: a whole number is expected")
    return int(text)


@pytest.fixture(scope="session")
def sharded_cluster(pytestconfig: pytest.Config) -> Iterator[ShardedCluster]:
    """Real shards and a catalog for the whole session: `.url` is for `ShardedEngine`.

    A `LocalCluster` started from wheels (extra `local`), or the cluster that `--shardlib-url` names.
    """
    if url := _option(pytestconfig, "shardlib_url"):
        yield RunningCluster(url)
        return
    from shardlib_ops.local.cluster import LocalCluster

    shards, replicas = _count(pytestconfig, "shardlib_shards"), _count(pytestconfig, "shardlib_replicas")
    with LocalCluster(shards, replicas, pg_bin=_option(pytestconfig, "shardlib_pg_bin") or None) as cluster:
        yield cluster


@pytest.fixture
def sharded_engine(sharded_cluster: ShardedCluster) -> Iterator[ShardedEngine]:
    """A `ShardedEngine`; after the test the shards are as clean as before it.

    Sharded tables are emptied, tables that the test created are dropped. A reference table is emptied unless
    it held rows before the test.
    """
    from shardlib import ShardedEngine
    from shardlib_ops.testing.cleaning import cleaned

    with cleaned(sharded_cluster.url), ShardedEngine(sharded_cluster.url) as engine:
        yield engine


@pytest.fixture
def async_sharded_engine(sharded_cluster: ShardedCluster) -> Iterator[AsyncShardedEngine]:
    """An `AsyncShardedEngine`, for whichever plugin runs coroutine tests; cleaned as `sharded_engine` is."""
    from shardlib import AsyncShardedEngine
    from shardlib_ops.testing.cleaning import cleaned

    with cleaned(sharded_cluster.url):
        engine = AsyncShardedEngine(sharded_cluster.url)
        try:
            yield engine
        finally:
            _in_a_loop_of_its_own(engine)


def _in_a_loop_of_its_own(engine: AsyncShardedEngine) -> None:
    """Dispose an engine whose event loop may be gone, touching no loop of this thread."""
    errors: list[BaseException] = []

    def dispose() -> None:
        try:
            asyncio.run(engine.dispose())
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=dispose, name="shardlib-dispose")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
