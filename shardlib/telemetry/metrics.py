"""Counters of one engine in one process, and their text in Prometheus' format."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol

import psycopg

from shardlib.fence.connection import UnknownCommit
from shardlib.waits import forget_after_fork

__all__ = [
    "BUCKETS_S", "COUNTERS", "DURATION", "POOL_SIZE", "Family", "Metrics", "Observed", "PoolSizes", "blame", "head",
    "sample", "text_of",
]  # fmt: skip

PoolSizes = Iterable[tuple[str, str, int]]
"""Shard id, state (`idle`, `in_use`, `connecting`), connections."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, what it tells, and the names of its labels."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


REQUESTS: Final = Family(
    "shard_router_requests_total", "counter", "Calls of the application that were routed.", ("operation",)
)
DURATION: Final = Family(
    "shard_router_request_duration_seconds", "histogram", "How long those calls took.", ("operation",)
)
ERRORS: Final = Family(
    "shard_router_errors_total",
    "counter",
    "Calls and COMMITs that ended in an error; shard is empty where none is to blame.",
    ("error_type", "shard"),
)
SHARD_REQUESTS: Final = Family(
    "shard_router_shard_requests_total", "counter", "Statements and COMMITs sent to a shard.", ("shard",)
)
REFUSALS: Final = Family(
    "shard_router_fence_refusals_total", "counter", "Transactions refused by a closed gate as they began.", ("shard",)
)
CACHE_HITS: Final = Family(
    "shard_router_catalog_cache_hits", "counter", "Routing decisions taken by the topology in memory."
)
POOL_SIZE: Final = Family(
    "shard_router_connection_pool_size", "gauge", "Connections to the shard, by state.", ("shard", "state")
)
COUNTERS: Final = (REQUESTS, ERRORS, SHARD_REQUESTS, REFUSALS, CACHE_HITS)
BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Upper bounds, those that OpenTelemetry's conventions give for `db.client.operation.duration`."""

_PENDING_MAX: Final = 128
_SHARD: Final = "_shardlib_shard"
_TOLD: Final = frozenset(("shardlib", "sqlalchemy", "psycopg", "builtins", "asyncio"))
_DRIVER: Final = (
    psycopg.IntegrityError, psycopg.OperationalError, psycopg.ProgrammingError, psycopg.DataError,
    psycopg.InternalError, psycopg.NotSupportedError,
)  # fmt: skip


class Observed(Protocol):
    """What makes requests: it is in one of them at a time."""

    observed: bool


