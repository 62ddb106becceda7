"""How far a job is, for whoever is on duty: gathered from its work, written beside its record, shown and counted.

Nothing here holds up the work, and nothing that goes wrong here is a fault of the job.
"""

from shardlib_ops.reshard.progress.look import Observer
from shardlib_ops.reshard.progress.metrics import metrics_text
from shardlib_ops.reshard.progress.model import JobProgress, StreamProgress, TableProgress, Waiting
from shardlib_ops.reshard.progress.report import reported
from shardlib_ops.reshard.progress.tracker import Tracker

__all__ = [
    "JobProgress",
    "Observer",
    "StreamProgress",
    "TableProgress",
    "Tracker",
    "Waiting",
    "metrics_text",
    "reported",
]
