"""Turns telemetry on for one engine, as soon as somebody has configured it."""

from __future__ import annotations

import threading

from shardlib.session.core import Core
from shardlib.telemetry import Metrics, Statements, TelemetryOptions
from shardlib.telemetry.metrics import PoolSizes, text_of
from shardlib.telemetry.providers import Exported, export_to, meters, tracer
from shardlib.telemetry.spans import Spans
from shardlib.waits import forget_after_fork

__all__ = ["Observer"]


class Observer:
    """Looks whether telemetry is wanted, when the engine is made and at each new connection.

    So a provider that is set up after the engine is found too; one that is found stays.

    Args:
        core: the engine's inside.
        options: what it may tell.
    """

    def __init__(self, core: Core, options: TelemetryOptions) -> None:
        self._core, self._options = core, options
        self._statements: Statements | None = None
        self._exported: Exported | None = None
        self._lock = threading.Lock()
        forget_after_fork(self)
        self.look()

    def after_fork_in_child(self) -> None:
        """Another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def look(self) -> None:
        """Turn on what has become wanted since the last look."""
        spans = self._options.spans and not self._core.tracing
        if not spans and (self._exported is not None or self._options.metrics is False):
            return
        with self._lock:
            if spans:
                self._trace()
            self._count()

    def _trace(self) -> None:
        found = tracer(self._options.tracer_provider)
        if found is not None and not self._core.tracing:
            self._watched().spans = Spans(found, self._options.query_text)
            self._core.tracing = True

    def _count(self) -> None:
        if self._exported is not None or self._options.metrics is False:
            return
        found = meters(self._options.meter_provider)
        metrics = self._core.metrics
        if metrics is None and (found is not None or self._options.metrics):
            metrics = Metrics(self._shard_id)
            self._watched().metrics = metrics
            self._core.metrics = metrics
        if metrics is not None and found is not None:
            self._exported = export_to(found)
            self._exported.add(metrics, self.pools)

    def _watched(self) -> Statements:
        if self._statements is None:
            self._statements = Statements(self._core.pools.dialect)
        return self._statements

    def _shard_id(self, named: str) -> str:
        shards = self._core.cache.current.shards
        return next((shard.id for shard in shards if named in (shard.name, shard.id)), "")

    def pools(self) -> PoolSizes:
        """Connections by shard and state."""
        return [
            (stats.shard, state, size)
            for stats in self._core.pools.stats()
            for state, size in (("idle", stats.idle), ("in_use", stats.in_use), ("connecting", stats.connecting))
        ]

    def close(self) -> None:
        """The engine is disposed."""
        if self._exported is not None and self._core.metrics is not None:
            self._exported.remove(self._core.metrics)

    def text(self) -> str:
        """See `ShardedEngine.metrics`."""
        return text_of(self._core.metrics, self.pools())
