"""`engine.metrics`: what is counted, by both facades."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError, NotSupportedError, ProgrammingError

from shardlib import ShardedEngine, errors
from shardlib.catalog import open_catalog
from shardlib.fence import close_gate, open_gate
from shardlib.telemetry import TelemetryOptions
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.forks import in_child
from tests.support.models import Base, Customer
from tests.support.shop import one_key_a_shard

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')


def figures(text: str) -> dict[str, float]:
    """Sample -> value. Fails on a line that is not of Prometheus' text format."""
    found = {}
    for line in text.splitlines():
        if line.startswith("# "):
            assert re.fullmatch(r"# (HELP [a-z_]+ .+|TYPE [a-z_]+ (counter|gauge|histogram))", line), line
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        found[line.rpartition(" ")[0]] = float(sample[3])
    return found


@pytest.fixture
def counted(shop: LocalCluster, facade: Any) -> Iterator[Any]:
    """The shop through each facade, with an engine that counts; its tables are empty."""
    made = type(facade)(shop.url, pool_size=2, telemetry=TelemetryOptions(metrics=True))
    yield made
    made.close()


def test_a_statement_counts_once_and_on_each_of_its_shards(counted: Any) -> None:
    keys = one_key_a_shard(counted.core)

    def work(session: Any) -> None:
        session.scalars(select(Customer)).all()
        session.add(Customer(tenant_id=keys["s1"], id=1, name="n"))
        session.commit()

    counted.session(work)
    seen = figures(counted.engine.metrics())
    assert seen['shard_router_requests_total{operation="execute"}'] == 1
    assert seen['shard_router_requests_total{operation="flush"}'] == 1
    assert seen['shard_router_request_duration_seconds_count{operation="execute"}'] == 1
    assert seen['shard_router_request_duration_seconds_bucket{operation="execute",le="+Inf"}'] == 1
    assert 0 < seen['shard_router_request_duration_seconds_sum{operation="execute"}'] < 60
    sent = {shard: seen[f'shard_router_shard_requests_total{{shard="{shard}"}}'] for shard in keys}
    assert sent["s1"] == 3, "the SELECT, the INSERT and COMMIT"
    assert sent["s2"] == sent["s3"] == 2, "the SELECT and COMMIT"
    assert seen["shard_router_catalog_cache_hits"] == 2
    assert seen['shard_router_connection_pool_size{shard="s1",state="idle"}'] == 1
    assert seen['shard_router_connection_pool_size{shard="s1",state="in_use"}'] == 0
    assert not [name for name in seen if "errors" in name]


def test_errors_are_counted_once_by_type_and_shard(counted: Any) -> None:
    keys = one_key_a_shard(counted.core)

    def twice(session: Any) -> None:
        for _ in range(2):
            session.execute(insert(Customer).values(tenant_id=keys["s2"], id=1, name="n"))

    def flushed_twice(session: Any) -> None:
        for _ in range(2):
            session.add(Customer(tenant_id=keys["s3"], id=1, name="n"))
            session.flush()
            session.expunge_all()

    with pytest.raises(IntegrityError):
        counted.session(twice)
    with pytest.raises(IntegrityError):
        counted.session(flushed_twice, keys["s3"])
    with pytest.raises(errors.ShardKeyRequired):
        counted.session(lambda session: session.execute(text("SELECT 1")))
    with pytest.raises(ProgrammingError):
        counted.connect(lambda conn: conn.execute(text("SELECT none_such")), keys["s1"])
    seen = figures(counted.engine.metrics())
    assert {name: value for name, value in seen.items() if "errors" in name} == {
        'shard_router_errors_total{error_type="IntegrityError",shard="s2"}': 1,
        'shard_router_errors_total{error_type="IntegrityError",shard="s3"}': 1,
        'shard_router_errors_total{error_type="ProgrammingError",shard="s1"}': 1,
        'shard_router_errors_total{error_type="ShardKeyRequired",shard=""}': 1,
    }
    assert seen['shard_router_requests_total{operation="core"}'] == 1


def test_a_commit_that_the_server_refuses_is_an_error(counted: Any) -> None:
    key = one_key_a_shard(counted.core)["s1"]

    def work(session: Any) -> None:
        for statement in (
            "CREATE TEMP TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED) ON COMMIT DROP",
            "INSERT INTO late VALUES (1), (1)",
        ):
            session.execute(text(statement))
        session.commit()

    with pytest.raises(IntegrityError):
        counted.session(work, key)
    seen = figures(counted.engine.metrics())
    assert seen['shard_router_errors_total{error_type="IntegrityError",shard="s1"}'] == 1


