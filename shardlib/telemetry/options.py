"""What an engine tells, chosen once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shardlib.errors import InvalidArgument

__all__ = ["TelemetryOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryOptions:
    """What an engine tells of its work. The defaults cost nothing until OpenTelemetry is configured in the process.

    Raises:
        InvalidArgument: a value of the wrong type.
    """

    spans: bool = True
    """A span for each statement and COMMIT, once a tracer provider is configured."""
    metrics: bool | None = None
    """Count in the process. None: once a meter provider is configured; True: always, for `engine.metrics()`."""
    query_text: bool = False
    """Put the text of statements into spans (`db.query.text`). Parameters are not in it, but literals of your own
    SQL are."""
    tracer_provider: Any = field(default=None, repr=False)
    """Of OpenTelemetry; None: the one of the process."""
    meter_provider: Any = field(default=None, repr=False)
    """Of OpenTelemetry; None: the one of the process."""

    def __post_init__(self) -> None:
        for name in ("spans", "query_text"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(name, getattr(self, name), "True or False")
        if not (self.metrics is None or isinstance(self.metrics, bool)):
            raise InvalidArgument("metrics", self.metrics, "True, False or None")
        for name, method in (("tracer_provider", "get_tracer"), ("meter_provider", "get_meter")):
            given = getattr(self, name)
            if given is not None and not callable(getattr(given, method, None)):
                raise InvalidArgument(name, given, f"a provider of OpenTelemetry, which has {method}()")
