"""What a job's work tells of itself, put together: the one place that knows how far the job is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shardlib.topology import Topology
from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.copy import Copied
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.progress.model import TABLES_MAX, JobProgress, StreamProgress, TableProgress, Waiting
from shardlib_ops.reshard.progress.rate import Rate, Trend
from shardlib_ops.reshard.stream import SlotState, Stream
from shardlib_ops.reshard.units import size

__all__ = ["Tracker"]

_log: Final = logging.getLogger("shardlib.reshard.progress")

_COPY_PART: Final = 0.8
_MILLION: Final = 1_000_000
_BEFORE: Final = {
    Status.DELTASYNC: 0.85,
    Status.CUTOVER: 0.9,
    Status.VALIDATION: 0.95,
    Status.CLEANUP: 0.97,
}


@dataclass(slots=True)
class _Table:
    """One table of one leg. `fraction` is 0 for one that is not begun, 1 for one that is whole."""

    estimated_rows: int | None = None
    estimated_bytes: int | None = None
    rows: int = 0
    bytes: int | None = 0
    fraction: float = 0.0
    done: bool = False
    rows_rate: Rate = field(default_factory=Rate)
    bytes_rate: Rate = field(default_factory=Rate)
    read_rate: Rate = field(default_factory=lambda: Rate(30.0))

    def sample(self, now: float) -> None:
        self.rows_rate.sample(now, self.rows)
        self.bytes_rate.sample(now, self.bytes or 0)
        self.read_rate.sample(now, round(self.fraction * _MILLION))


@dataclass(slots=True)
class _Flow:
    trend: Trend
    changes_rate: Rate = field(default_factory=Rate)
    stream: Stream | None = None
    slot: SlotState | None = None
    warned: bool = False


class Tracker:
    """Told by the work of one job how it goes on; costs the work next to nothing, and never waits.

    Not thread-safe: of one event loop.

    Args:
        job: its record.
        topology: as it was when the runner took the job.
        clock: seconds, rising.
        stamp: the wall clock as UTC in ISO 8601.
        trend_s: seconds after which a stream that its origin outruns is told of.
    """

    def __init__(
        self,
        job: Job,
        topology: Topology,
        *,
        clock: Callable[[], float],
        stamp: Callable[[], str],
        trend_s: float = 60.0,
    ) -> None:
        self.job, self._clock, self._stamp, self._trend_s = job, clock, stamp, trend_s
        self._names = {shard.id: shard.name for shard in topology.shards}
        self._legs = {leg.number: leg for leg in job.legs}
        tables = [table.fullname for table in topology.tables if not table.reference]
        self._tables = {(leg.number, table): _Table() for leg in job.legs for table in tables}
        self._flows: dict[tuple[int, Direction], _Flow] = {}
        self._keys: dict[int, int] = {}
        self._keys_exact: set[int] = set()
        self._keys_before: tuple[int, bool] | None = None
        self._deleted: dict[str, int] = {}
        self._activity, self._since = "", clock()
        self.waiting: tuple[Waiting, ...] = ()
        """What stands in the way of a switch, as it was last looked for."""

    # Told by the work

    def goes_on(self, before: JobProgress | None) -> None:
        """An earlier runner was so far, as it told; what this one does not do again stays known."""
        if before is None:
            return
        for told in before.tables:
            found = self._tables.get((told.leg, told.table))
            if found is not None and told.done and not found.done:
                found.rows, found.bytes, found.fraction, found.done = told.rows, told.bytes, 1.0, True
        if before.keys is not None:
            self._keys_before = (before.keys, before.keys_exact)

    def saved(self, job: Job) -> None:
        """The job's record is this now."""
        if job.attempts > self.job.attempts:
            self.begins("switch")
        elif job.status is not self.job.status and job.status is Status.VALIDATION:
            self.begins("stream")
        self.job = job

    def begins(self, activity: str) -> None:
        """The runner turns to something else."""
        if activity != self._activity:
            self._activity, self._since = activity, self._clock()
            self._sample_tables(self._since)

    def _sample_tables(self, now: float) -> None:
        """While rows are copied, those of tables whose first chunk is under way too: it is the start of their rate."""
        if self._activity == "copy":
            for table in self._tables.values():
                if not table.done:
                    table.sample(now)

    @property
    def activity(self) -> str:
        """What the runner is at."""
        return self._activity

    def copy_begins(self, leg: int, *, anew: bool) -> None:
        """A leg is copied: all of it, or what is not whole yet."""
        for (number, _), table in self._tables.items():
            if number == leg and (anew or not table.done):
                table.rows, table.bytes, table.fraction, table.done = 0, 0, 0.0, False
        self._keys_exact.discard(leg)
        self._keys_before = None

    def keys(self, leg: int, found: int, *, exact: bool = False) -> None:
        """So many distinct keys of a leg were found; all of them, if `exact`."""
        self._keys[leg] = found
        if exact:
            self._keys_exact.add(leg)

    def copied(self, leg: int, told: Copied) -> None:
        """The copy of a table has gone on, or is whole."""
        table = self._tables.get((leg, told.table))
        if table is None:
            return
        table.rows, table.bytes, table.fraction = told.rows, told.bytes, told.fraction
        table.done = told.fraction >= 1
        table.sample(self._clock())

    def deleted(self, shard_id: str, rows: int) -> None:
        """The cleanup has deleted so many rows of a shard."""
        self._deleted[shard_id] = rows

    def opened(self, leg: int, direction: Direction, stream: Stream | None) -> None:
        """A stream runs, or not any more."""
        flow = self._flow(leg, direction)
        flow.stream = stream
        flow.trend.reset()

    def slot_seen(self, leg: int, direction: Direction, state: SlotState | None) -> None:
        """How a slot is; None if it is not there, or its server does not answer."""
        self._flow(leg, direction).slot = state

    def _flow(self, leg: int, direction: Direction) -> _Flow:
        found = self._flows.get((leg, direction))
        if found is None:
            found = self._flows[leg, direction] = _Flow(Trend(self._trend_s))
        return found

    # Told by who looks at the servers

    def estimated(self, leg: int, table: str, rows: int | None, size_bytes: int | None) -> None:
        """About how much of a table moves with a leg."""
        if (found := self._tables.get((leg, table))) is not None:
            found.estimated_rows, found.estimated_bytes = rows, size_bytes

    def whole(self, leg: int, table: str, rows: int) -> None:
        """A table was copied whole, by an earlier runner or this one."""
        found = self._tables.get((leg, table))
        if found is not None and not found.done:
            found.rows, found.bytes, found.fraction, found.done = rows, None, 1.0, True

    def sample(self) -> None:
        """Look at tables and streams; once a second is often enough. Logs, once, that a stream falls behind."""
        now = self._clock()
        self._sample_tables(now)
        for (leg, direction), flow in self._flows.items():
            stream = flow.stream
            if stream is None:
                continue
            flow.changes_rate.sample(now, stream.changes_applied)
            if stream.held:
                flow.trend.reset()
                continue
            if (written := stream.origin_end) is not None:
                flow.trend.sample(now, written, stream.applied)
            if flow.trend.falls_behind and not flow.warned:
                _log.warning("job %d: %s", self.job.id, self._behind(leg, direction, flow))
            flow.warned = flow.trend.falls_behind

    # Told to others

    def progress(self) -> JobProgress:
        """How far the job is now."""
        tables = sorted(self._tables.items(), key=_under_way_first)
        keys, exact = self._found()
        return JobProgress(
            job=self.job.id,
            at=self._stamp(),
            status=self.job.status.value,
            activity="" if self.job.status.over else self._activity,
            activity_s=round(self._clock() - self._since, 1),
            fraction=round(self._fraction(), 4),
            keys=keys,
            keys_exact=exact,
            tables=tuple(_table(leg, name, table) for (leg, name), table in tables[:TABLES_MAX]),
            tables_left_out=max(0, len(tables) - TABLES_MAX),
            streams=tuple(
                _stream(leg, direction, flow)
                for (leg, direction), flow in sorted(self._flows.items())
                if flow.stream is not None or flow.slot is not None
            ),
            deleted_rows=sum(self._deleted.values()) if self._deleted else None,
            waiting=self.waiting,
            warnings=tuple(self._warnings()),
        )

    def _found(self) -> tuple[int | None, bool]:
        """How many keys were found, and whether all."""
        if not self._keys:
            return self._keys_before or (None, False)
        return sum(self._keys.values()), len(self._keys_exact) == len(self._legs)

    def _fraction(self) -> float:
        status = self.job.status
        if status.over:
            return 1.0
        if status is not Status.PRECOPY:
            return _BEFORE.get(status, 0.0)
        if not self._tables:
            return 0.0
        sizes = [table.estimated_bytes for table in self._tables.values()]
        known = [one for one in sizes if one is not None]
        # A table of unknown size counts like the average one; without any size all count alike.
        usual = max(1, sum(known) // len(known)) if known else 1
        weights = [usual if one is None else max(1, one) for one in sizes]
        read = sum(weight * table.fraction for weight, table in zip(weights, self._tables.values(), strict=True))
        return _COPY_PART * read / sum(weights)

    def _ends(self, leg: int, direction: Direction) -> tuple[str, str]:
        found = self._legs[leg]
        source, target = self._names.get(found.source, found.source), self._names.get(found.target, found.target)
        return (source, target) if direction == "forward" else (target, source)

    def _behind(self, leg: int, direction: Direction, flow: _Flow) -> str:
        origin, sink = self._ends(leg, direction)
        written, applied = flow.trend.written_per_s or 0.0, flow.trend.applied_per_s or 0.0
        return (
            f"shard {origin!r} writes {size(written)} of WAL a second and shard {sink!r} takes {size(applied)}, so that"
            f" the stream falls behind and will not catch up: write less to {origin!r}, give {sink!r} more to work"
            " with, or cancel the job and run it at a quieter time"
        )

    def _warnings(self) -> list[str]:
        said: list[str] = []
        for (leg, direction), flow in sorted(self._flows.items()):
            if flow.stream is not None and flow.trend.falls_behind:
                said.append(self._behind(leg, direction, flow))
            if flow.slot is not None and (status := flow.slot.wal_status) in ("unreserved", "lost"):
                origin, _ = self._ends(leg, direction)
                said.append(
                    f"the slot of leg {leg} on shard {origin!r} is past max_slot_wal_keep_size ({status}): its WAL "
                    + ("is removed" if status == "lost" else "may be removed at the next checkpoint")
                )
        return said


def _under_way_first(item: tuple[tuple[int, str], _Table]) -> tuple[int, int, str]:
    (leg, name), table = item
    return (2 if table.done else 1 if table.fraction == 0 else 0), leg, name


def _table(leg: int, name: str, table: _Table) -> TableProgress:
    rows_total, bytes_total, eta_s = table.estimated_rows, table.estimated_bytes, None
    if table.done:
        rows_total, bytes_total, eta_s = table.rows, table.bytes, 0.0
    elif table.fraction > 0 and table.rows > 0:
        # What was read tells more than the statistics of the server.
        rows_total = round(table.rows / table.fraction)
        bytes_total = None if table.bytes is None else round(table.bytes / table.fraction)
    moving = table.fraction > 0 and not table.done
    if moving and (read_per_s := table.read_rate.per_s):
        eta_s = (1.0 - table.fraction) * _MILLION / read_per_s
    return TableProgress(
        leg=leg,
        table=name,
        rows=table.rows,
        rows_total=rows_total,
        bytes=table.bytes,
        bytes_total=bytes_total,
        fraction=table.fraction,
        rows_per_s=table.rows_rate.per_s if moving else None,
        bytes_per_s=table.bytes_rate.per_s if moving else None,
        eta_s=eta_s,
        done=table.done,
    )


def _stream(leg: int, direction: Direction, flow: _Flow) -> StreamProgress:
    stream, slot = flow.stream, flow.slot
    return StreamProgress(
        leg=leg,
        direction=direction,
        lag_bytes=None if stream is None else stream.lag_bytes,
        lag_s=None if stream is None else stream.lag_s,
        changes=None if stream is None else stream.changes_applied,
        changes_per_s=None if stream is None else flow.changes_rate.per_s,
        written_per_s=None if stream is None else flow.trend.written_per_s,
        applied_per_s=None if stream is None else flow.trend.applied_per_s,
        eta_s=None if stream is None else flow.trend.eta_s,
        held=stream is not None and stream.held,
        falls_behind=stream is not None and flow.trend.falls_behind,
        retained_bytes=None if slot is None else slot.retained_bytes,
        wal_status=None if slot is None else slot.wal_status,
    )
