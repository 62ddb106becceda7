"""What telemetry adds to a transaction: BARS of OpenTelemetry installed and not configured, and configured.

A transaction selects a row by key, inserts one and commits: three spans, inside a span of the application that is
sampled or not. All candidates are engines over one server; each kind has several, since each backend has its own luck,
and they take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count as counter
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer
from sqlalchemy import select

from benchmarks.report import Row, at_most
from benchmarks.transaction import KEYS, Item, fill, one_core_for_the_client, turns
from shardlib import ShardedEngine
from shardlib.telemetry import TelemetryOptions
from shardlib_ops import LocalCluster

__all__ = ["run"]

ENGINES = 4
SAMPLED = 0.01


def run(scale: float) -> list[Row]:
    """Rows of the section `tracing`."""
    rounds = max(60, int(4000 * scale))
    tracers = TracerProvider(sampler=ParentBased(TraceIdRatioBased(SAMPLED)), shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    meters = MeterProvider([InMemoryMetricReader()])
    kinds = {
        "absent": TelemetryOptions(spans=False, metrics=False),
        "not configured": TelemetryOptions(),  # the API is imported above, and this process has no providers
        "spans": TelemetryOptions(tracer_provider=tracers, metrics=False),
        "all": TelemetryOptions(tracer_provider=tracers, meter_provider=meters),
    }
    with LocalCluster(shards=1) as cluster, ExitStack() as stack:
        with ShardedEngine(cluster.url) as engine:
            fill(engine)
        candidates = {
            kind: transactions(
                [stack.enter_context(ShardedEngine(cluster.url, telemetry=options)) for _ in range(ENGINES)],
                number,
                tracers.get_tracer("application"),
            )
            for number, (kind, options) in enumerate(kinds.items(), 1)
        }
        with one_core_for_the_client(cluster):
            took = {kind: seconds * 1e6 for kind, seconds in turns(candidates, rounds).items()}
    tracers.shutdown()
    meters.shutdown()

    def row(what: str, kind: str, limit: float) -> Row:
        return at_most("tracing", f"ORM select, insert, commit; {what}", took[kind], took["absent"], "us", limit)

    return [
        row("OpenTelemetry not configured", "not configured", 1.01),
        row("spans, 1 % sampled", "spans", 1.05),
        row("spans, 1 % sampled, and metrics", "all", 1.05),
    ]


def transactions(engines: list[ShardedEngine], number: int, tracer: Tracer) -> Callable[[], object]:
    """One transaction a call, by one engine after the other."""
    ids = counter(number * 10_000_000)
    turn = counter()
    statement: Any = select(Item).where(Item.tenant == KEYS[0], Item.id == 1)

    def work() -> None:
        engine = engines[next(turn) % len(engines)]
        with tracer.start_as_current_span("request"), engine.session(KEYS[0]) as session:
            session.scalars(statement).one()
            session.add(Item(tenant=KEYS[0], id=next(ids), name="new"))
            session.commit()

    return work
