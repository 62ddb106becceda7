"""How far a job is, as it is written beside its record, shown and counted. What is not known is None, never 0."""

from __future__ import annotations

from typing import Literal

import msgspec

from shardlib.errors import InvalidTopology
from shardlib_ops.reshard.control import Direction

__all__ = [
    "TABLES_MAX",
    "JobProgress",
    "StreamProgress",
    "TableProgress",
    "Waiting",
    "decode_progress",
    "encode_progress",
]

TABLES_MAX = 200
"""So many tables are told of one by one: a record in a catalog has to stay small."""


class TableProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The copy of one table of one leg.

    Attributes:
        leg: number of the leg.
        table: full name of the table.
        rows: that have arrived.
        rows_total: that will; an estimate until `done`.
        bytes: of COPY data that have arrived; None for what an earlier runner copied.
        bytes_total: that will. Until the first rows are there this is the size on the source's disk.
        fraction: of the table that was read, 0 to 1.
        rows_per_s: of late.
        bytes_per_s: of late.
        eta_s: seconds to its end, at that rate.
        done: whether it was copied whole; then `rows_total` is exact.
    """

    leg: int
    table: str
    rows: int = 0
    rows_total: int | None = None
    bytes: int | None = 0
    bytes_total: int | None = None
    fraction: float | None = None
    rows_per_s: float | None = None
    bytes_per_s: float | None = None
    eta_s: float | None = None
    done: bool = False


class StreamProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The stream of one leg in one direction, and its slot.

    Attributes:
        leg: number of the leg.
        direction: `forward` until the switch, `reverse` after it.
        lag_bytes: WAL of the origin that is not applied.
        lag_s: age of the oldest of that, in seconds.
        changes: row changes applied since this runner opened the stream.
        changes_per_s: of late.
        written_per_s: bytes of WAL that the origin writes in a second, of late.
        applied_per_s: bytes of WAL of the origin that are worked off in a second, of late.
        eta_s: seconds until it has caught up; None also if it will not at this rate.
        held: whether it stands still for a comparison.
        falls_behind: whether the origin has outrun it for as long as the trend is looked at.
        retained_bytes: WAL that the origin keeps for the slot.
        wal_status: of the slot: `reserved`, `extended`, `unreserved` or `lost`.
    """

    leg: int
    direction: Direction
    lag_bytes: int | None = None
    lag_s: float | None = None
    changes: int | None = None
    changes_per_s: float | None = None
    written_per_s: float | None = None
    applied_per_s: float | None = None
    eta_s: float | None = None
    held: bool = False
    falls_behind: bool = False
    retained_bytes: int | None = None
    wal_status: str | None = None


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the way of a switch.

    Attributes:
        kind: `transaction` holds a moving gate, as does a `prepared` one; a `foreign_writer` writes without one; a
            `replica` has not replayed; a `stream` is behind.
        shard: name of the shard.
        text: all of it in words.
        pid: of the backend.
        gid: of a prepared transaction.
        user: whose transaction.
        application: its `application_name`.
        state: of the backend, such as `idle in transaction`.
        since: when it began, UTC, ISO 8601.
        behind_bytes: of a replica or a stream.
    """

    kind: Literal["transaction", "prepared", "foreign_writer", "replica", "stream"]
    shard: str
    text: str
    pid: int | None = None
    gid: str | None = None
    user: str | None = None
    application: str | None = None
    state: str | None = None
    since: str | None = None
    behind_bytes: int | None = None


class JobProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is, at one moment.

    Attributes:
        job: its number.
        at: when this was so, UTC, ISO 8601.
        status: of the job then.
        activity: what its runner was at: `prepare`, `keys`, `copy`, `indexes`, `stream`, `compare`, `switch`,
            `purge`, or empty.
        activity_s: for how many seconds.
        fraction: of the whole job, 0 to 1; the copy counts as the most of it.
        keys: distinct keys of the moving ranges, found so far.
        keys_exact: whether all of them were found.
        tables: of all legs. No more than `TABLES_MAX`: those under way, then those to come, then those done.
        tables_left_out: how many are not among them.
        streams: the streams that run.
        deleted_rows: by the cleanup, since this runner began it.
        waiting: what stands in the way of a switch.
        warnings: what the operator should know of, each in one sentence.
    """

    job: int
    at: str
    status: str
    activity: str = ""
    activity_s: float = 0.0
    fraction: float = 0.0
    keys: int | None = None
    keys_exact: bool = False
    tables: tuple[TableProgress, ...] = ()
    tables_left_out: int = 0
    streams: tuple[StreamProgress, ...] = ()
    deleted_rows: int | None = None
    waiting: tuple[Waiting, ...] = ()
    warnings: tuple[str, ...] = ()


def encode_progress(progress: JobProgress) -> bytes:
    """JSON. It holds no DSN."""
    return msgspec.json.encode(progress)


def decode_progress(data: bytes) -> JobProgress:
    """From the bytes of `encode_progress`.

    Raises:
        InvalidTopology: damaged, or of a later version.
    """
    try:
        return msgspec.json.decode(data, type=JobProgress)
    except msgspec.DecodeError as error:
        raise InvalidTopology(f"a job's progress cannot be read: {error}", "upgrade shardlib") from error
