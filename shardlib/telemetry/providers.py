"""OpenTelemetry as the application has set it up, found without importing it for those who have not."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from shardlib.telemetry.metrics import BUCKETS_S, COUNTERS, DURATION, POOL_SIZE, Family, Metrics, PoolSizes
from shardlib.waits import forget_after_fork

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.trace import Tracer

__all__ = ["Exported", "export_to", "meters", "tracer"]

_NAME: Final = "shardlib"


def tracer(given: Any) -> Tracer | None:
    """A tracer of the given provider or else of the process; None if none is configured."""
    provider = given if given is not None else _configured("opentelemetry.trace", "get_tracer_provider")
    return None if provider is None else provider.get_tracer(_NAME, version(_NAME))


def meters(given: Any) -> Any:
    """The given meter provider or else that of the process; None if none is configured."""
    return given if given is not None else _configured("opentelemetry.metrics", "get_meter_provider")


def _configured(module: str, getter: str) -> Any:
    """The provider of the process. Those that the API itself defines stand for none."""
    api = sys.modules.get(module)
    if api is None:
        return None
    provider = getattr(api, getter)()
    return None if type(provider).__module__.startswith(module) else provider


class Exported:
    """What the engines of this process give to one meter provider: their figures, added up.

    The provider asks whenever it collects. Counters of an engine that is disposed stay in the sums, since a sum that
    falls would be taken for a restart. Keeps no engine alive.

    Args:
        meter: makes the instruments.
    """

    def __init__(self, meter: Meter) -> None:
        self._engines: weakref.WeakKeyDictionary[Metrics, weakref.WeakMethod[Callable[[], PoolSizes]]]
        self._engines = weakref.WeakKeyDictionary()
        self._reset()
        forget_after_fork(self)
        for family in COUNTERS:
            meter.create_observable_counter(family.name, [partial(self._counted, family)], description=family.help)
        meter.create_observable_gauge(POOL_SIZE.name, [self._pooled], description=POOL_SIZE.help)
        self._histogram = meter.create_histogram(
            DURATION.name, "s", DURATION.help, explicit_bucket_boundaries_advisory=BUCKETS_S
        )

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._ended: dict[Family, Counter[tuple[str, ...]]] = {family: Counter() for family in COUNTERS}

    def after_fork_in_child(self) -> None:
        """What the parent's engines counted is not ours."""
        self._reset()

    def add(self, metrics: Metrics, pools: Callable[[], PoolSizes]) -> None:
        """Include an engine from now on. `pools` is a bound method."""
        with self._lock:
            self._engines[metrics] = weakref.WeakMethod(pools)
        metrics.histogram = self._histogram

    def remove(self, metrics: Metrics) -> None:
        """The engine is disposed; idempotent."""
        with self._lock:
            if self._engines.pop(metrics, None) is not None:
                metrics.flush()
                for family, sums in self._ended.items():
                    sums.update(metrics.counts(family))

    def _counted(self, family: Family, options: CallbackOptions) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation

        del options
        with self._lock:
            sums = self._ended[family].copy()
            for metrics in list(self._engines):
                metrics.flush()  # histograms are collected after all that is asked for
                sums.update(metrics.counts(family))
        return [Observation(value, dict(zip(family.labels, labels, strict=True))) for labels, value in sums.items()]

    def _pooled(self, options: CallbackOptions) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation

        del options
        with self._lock:
            asked = [ask for known in self._engines.values() if (ask := known()) is not None]
        sums: Counter[tuple[str, str]] = Counter()
        for ask in asked:
            for shard, state, size in ask():
                sums[shard, state] += size
        return [Observation(size, {"shard": shard, "state": state}) for (shard, state), size in sums.items()]


def export_to(provider: Any) -> Exported:
    """The one `Exported` of a meter provider: a name may be taken only once."""
    return _known.exported(provider)


class _Known:
    """What there is, by meter provider."""

    def __init__(self) -> None:
        self._by_provider: weakref.WeakKeyDictionary[Any, Exported] = weakref.WeakKeyDictionary()
        self.after_fork_in_child()
        forget_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def exported(self, provider: Any) -> Exported:
        with self._lock:
            found = self._by_provider.get(provider)
            if found is None:
                found = self._by_provider[provider] = Exported(provider.get_meter(_NAME, version(_NAME)))
            return found


_known = _Known()
