"""The options of an engine, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardlib.catalog import POLL_S
from shardlib.checks import FLAG, FUNCTION, PATH, check_fields, either, instance, listing, seconds, whole
from shardlib.route.consistency import Consistency
from shardlib.route.retry import RetryPolicy
from shardlib.shard.options import Echo
from shardlib.telemetry import TelemetryOptions
from shardlib.token import hash_of

__all__ = ["CALLS", "EngineOptions"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an application may set on an engine beside its pools. Times are seconds.

    Raises:
        InvalidArgument: a value out of its bounds.
    """

    consistency: Consistency = Consistency.STRONG
    hash_function: str | None = None
    """If given, the engine refuses a cluster that uses another one."""
    topology_file: str | Path | None = None
    """Where the last topology is kept, to start from while the catalog is down. Mode 0600: it holds DSNs."""
    catalog_timeout_s: float = 3.0
    poll_s: float = POLL_S
    """How often the catalog is asked beside its watch."""
    reroute_timeout_s: float = 15.0
    """How long work that has not begun waits for a topology that leads it through an open gate, and for a server to
    begin it (or `connect_timeout_s`, if that is longer)."""
    retry: RetryPolicy = RetryPolicy()  # noqa: RUF009 - frozen
    telemetry: TelemetryOptions = TelemetryOptions()  # noqa: RUF009 - frozen
    echo: Echo = False

    def __post_init__(self) -> None:
        check_fields(_RULES, self)
        if self.hash_function is not None:
            hash_of(self.hash_function)


_DAY: Final = seconds(most=86_400)
_RULES: Final = {
    "hash_function": either(instance(str, "'murmur3', 'xxhash'"), None),
    "topology_file": either(PATH, None),
    "catalog_timeout_s": _DAY,
    "poll_s": _DAY,
    "reroute_timeout_s": _DAY,
    "retry": instance(RetryPolicy, "a RetryPolicy, such as RetryPolicy(attempts_max=3)"),
    "telemetry": instance(TelemetryOptions, "a TelemetryOptions, such as TelemetryOptions(metrics=True)"),
    "echo": either(FLAG, "debug"),
}
CALLS: Final = {
    "columns": either(listing("a list of columns or their names"), None),
    "progress": either(FUNCTION, None),
    "batch_rows": either(whole(1), None),
    "stall_timeout_s": seconds(),
    "app_roles": listing("a list of names of roles", str),
    "older_than_s": seconds(zero=True),
}
"""Options of the engine's methods."""
