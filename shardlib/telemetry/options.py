"""What an engine tells, chosen once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from shardlib.checks import FLAG, check_fields, either, has_method

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
        check_fields(_RULES, self)


_RULES: Final = {
    "spans": FLAG,
    "metrics": either(FLAG, None),
    "query_text": FLAG,
    "tracer_provider": either(has_method("get_tracer", "a provider of OpenTelemetry, which has get_tracer()"), None),
    "meter_provider": either(has_method("get_meter", "a provider of OpenTelemetry, which has get_meter()"), None),
}
