"""P9: a password appears in no exception, repr, log, statement log, span or metric, whatever goes wrong."""

from __future__ import annotations

import base64
import io
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import select
from sqlalchemy import text as sql_text
from sqlalchemy.exc import ProgrammingError

from shardlib import AsyncShardedEngine, ShardedEngine, errors
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.telemetry import TelemetryOptions
from shardlib_ops import LocalCluster
from tests.support.models import Base, Customer

pytestmark = pytest.mark.promise("P9")

CANARY = "c4nary/p@ss:w%rd"
FORMS = (CANARY, quote(CANARY, safe=""), base64.b64encode(CANARY.encode()).decode())


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """One shard whose superuser's password is the canary."""
    with LocalCluster(shards=1) as made:
        server = made.servers[0]
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute("CREATE ROLE canary LOGIN SUPERUSER")
            conn.execute(f"ALTER ROLE canary PASSWORD '{CANARY}'")
        point(made, dsn(made))
        with ShardedEngine(made.url) as engine:
            engine.create_all(Base.metadata)
        yield made


def dsn(cluster: LocalCluster, password: str = CANARY, **changes: str) -> str:
    parts = {"port": Dsn(cluster.servers[0].dsn).port, "host": "127.0.0.1", "dbname": "postgres"} | changes
    return f"postgresql://canary:{quote(password, safe='')}@{parts['host']}:{parts['port']}/{parts['dbname']}"


def point(cluster: LocalCluster, to: str) -> None:
    """The catalog's only shard is at this DSN."""
    catalog = open_catalog(cluster.url)
    before = catalog.load()
    shard = replace(before.shards[0], primary=Dsn(to))
    catalog.publish(before.evolve(shards=(shard,), nonce=f"v{before.version + 1}"), expected=before.version)
    catalog.close()


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """Everything that is logged at any level meanwhile."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def shown(error: BaseException) -> str:
    """All that can be seen of an error, its causes and its frames' values included."""
    seen = traceback.TracebackException.from_exception(error)
    return "".join(seen.format()) + repr(error) + str(error) + repr(error.args) + repr(getattr(error, "__notes__", ""))


def assert_clean(text: str) -> None:
    for form in FORMS:
        assert form not in text


def failing(work: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:
        work()
    return shown(caught.value)


def test_p9_objects_that_hold_a_dsn_do_not_show_it(cluster: LocalCluster) -> None:
    with ShardedEngine(cluster.url) as engine:
        engine.session("t").scalars(select(Customer)).all()
        pools = engine._core.pools
        for thing in (
            engine, engine.topology, engine.topology.shards[0], engine.topology.shards[0].primary, pools.stats(),
            pools.engine("s1"), pools.engine("s1").url, pools.engine("s1").pool.status(), engine.options,
        ):  # fmt: skip
            assert_clean(repr(thing) + str(thing))
    assert_clean(repr(Dsn(dsn(cluster))))
    assert Dsn(dsn(cluster)).reveal() == dsn(cluster)
    assert pickle.loads(pickle.dumps(Dsn(dsn(cluster)))) == Dsn(dsn(cluster))


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": "1"},
        {"dbname": "nowhere"},
        {"host": "no-such-host.invalid"},
        {"host": "192.0.2.1"},
        {"dbname": "template1"},
    ],
    ids=["closed port", "no database", "no host", "no route", "no schema"],
)
def test_p9_connecting_in_vain(cluster: LocalCluster, printed: io.StringIO, wrong: dict[str, str]) -> None:
    point(cluster, dsn(cluster, **wrong))
    try:
        with ShardedEngine(cluster.url, connect_timeout_s=2, echo=True) as engine:
            assert_clean(failing(lambda: engine.session("t").scalars(select(Customer)).all()))
            assert_clean(failing(lambda: engine.connect("t")))
            if "dbname" not in wrong or wrong["dbname"] == "nowhere":
                assert_clean(failing(lambda: engine.create_all(Base.metadata)))
            assert_clean(failing(lambda: engine.run(lambda s: s.get(Customer, ("t", 1)), shard_key="t")))
    finally:
        point(cluster, dsn(cluster))
    assert_clean(printed.getvalue())


