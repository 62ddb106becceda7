"""Fixtures: a cluster that the session tests share, empty for each test, and the two facades over it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.models import Base


@pytest.fixture(scope="session")
def shop() -> Iterator[LocalCluster]:
    """Three shards with the shop's tables. Tests leave its servers running."""
    with LocalCluster(shards=3) as cluster:
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(Base.metadata)
        yield cluster


@pytest.fixture(params=["sync", "asyncio"])
def facade(request: pytest.FixtureRequest, shop: LocalCluster) -> Iterator[Any]:
    """The shop through one of the facades; every table is empty."""
    tables = ", ".join(f'"{table.name}"' for table in Base.metadata.tables.values())

    def empty(dsn: str) -> None:
        with psycopg.connect(dsn) as conn:
            conn.execute(f"TRUNCATE {tables}")

    with ThreadPoolExecutor() as threads:
        list(threads.map(empty, [server.dsn for server in shop.servers]))
    made = {"sync": SyncFacade, "asyncio": AsyncFacade}[request.param](shop.url, pool_size=2)
    yield made
    made.close()


def one_key_a_shard(engine: ShardedEngine) -> dict[str, str]:
    """Shard id -> a key that it owns, in the order of the keys."""
    found: dict[str, str] = {}
    numbers = itertools.count()
    while len(found) < len(engine.topology.owners()):
        key = f"tenant-{next(numbers)}"
        found.setdefault(engine.shard_for(key).id, key)
    return found


@pytest.fixture
def keys(facade: Any) -> list[str]:
    """Three tenants, each on another shard."""
    return list(one_key_a_shard(facade.core).values())