def test_a_connection_that_cannot_be_had_is_an_error_wherever_it_is_asked_for(shop: LocalCluster, facade: Any) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout_s": 0.1}
    made = type(facade)(shop.url, telemetry=TelemetryOptions(metrics=True), **options)
    home = made.core.shard_for("t").id

    def work(session: Any) -> None:
        session.scalars(select(Customer)).all()  # keeps the only connection
        for attempt in (
            lambda: made.core.session("t").scalars(select(Customer)),
            lambda: made.core.session("t").connection(),
            lambda: made.core.connect("t"),
        ):
            with pytest.raises(errors.PoolTimeout):
                attempt()

    try:
        made.session(work, "t")
        seen = figures(made.engine.metrics())
        assert seen[f'shard_router_errors_total{{error_type="PoolTimeout",shard="{home}"}}'] == 3
    finally:
        made.close()


def test_a_shard_that_does_not_prepare_is_an_error(counted: Any) -> None:
    keys = one_key_a_shard(counted.core)

    def work(session: Any) -> None:
        session.execute(insert(Customer).values(tenant_id=keys["s1"], id=1, name="n"))
        session.connection().exec_driver_sql("CREATE TEMP TABLE unpreparable (id int) ON COMMIT DROP")
        session.execute(insert(Customer).values(tenant_id=keys["s2"], id=1, name="n"))
        session.commit()

    with pytest.raises(NotSupportedError):
        counted.session(work, twophase=True)
    seen = figures(counted.engine.metrics())
    assert {name: value for name, value in seen.items() if "errors" in name} == {
        'shard_router_errors_total{error_type="NotSupportedError",shard="s1"}': 1
    }


@pytest.mark.parametrize("kind", [SyncFacade, AsyncFacade])
def test_refusals_of_the_fence_are_counted(kind: Any) -> None:
    with LocalCluster(shards=1) as cluster:
        made = kind(cluster.url, poll_s=60, telemetry=TelemetryOptions(metrics=True))
        try:
            made.core.create_all(Base.metadata)
            made.session(lambda session: session.scalars(select(Customer)).all(), "t")
            assert not [name for name in figures(made.engine.metrics()) if "refusals" in name]
            # The gate closes before the new one is known to anybody: the next transaction meets it closed.
            catalog = open_catalog(cluster.url)
            now = catalog.load()
            then = renew_gates(now, "s1", nonce=uuid4().hex)
            with cluster.servers[0].connect() as admin:
                for number in then.gates_of("s1"):
                    open_gate(admin, number)
                assert close_gate(admin, now.default_gate("s1"), budget_s=5).closed
            refused = 'shard_router_fence_refusals_total{shard="s1"}'

            def publish() -> None:
                deadline = time.monotonic() + 30
                while refused not in figures(made.engine.metrics()) and time.monotonic() < deadline:
                    threading.Event().wait(0.01)
                catalog.publish(then, expected=now.version)

            publisher = threading.Thread(target=publish)
            publisher.start()
            made.session(lambda session: session.scalars(select(Customer)).all(), "t")
            publisher.join()
            catalog.close()
            seen = figures(made.engine.metrics())
            assert seen[refused] >= 1
            assert not [name for name in seen if "errors" in name], "the transaction went on by itself"
        finally:
            made.close()


def test_without_being_asked_only_the_pools_are_shown(facade: Any) -> None:
    facade.session(lambda session: session.scalars(select(Customer)).all(), "t")
    seen = figures(facade.engine.metrics())
    assert seen
    assert all(name.startswith("shard_router_connection_pool_size{") for name in seen)


def test_a_bulk_load_is_one_request(shop: LocalCluster, facade: Any) -> None:
    del facade  # empties the tables
    with ShardedEngine(shop.url, telemetry=TelemetryOptions(metrics=True)) as engine:
        engine.bulk_load(Customer, [{"tenant_id": f"t{number}", "id": 1, "name": "n"} for number in range(50)])
        assert figures(engine.metrics())['shard_router_requests_total{operation="bulk_load"}'] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_counts_from_zero(shop: LocalCluster, facade: Any) -> None:
    del facade
    with ShardedEngine(shop.url, telemetry=TelemetryOptions(metrics=True)) as engine:
        for _ in range(2):
            with engine.session("t") as session:
                session.scalars(select(Customer)).all()

        def child() -> None:
            with engine.session("t") as session:
                session.scalars(select(Customer)).all()
            assert figures(engine.metrics())['shard_router_requests_total{operation="execute"}'] == 1

        in_child(child)()
        assert figures(engine.metrics())['shard_router_requests_total{operation="execute"}'] == 2