def test_p9_a_wrong_password(cluster: LocalCluster, printed: io.StringIO) -> None:
    with psycopg.connect(cluster.servers[0].dsn, autocommit=True) as conn:
        conn.execute("ALTER ROLE canary PASSWORD 'another'")
    try:
        with ShardedEngine(cluster.url) as engine, pytest.raises(errors.ShardUnavailable) as caught:
            engine.session("t").scalars(select(Customer)).all()
        text = shown(caught.value)
        assert_clean(text)
        assert "canary" in text
        assert "password" in text
    finally:
        with psycopg.connect(cluster.servers[0].dsn, autocommit=True) as conn:
            conn.execute(f"ALTER ROLE canary PASSWORD '{CANARY}'")
    assert_clean(printed.getvalue())


@pytest.mark.parametrize("engine_class", [ShardedEngine, AsyncShardedEngine])
def test_p9_catalog_urls(printed: io.StringIO, engine_class: Any) -> None:
    secret = quote(CANARY, safe="")
    for url in (
        f"etcd://root:{secret}@127.0.0.1:1/shop",
        f"etcds://root:{secret}@127.0.0.1:1/shop",
        f"etcd://root:{secret}@127.0.0.1:port/shop",
        f"postgresql://root:{secret}@127.0.0.1:1/catalog",
        f"mysql://root:{secret}@127.0.0.1/shop",
        f"root:{secret}@127.0.0.1",
        f"postgresql://root:{CANARY}@[::1/catalog",
    ):
        assert_clean(failing(lambda url=url: engine_class(url, catalog_timeout_s=0.3)))
    assert_clean(printed.getvalue())


def test_p9_malformed_dsns() -> None:
    for text in (
        f"mysql://root:{CANARY}@host/db", f"password={CANARY} port", f"postgresql://u:{CANARY}@", CANARY,
        f"postgresql://u:{CANARY}@h:p/d?nonsense={CANARY}",
    ):  # fmt: skip
        assert_clean(failing(lambda text=text: Dsn(text)))


def test_p9_a_rotated_password_is_picked_up(cluster: LocalCluster, monkeypatch: Any) -> None:
    """The catalog holds a reference; the secret is read at each new connection."""
    server = cluster.servers[0]
    monkeypatch.setenv("SHARD_PASSWORD", CANARY)
    point(cluster, f"postgresql://canary:env%3ASHARD_PASSWORD@127.0.0.1:{Dsn(server.dsn).port}/postgres")
    try:
        with ShardedEngine(cluster.url) as engine:
            assert engine.session("t").scalars(select(Customer)).all() == []
            with psycopg.connect(server.dsn, autocommit=True) as conn:
                conn.execute("ALTER ROLE canary PASSWORD 'rotated'")
            engine._core.pools.dispose()
            assert_clean(failing(lambda: engine.connect("t")))
            monkeypatch.setenv("SHARD_PASSWORD", "rotated")
            assert engine.session("t").scalars(select(Customer)).all() == []
            monkeypatch.delenv("SHARD_PASSWORD")
            engine._core.pools.dispose()
            with pytest.raises(errors.InvalidArgument, match="SHARD_PASSWORD"):
                engine.connect("t")
    finally:
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute(f"ALTER ROLE canary PASSWORD '{CANARY}'")
        point(cluster, dsn(cluster))


def test_p9_spans_and_metrics_hold_no_password(cluster: LocalCluster) -> None:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(shutdown_on_exit=False), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    options = TelemetryOptions(tracer_provider=tracers, meter_provider=meters)
    assert_clean(repr(options))
    try:
        with ShardedEngine(cluster.url, telemetry=options) as engine:
            with engine.session("t") as session:
                session.scalars(select(Customer)).all()
                session.commit()
            with pytest.raises(ProgrammingError), engine.session("t") as session:
                session.execute(sql_text("SELECT * FROM none_such WHERE password = :given"), {"given": CANARY})
            assert_clean(engine.metrics())
        point(cluster, dsn(cluster, dbname="nowhere"))
        with ShardedEngine(cluster.url, telemetry=options) as engine:
            with pytest.raises(errors.ShardUnavailable), engine.session("t") as session:
                session.scalars(select(Customer)).all()
            assert_clean(engine.metrics())
            assert 'errors_total{error_type="ShardUnavailable",shard="s1"} 1' in engine.metrics()
    finally:
        point(cluster, dsn(cluster))
    spans = [span.to_json() for span in exporter.get_finished_spans()]
    assert len(spans) == 3
    data = reader.get_metrics_data()
    assert data is not None
    assert_clean("".join(spans) + data.to_json())
    tracers.shutdown()
    meters.shutdown()
