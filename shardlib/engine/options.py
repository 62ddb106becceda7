"""The options of an engine, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shardlib.errors import InvalidArgument
from shardlib.route.consistency import Consistency
from shardlib.route.retry import RetryPolicy
from shardlib.telemetry import TelemetryOptions
from shardlib.token import hash_of

__all__ = ["EngineOptions"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an application may set on an engine beside its pools. Times are seconds.

    Raises:
        InvalidArgument: a value out of its bounds.
    """

    consistency: Consistency = Consistency.STRONG
    hash_function: str | None = None
    """If given, the engine refuses a cluster that uses another one."""
    topology_file: Path | None = None
    """Where the last topology is kept, to start from while the catalog is down. Mode 0600: it holds DSNs."""
    catalog_timeout_s: float = 3.0
    poll_s: float = 30.0
    """How often the catalog is asked beside its watch."""
    reroute_timeout_s: float = 15.0
    """How long work that has not begun waits for a topology that leads it through an open gate."""
    retry: RetryPolicy = RetryPolicy()  # noqa: RUF009 - frozen
    telemetry: TelemetryOptions = TelemetryOptions()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name in ("catalog_timeout_s", "poll_s", "reroute_timeout_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 86_400:
                raise InvalidArgument(name, value, "seconds, more than 0 and at most a day")
        if self.hash_function is not None:
            hash_of(self.hash_function)
