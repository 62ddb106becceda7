"""What an engine tells of its work: counters in the process, and OpenTelemetry spans and metrics where configured.

Nothing here holds a shard key, a value of a row, a parameter, the text of an error or a secret of a DSN.
"""

from shardlib.telemetry.metrics import Metrics, blame
from shardlib.telemetry.options import TelemetryOptions
from shardlib.telemetry.statements import Statements

__all__ = ["Metrics", "Statements", "TelemetryOptions", "blame"]
