"""A table that the topology in memory does not have, while the catalog is away: the true reason is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Column, MetaData, String, Table, insert

from shardlib import errors
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.facade import AsyncFacade, SyncFacade

pytestmark = pytest.mark.fault

_TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=1) as made:
        yield made


@pytest.mark.parametrize("kind", [SyncFacade, AsyncFacade], ids=["sync", "asyncio"])
def test_the_catalog_is_away_not_the_table(cluster: LocalCluster, kind: Any) -> None:
    table = Table(f"late_{kind.name}", MetaData(), Column("tenant", String, primary_key=True, info={"shard_key": True}))
    facade = kind(cluster.url, catalog_timeout_s=_TIMEOUT_S)
    made_elsewhere = SyncFacade(cluster.url)

    def write(s: Any) -> None:
        s.execute(insert(table).values(tenant="acme"))
        s.commit()

    try:
        cluster.etcd[0].pause()
        began = time.monotonic()
        try:
            with pytest.raises(errors.CatalogUnavailable, match=table.name) as raised:
                facade.session(write)
            took_s = time.monotonic() - began
        finally:
            cluster.etcd[0].resume()
        assert isinstance(raised.value, errors.RetryableError)
        assert took_s < _TIMEOUT_S + 1.5, f"{took_s:.1f} s: the engine's own limit is {_TIMEOUT_S:g} s"
        with pytest.raises(errors.InvalidTopology, match="does not know table"):
            eventually(lambda: facade.session(write), 30, ignore=errors.CatalogUnavailable)
        made_elsewhere.engine.create_all(table.metadata)
        facade.session(write)
    finally:
        made_elsewhere.close()
        facade.close()
