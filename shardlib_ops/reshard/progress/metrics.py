"""The progress of jobs as metrics in Prometheus' text format. What is not known is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from shardlib.telemetry.metrics import Family, head, sample
from shardlib_ops.reshard.job import Status
from shardlib_ops.reshard.progress.model import JobProgress

__all__ = ["metrics_text"]

_JOB: Final = ("job",)
_TABLE: Final = ("job", "leg", "table")
_STREAM: Final = ("job", "leg", "direction")

ACTIVE: Final = Family("shard_manager_reshard_jobs_active", "gauge", "Jobs that this process runs.")
PROGRESS: Final = Family("shard_manager_reshard_progress", "gauge", "How far a job is, 0 to 1.", _JOB)
STATUS: Final = Family("shard_reshard_status", "gauge", "1 for the status that a job has.", ("job", "status"))
KEYS: Final = Family("shard_reshard_keys", "gauge", "Distinct keys of the moving ranges found.", _JOB)
DELETED: Final = Family("shard_reshard_deleted_rows", "gauge", "Rows that the cleanup has deleted.", _JOB)
WAITING: Final = Family("shard_reshard_waiting", "gauge", "What stands in the way of a switch.", ("job", "kind"))
WARNINGS: Final = Family("shard_reshard_warnings", "gauge", "Warnings of a job, which its progress spells out.", _JOB)
TABLES: Final = (
    (Family("shard_reshard_table_rows", "gauge", "Rows of a table that have arrived.", _TABLE), "rows"),
    (Family("shard_reshard_table_rows_expected", "gauge", "Rows that will, estimated.", _TABLE), "rows_total"),
    (Family("shard_reshard_table_bytes", "gauge", "Bytes of COPY data that have arrived.", _TABLE), "bytes"),
    (Family("shard_reshard_table_rows_per_second", "gauge", "Rows arriving in a second.", _TABLE), "rows_per_s"),
    (Family("shard_reshard_table_bytes_per_second", "gauge", "Bytes arriving in a second.", _TABLE), "bytes_per_s"),
    (Family("shard_reshard_table_eta_seconds", "gauge", "Seconds to the end of a table's copy.", _TABLE), "eta_s"),
)
STREAMS: Final = (
    (Family("shard_reshard_lag_bytes", "gauge", "WAL that is not applied yet.", _STREAM), "lag_bytes"),
    (Family("shard_reshard_lag_seconds", "gauge", "Age of the oldest of it.", _STREAM), "lag_s"),
    (Family("shard_reshard_changes", "gauge", "Row changes applied by this run of a stream.", _STREAM), "changes"),
    (Family("shard_reshard_wal_written_per_second", "gauge", "WAL of the origin.", _STREAM), "written_per_s"),
    (Family("shard_reshard_wal_applied_per_second", "gauge", "WAL worked off.", _STREAM), "applied_per_s"),
    (Family("shard_reshard_eta_seconds", "gauge", "Seconds until a stream has caught up.", _STREAM), "eta_s"),
    (Family("shard_reshard_falls_behind", "gauge", "1 while the origin outruns a stream.", _STREAM), "falls_behind"),
    (Family("shard_reshard_slot_bytes", "gauge", "WAL that is kept for a slot.", _STREAM), "retained_bytes"),
)


def metrics_text(jobs: Sequence[JobProgress]) -> str:
    """Everything that is known of some jobs, in Prometheus' text format 0.0.4."""
    lines = [*head(ACTIVE), sample(ACTIVE.name, {}, sum(not Status(job.status).over for job in jobs))]

    def tell(family: Family, samples: Iterable[tuple[dict[str, str], float | None]]) -> None:
        lines.extend(head(family))
        lines.extend(sample(family.name, labels, value) for labels, value in samples if value is not None)

    tell(PROGRESS, ((_of(job), job.fraction) for job in jobs))
    tell(STATUS, (({**_of(job), "status": job.status}, 1) for job in jobs))
    tell(KEYS, ((_of(job), job.keys) for job in jobs))
    tell(DELETED, ((_of(job), job.deleted_rows) for job in jobs))
    tell(WAITING, _kinds(jobs))
    tell(WARNINGS, ((_of(job), len(job.warnings)) for job in jobs))
    for family, name in TABLES:
        tell(
            family,
            (
                ({**_of(job), "leg": str(one.leg), "table": one.table}, getattr(one, name))
                for job in jobs
                for one in job.tables
            ),
        )
    for family, name in STREAMS:
        tell(
            family,
            (
                ({**_of(job), "leg": str(one.leg), "direction": one.direction}, _number(getattr(one, name)))
                for job in jobs
                for one in job.streams
            ),
        )
    return "\n".join(lines) + "\n"


def _of(job: JobProgress) -> dict[str, str]:
    return {"job": str(job.job)}


def _number(value: float | bool | None) -> float | None:
    return int(value) if isinstance(value, bool) else value


def _kinds(jobs: Sequence[JobProgress]) -> Iterator[tuple[dict[str, str], float]]:
    for job in jobs:
        for kind in sorted({one.kind for one in job.waiting}):
            yield {**_of(job), "kind": kind}, sum(one.kind == kind for one in job.waiting)