class Metrics:
    """The counters of an engine. Thread-safe; a forked child starts from zero.

    Args:
        shard_id_of: the id of a shard by its name or id.
    """

    def __init__(self, shard_id_of: Callable[[str], str] = str) -> None:
        self._shard_id_of = shard_id_of
        self.histogram: Any = None
        """OpenTelemetry's, told of each duration too, by `flush`."""
        self._reset()
        forget_after_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Family, dict[tuple[str, ...], int]] = {ERRORS: {}, SHARD_REQUESTS: {}, REFUSALS: {}}
        self._routed = 0
        self._pending: list[tuple[str, float]] = []
        self._durations: dict[str, tuple[list[int], list[float]]] = {}

    def after_fork_in_child(self) -> None:
        """The parent counts on; its figures are not ours."""
        self._reset()

    def _count(self, family: Family, *labels: str) -> None:
        with self._lock:
            counts = self._counts[family]
            counts[labels] = counts.get(labels, 0) + 1

    def routed(self) -> None:
        """A routing decision was taken by the topology in memory."""
        with self._lock:
            self._routed += 1

    def sent(self, shard_id: str) -> None:
        """A statement or COMMIT goes to a shard."""
        self._count(SHARD_REQUESTS, shard_id)

    def refused(self, shard: str) -> None:
        """A shard has refused a transaction as it began."""
        self._count(REFUSALS, self._shard_id_of(shard))

    def failed(self, error: BaseException, shard_id: str | None = None) -> None:
        """A request has ended in an error."""
        self._count(ERRORS, _type_of(error), self._blamed(error) if shard_id is None else shard_id)

    def request(self, operation: str, by: Observed | None = None) -> Request:
        """Count and time what is done inside, as one request; `by` is told that it is in one."""
        return Request(self, operation, by)

    def done(self, operation: str, seconds: float) -> None:
        """A request has ended, well or not."""
        place = bisect_left(BUCKETS_S, seconds)
        with self._lock:
            found = self._durations.get(operation)
            if found is None:
                found = self._durations[operation] = ([0] * (len(BUCKETS_S) + 1), [0.0])
            found[0][place] += 1
            found[1][0] += seconds
            if self.histogram is None:
                return
            self._pending.append((operation, seconds))
            if len(self._pending) < _PENDING_MAX:
                return
        self.flush()

    def flush(self) -> None:
        """Hand the durations of late to OpenTelemetry: many at once take a fifth of the time that one by one do."""
        with self._lock:
            pending, self._pending = self._pending, []
        for operation, seconds in pending:
            self.histogram.record(seconds, {"operation": operation})

    def counts(self, family: Family) -> dict[tuple[str, ...], int]:
        """The values of a counter, by the values of its labels."""
        with self._lock:
            if family is CACHE_HITS:
                return {(): self._routed}
            if family is REQUESTS:
                return {(name,): sum(buckets) for name, (buckets, _) in sorted(self._durations.items())}
            return dict(sorted(self._counts[family].items()))

    def durations(self) -> dict[str, tuple[list[int], float]]:
        """By operation: requests in each bucket (the last one has no bound), and the sum of their seconds."""
        with self._lock:
            return {name: (list(buckets), total[0]) for name, (buckets, total) in sorted(self._durations.items())}

    def _blamed(self, error: BaseException) -> str:
        driver_error = getattr(error, "orig", None) or error
        known = driver_error.__dict__.get(_SHARD)
        if known is not None:
            return str(known)
        name = getattr(error, "shard", None)
        return self._shard_id_of(name) if isinstance(name, str) else ""


def blame(error: BaseException, shard_id: str) -> None:
    """Note on a driver's error where it came from."""
    if isinstance(error, psycopg.Error):
        error.__dict__[_SHARD] = shard_id


def _type_of(error: BaseException) -> str:
    """The class that the application meets. Never its text, and few names: each is a time series."""
    if isinstance(error, UnknownCommit):
        return "CommitOutcomeUnknown"
    for base in _DRIVER:  # SQLAlchemy shows a driver's error as a class of its own with this name
        if isinstance(error, base):
            return base.__name__
    return type(error).__name__ if type(error).__module__.partition(".")[0] in _TOLD else "other"


class Request:
    """Times one request. Use as a context manager."""

    __slots__ = ("_began", "_by", "_metrics", "_operation")

    def __init__(self, metrics: Metrics, operation: str, by: Observed | None) -> None:
        self._metrics, self._operation, self._by = metrics, operation, by

    def __enter__(self) -> None:
        if self._by is not None:
            self._by.observed = True
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._began
        if self._by is not None:
            self._by.observed = False
        if error is not None:
            self._metrics.failed(error)
        self._metrics.done(self._operation, seconds)


def text_of(metrics: Metrics | None, pools: PoolSizes) -> str:
    """Everything in Prometheus' text format 0.0.4. Without `metrics`, what nobody counts is left out."""
    lines: list[str] = []
    if metrics is not None:
        for family in COUNTERS:
            lines += head(family)
            for values, count in metrics.counts(family).items():
                lines.append(sample(family.name, dict(zip(family.labels, values, strict=True)), count))
        lines += head(DURATION)
        for operation, (buckets, total) in metrics.durations().items():
            labels = {"operation": operation}
            below = 0
            for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), buckets, strict=True):
                below += count
                lines.append(sample(f"{DURATION.name}_bucket", {**labels, "le": bound}, below))
            lines.append(sample(f"{DURATION.name}_sum", labels, total))
            lines.append(sample(f"{DURATION.name}_count", labels, below))
    lines += head(POOL_SIZE)
    lines += [sample(POOL_SIZE.name, {"shard": shard, "state": state}, size) for shard, state, size in pools]
    return "\n".join(lines) + "\n"


def head(family: Family) -> list[str]:
    """What stands before the samples of a metric."""
    return [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """The line of one value."""
    shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{shown}}} {value}" if shown else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
