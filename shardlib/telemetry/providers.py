"""OpenTelemetry as the application has set it up, found without importing it for those who have not."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from shardlib.telemetry.metrics import BUCKETS_S, COUNTERS, DURATION, POOL_SIZE, Family, Metrics, PoolSizes

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.trace import Tracer

__all__ = ["export", "meter", "tracer"]

_NAME: Final = "shardlib"


def tracer(given: Any) -> Tracer | None:
    """A tracer of the given provider or else of the process; None if none is configured."""
    provider = given if given is not None else _configured("opentelemetry.trace", "get_tracer_provider")
    return None if provider is None else provider.get_tracer(_NAME, version(_NAME))


def meter(given: Any) -> Meter | None:
    """A meter of the given provider or else of the process; None if none is configured."""
    provider = given if given is not None else _configured("opentelemetry.metrics", "get_meter_provider")
    return None if provider is None else provider.get_meter(_NAME, version(_NAME))


def _configured(module: str, getter: str) -> Any:
    """The provider of the process. Those that the API itself defines stand for none."""
    api = sys.modules.get(module)
    if api is None:
        return None
    provider = getattr(api, getter)()
    return None if type(provider).__module__.startswith(module) else provider


def export(meter: Meter, metrics: Metrics, pools: Callable[[], PoolSizes]) -> None:
    """Give the counters to OpenTelemetry, which asks for them whenever it collects. Keeps none of them alive.

    Args:
        meter: makes the instruments.
        metrics: asked at each collection.
        pools: the same; a bound method, kept by a weak reference.
    """
    from opentelemetry.metrics import Observation

    known, sizes = weakref.ref(metrics), weakref.WeakMethod(pools)

    def counted(family: Family, options: CallbackOptions) -> Iterable[Observation]:
        del options
        there = known()
        return [] if there is None else [Observation(value, labels) for labels, value in there.counts(family)]

    def pooled(options: CallbackOptions) -> Iterable[Observation]:
        del options
        ask = sizes()
        found = [] if ask is None else ask()
        return [Observation(size, {"shard": shard, "state": state}) for shard, state, size in found]

    for family in COUNTERS:
        meter.create_observable_counter(family.name, [partial(counted, family)], description=family.help)
    meter.create_observable_gauge(POOL_SIZE.name, [pooled], description=POOL_SIZE.help)
    metrics.histogram = meter.create_histogram(
        DURATION.name, "s", DURATION.help, explicit_bucket_boundaries_advisory=BUCKETS_S
    )
