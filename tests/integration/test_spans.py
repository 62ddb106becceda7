"""Spans of statements and COMMITs as an exporter gets them, and what neither they nor the metrics may hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError

from shardlib import ShardedEngine, errors
from shardlib.telemetry import TelemetryOptions
from shardlib_ops import LocalCluster
from tests.support.models import Customer, Order
from tests.support.shop import one_key_a_shard

ROOT = Path(__file__).parent.parent.parent
PLANTED = "planted-value-7341"
SIZE = "shard_router_connection_pool_size"


class Told:
    """Everything that an engine has told to OpenTelemetry."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers, self.meters = TracerProvider(shutdown_on_exit=False), MeterProvider([self.reader])
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.options = TelemetryOptions(tracer_provider=self.tracers, meter_provider=self.meters)

    def spans(self) -> list[ReadableSpan]:
        found = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return found

    def points(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.tracers.shutdown()
    made.meters.shutdown()


@pytest.fixture
def traced(shop: LocalCluster, facade: Any, told: Told) -> Iterator[Any]:
    """The shop through each facade, with an engine that tells; its tables are empty."""
    made = type(facade)(shop.url, pool_size=2, telemetry=told.options)
    yield made
    made.close()


def test_a_statement_and_its_commit_follow_the_conventions(traced: Any, told: Told) -> None:
    key = one_key_a_shard(traced.core)["s2"]

    def work(session: Any) -> None:
        with told.tracers.get_tracer("app").start_as_current_span("request"):
            session.scalars(select(Customer).where(Customer.tenant_id == key)).all()
            session.add(Customer(tenant_id=key, id=1, name=PLANTED))
            session.commit()

    traced.session(work)
    *ours, request = told.spans()
    primary = traced.core.topology.shard("s2").primary
    where = {
        "db.system.name": "postgresql",
        "db.namespace": primary.dbname,
        "server.address": primary.host,
        "server.port": int(primary.port),
        "shardlib.shard.id": "s2",
    }
    routed = {"shardlib.route": "statement", "shardlib.topology.version": traced.core.topology.version}
    of_table = {"db.collection.name": "customer"}
    assert [(span.name, dict(span.attributes or {})) for span in ours] == [
        (
            "SELECT customer",
            {**where, **routed, **of_table, "db.operation.name": "SELECT", "db.query.summary": "SELECT customer"},
        ),
        (
            "INSERT customer",
            {**where, **routed, **of_table, "db.operation.name": "INSERT", "db.query.summary": "INSERT customer"},
        ),
        ("COMMIT", {**where, "db.operation.name": "COMMIT", "db.query.summary": "COMMIT"}),
    ]
    for span in ours:
        assert span.kind is SpanKind.CLIENT
        assert span.status.status_code is StatusCode.UNSET
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert (span.end_time or 0) > (span.start_time or 0)


def test_each_shard_of_a_fan_out_has_its_span_under_the_same_parent(traced: Any, told: Told) -> None:
    def work(session: Any) -> None:
        with told.tracers.get_tracer("app").start_as_current_span("request"):
            session.scalars(select(Customer)).all()

    traced.session(work)
    *ours, request = told.spans()
    shards = [(span.attributes or {})["shardlib.shard.id"] for span in ours]
    assert sorted(map(str, shards)) == ["s1", "s2", "s3"]
    assert {(span.attributes or {})["shardlib.route"] for span in ours} == {"fan_out"}
    assert {span.parent.span_id for span in ours if span.parent} == {request.context.span_id}


def test_pinned_work_joins_and_batches_are_told(traced: Any, told: Told) -> None:
    key = one_key_a_shard(traced.core)["s1"]

    def work(session: Any) -> None:
        session.add(Customer(tenant_id=key, id=1, name="n"))
        session.flush()
        session.execute(select(Order.id).join(Order.customer).where(Order.tenant_id == key)).all()
        session.connection().execute(
            update(Customer.__table__).where(Customer.__table__.c.tenant_id == key).values(name="m"), [{}, {}]
        )

    traced.session(work, key)
    spans = told.spans()
    assert [span.name for span in spans] == ["INSERT customer", "SELECT orders customer", "BATCH UPDATE customer"]
    assert {(span.attributes or {})["shardlib.route"] for span in spans} == {"pinned"}
    batch = spans[-1].attributes or {}
    assert batch["db.operation.name"] == "BATCH UPDATE"
    assert batch["db.operation.batch.size"] == 2
    assert "db.collection.name" not in (spans[1].attributes or {})

    traced.connect(lambda conn: conn.execute(text("/* no word */ SELECT 1")), key)
    traced.connect(lambda conn: conn.exec_driver_sql("select 1"), key)
    raw, plain = told.spans()
    assert (raw.name, plain.name) == ("postgresql", "SELECT")
    assert "db.query.text" not in (raw.attributes or {})


def test_a_failure_has_its_sqlstate_and_no_values(traced: Any, told: Told) -> None:
    def work(session: Any) -> None:
        for _ in range(2):
            session.execute(insert(Customer).values(tenant_id=PLANTED, id=1, name=PLANTED))

    with pytest.raises(IntegrityError, match=PLANTED):
        traced.session(work)
    good, bad = told.spans()
    assert good.status.status_code is StatusCode.UNSET
    assert bad.status.status_code is StatusCode.ERROR
    assert bad.status.description is None
    attributes = bad.attributes or {}
    assert attributes["db.response.status_code"] == attributes["error.type"] == "23505"
    assert not bad.events, "an exception event would hold the error's text"


def everything(told: Told, engine: Any) -> str:
    spans = [span.to_json() for span in told.spans()]
    assert spans
    data = told.reader.get_metrics_data()
    assert data is not None
    return "\n".join([*spans, data.to_json(), engine.metrics()])


@pytest.mark.parametrize("query_text", [False, True])
def test_no_key_value_or_parameter_is_told(shop: LocalCluster, facade: Any, told: Told, query_text: bool) -> None:
    options = TelemetryOptions(
        query_text=query_text, tracer_provider=told.tracers, meter_provider=told.meters, metrics=True
    )
    made = type(facade)(shop.url, telemetry=options)

    def work(session: Any) -> None:
        session.add(Customer(tenant_id=PLANTED, id=1, name=PLANTED, notes=PLANTED))
        session.flush()
        session.scalars(select(Customer).where(Customer.tenant_id == PLANTED, Customer.name.like(f"%{PLANTED}%"))).all()
        session.execute(update(Customer).where(Customer.tenant_id == PLANTED).values(name=f"{PLANTED}-2"))
        session.commit()
        session.execute(insert(Customer).values(tenant_id=PLANTED, id=1, name=PLANTED))

    def mismatch(session: Any) -> None:
        session.scalars(select(Customer).where(Customer.tenant_id == "other")).all()

    try:
        with pytest.raises(IntegrityError):
            made.session(work)
        with pytest.raises(errors.ShardKeyMismatch, match=PLANTED):
            made.session(mismatch, PLANTED)
        said = everything(told, made.engine)
    finally:
        made.close()
    assert ("db.query.text" in said) is query_text
    assert "INSERT customer" in said
    assert PLANTED not in said


def test_the_meter_provider_gets_the_same_figures(traced: Any, told: Told) -> None:
    traced.session(lambda session: session.scalars(select(Customer).where(Customer.tenant_id == "t")).all())
    home = traced.core.shard_for("t").id
    points = told.points()
    (requests,) = points["shard_router_requests_total"]
    assert (dict(requests.attributes), requests.value) == ({"operation": "execute"}, 1)
    (sent,) = points["shard_router_shard_requests_total"]
    assert (dict(sent.attributes), sent.value) == ({"shard": home}, 1)
    (took,) = points["shard_router_request_duration_seconds"]
    assert (took.count, dict(took.attributes)) == (1, {"operation": "execute"})
    sizes = points[SIZE]
    assert {(size.attributes["shard"], size.attributes["state"]): size.value for size in sizes} == {
        (home, "idle"): 1,
        (home, "in_use"): 0,
        (home, "connecting"): 0,
    }
    assert points["shard_router_catalog_cache_hits"][0].value == 1
    assert 'shard_router_requests_total{operation="execute"} 1\n' in traced.engine.metrics()


def test_the_engines_of_a_process_are_added_up_also_when_they_are_disposed(
    shop: LocalCluster, facade: Any, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    del facade
    home = ""
    with ShardedEngine(shop.url, telemetry=told.options) as one, ShardedEngine(shop.url, telemetry=told.options) as two:
        home = one.shard_for("t").id
        for engine in (one, two):
            with engine.session("t") as session:
                session.scalars(select(Customer)).all()
        both = told.points()
    after = told.points()
    assert [point.value for point in both["shard_router_requests_total"]] == [2]
    sizes = {(point.attributes["shard"], point.attributes["state"]): point.value for point in both[SIZE]}
    assert sizes[home, "idle"] == 2
    assert [point.value for point in after["shard_router_requests_total"]] == [2]
    assert SIZE not in after
    assert not caplog.records, "OpenTelemetry complains of names that are taken twice"


LATE = """
import sys
from sqlalchemy import text
from shardlib import ShardedEngine

engine = ShardedEngine(sys.argv[1])
with engine.session("t") as session:
    session.execute(text("SELECT 1"))
assert not [name for name in sys.modules if name.startswith("opentelemetry")], "imported for nobody"

from opentelemetry import trace
with engine.session("t") as session:
    session.execute(text("SELECT 1"))
assert not engine._core.tracing, "the API alone configures nothing"

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
with engine.session("t") as one, engine.session("t") as two:
    one.execute(text("SELECT 1"))
    two.execute(text("SELECT 1"))  # a new connection
assert [span.name for span in exporter.get_finished_spans()] == ["SELECT"], exporter.get_finished_spans()
engine.dispose()
"""


def test_a_provider_that_is_set_late_is_found_and_none_is_imported_before(shop: LocalCluster) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LATE, shop.url], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("spans", 1), ("query_text", None), ("metrics", "yes"), ("tracer_provider", object()), ("meter_provider", 3)],
)
def test_a_wrong_option_is_refused(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(errors.InvalidArgument, match=name):
        TelemetryOptions(**options)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_spans_follow_the_sampling_of_their_parent(shop: LocalCluster, facade: Any, rate: float) -> None:
    exporter = InMemorySpanExporter()
    tracers = TracerProvider(sampler=ParentBased(TraceIdRatioBased(rate)), shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    everything = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)  # does not ask for the parent
    everything.add_span_processor(SimpleSpanProcessor(exporter))

    def traced(provider: TracerProvider) -> list[str]:
        made = type(facade)(shop.url, telemetry=TelemetryOptions(tracer_provider=provider))

        def work(session: Any) -> None:
            with tracers.get_tracer("app").start_as_current_span("request"):
                session.scalars(select(Customer).where(Customer.tenant_id == "t")).all()

        try:
            made.session(work)
            return [span.name for span in exporter.get_finished_spans()]
        finally:
            made.close()
            exporter.clear()

    assert traced(tracers) == (["SELECT customer", "request"] if rate else [])
    assert traced(everything) == (["SELECT customer", "request"] if rate else ["SELECT customer"])
    tracers.shutdown()
    everything.shutdown()
