"""How commands show the progress of a job: tables, streams, what a switch waits for. `?` is what nobody knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import RenderableType

    from shardlib_ops.reshard.progress.model import JobProgress, StreamProgress, TableProgress

__all__ = ["lines", "progress_content", "summary", "tables"]

_SHOWN_MAX: Final = 12
_UNKNOWN: Final = "?"
_TABLE_COLUMNS: Final = ("leg", "table", "rows", "of", "bytes", "rows/s", "bytes/s", "left")
_STREAM_COLUMNS: Final = (
    "leg", "way", "behind", "for", "changes/s", "WAL written/s", "applied/s", "caught up in", "slot keeps",
)  # fmt: skip


def progress_content(progress: JobProgress | None) -> dict[str, Any] | None:
    """A progress as a document; None for one that nobody has told."""
    import msgspec

    if progress is None:
        return None
    content: dict[str, Any] = msgspec.to_builtins(progress)
    return content


def _size(count: float | None) -> str:
    from shardlib_ops.reshard.units import size

    return _UNKNOWN if count is None else size(count)


def _time(seconds: float | None) -> str:
    from shardlib_ops.reshard.units import duration

    return _UNKNOWN if seconds is None else duration(seconds)


def _count(number: float | None) -> str:
    return _UNKNOWN if number is None else f"{number:,.0f}"


def summary(progress: JobProgress, *, brief: bool = False) -> str:
    """The most that one line can say: how much is copied, how far behind the streams are.

    Args:
        progress: of a job.
        brief: leave out what `tables` shows.
    """
    parts = [f"{progress.fraction:.0%}"]
    if progress.activity:
        parts.append(f"{progress.activity} for {_time(progress.activity_s)}")
    if progress.status in ("pending", "precopy") and progress.keys is not None:
        parts.append(f"{progress.keys:,} keys" + ("" if progress.keys_exact else " so far"))
    if not brief:
        parts += [_copying(table) for table in progress.tables if not table.done and table.rows]
        parts += [_streaming(stream) for stream in progress.streams if stream.changes is not None]
    if progress.status == "cleanup" and progress.deleted_rows is not None:
        parts.append(f"{progress.deleted_rows:,} rows deleted")
    return ", ".join(parts)


def _copying(table: TableProgress) -> str:
    total = _UNKNOWN if table.rows_total is None else f"~{table.rows_total:,}"
    rates = f"{_count(table.rows_per_s)} rows/s, {_size(table.bytes_per_s)}/s"
    return f"{table.table} {table.rows:,} of {total} rows, {rates}, {_time(table.eta_s)} left"


def _streaming(stream: StreamProgress) -> str:
    return f"stream {stream.leg} is {_size(stream.lag_bytes)} and {_time(stream.lag_s)} behind" + (
        ", held for a comparison" if stream.held else ""
    )


def lines(progress: JobProgress) -> Iterator[str]:
    """What has to be said besides the summary: warnings, and who stands in the way."""
    for warning in progress.warnings:
        yield f"warning: {warning}"
    for one in progress.waiting:
        yield f"waits for: {one.text}" + (f", since {one.since}" if one.since else "")


def tables(progress: JobProgress) -> Iterator[RenderableType]:
    """The tables and streams, as tables to be drawn."""
    from rich.table import Table
    from rich.text import Text

    def drawn(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
        made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for number, column in enumerate(columns):
            made.add_column(column, overflow="fold", justify="right" if number > 1 else "left")
        for row in rows:
            made.add_row(*map(Text, row))
        return made

    shown = progress.tables[:_SHOWN_MAX]
    if shown:
        left = len(progress.tables) + progress.tables_left_out - len(shown)
        title = "copied" + (f" ({left} more tables)" if left else "")
        yield drawn(title, _TABLE_COLUMNS, [_table_row(one) for one in shown])
    if progress.streams:
        yield drawn("streams", _STREAM_COLUMNS, [_stream_row(one) for one in progress.streams])


def _table_row(one: TableProgress) -> tuple[str, ...]:
    total = _count(one.rows_total)
    return (
        str(one.leg),
        one.table,
        f"{one.rows:,}",
        total if one.done or one.rows_total is None else f"~{total}",
        _size(one.bytes),
        "" if one.done else _count(one.rows_per_s),
        "" if one.done else _size(one.bytes_per_s),
        "done" if one.done else _time(one.eta_s),
    )


def _stream_row(one: StreamProgress) -> tuple[str, ...]:
    kept = _size(one.retained_bytes) + (f" ({one.wal_status})" if one.wal_status not in (None, "reserved") else "")
    caught_up = "never, at this rate" if one.falls_behind else "held" if one.held else _time(one.eta_s)
    return (
        str(one.leg),
        one.direction,
        _size(one.lag_bytes),
        _time(one.lag_s),
        _count(one.changes_per_s),
        _size(one.written_per_s),
        _size(one.applied_per_s),
        caught_up,
        kept,
    )
