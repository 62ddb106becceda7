"""Rates, trends, the record and the text of a job's progress, without servers. What is unknown stays unknown."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from shardlib.catalog import Conflict, open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TokenRange, build_ring
from shardlib.topology import Gate, Shard, Table, Topology
from shardlib_ops.cli import progress, render, watch
from shardlib_ops.client.views import job_view
from shardlib_ops.reshard.copy import Copied
from shardlib_ops.reshard.job import Job, Kind, Status, Wish, legs_of
from shardlib_ops.reshard.progress import JobProgress, StreamProgress, TableProgress, Tracker, Waiting, metrics_text
from shardlib_ops.reshard.progress.model import decode_progress, encode_progress
from shardlib_ops.reshard.progress.rate import Rate, Trend
from shardlib_ops.reshard.store import JobStore
from shardlib_ops.reshard.units import duration, parse_size, size

MIB = 1 << 20


def test_a_rate_is_unknown_until_some_time_is_known_of() -> None:
    rate = Rate(window_s=10)
    assert rate.per_s is None
    rate.sample(0.0, 100)
    assert rate.per_s is None
    rate.sample(0.2, 200)
    assert rate.per_s is None
    rate.sample(2.0, 500)
    assert rate.per_s == pytest.approx(200)


def test_a_rate_is_of_late_and_begins_anew_when_the_count_falls() -> None:
    rate = Rate(window_s=10)
    for second in range(60):
        rate.sample(float(second), 1_000 * min(second, 30))
    assert rate.per_s == pytest.approx(0)
    rate.sample(60.0, 5)
    assert rate.per_s is None
    rate.sample(61.0, 15)
    assert rate.per_s == pytest.approx(10)


def fed(trend: Trend, seconds: int, written: float, applied: float, *, behind: int = 0) -> Trend:
    for second in range(seconds + 1):
        trend.sample(float(second), behind + int(written * second), int(applied * second))
    return trend


def test_a_stream_that_is_outrun_for_the_whole_window_falls_behind() -> None:
    trend = fed(Trend(window_s=30), 30, 10 * MIB, 4 * MIB)
    assert trend.falls_behind
    assert trend.eta_s is None
    assert (trend.written_per_s, trend.applied_per_s) == (pytest.approx(10 * MIB), pytest.approx(4 * MIB))


@pytest.mark.parametrize(
    ("seconds", "written", "applied", "behind"),
    [
        pytest.param(15, 10 * MIB, 4 * MIB, 0, id="not yet for long enough"),
        pytest.param(30, 4 * MIB, 10 * MIB, 400 * MIB, id="it catches up"),
        pytest.param(30, 10 * MIB, 10 * MIB, 50 * MIB, id="it keeps its distance"),
        pytest.param(30, 1_000, 10, 0, id="a trifle"),
    ],
)
def test_what_is_not_falling_behind(seconds: int, written: float, applied: float, behind: int) -> None:
    assert not fed(Trend(window_s=30), seconds, written, applied, behind=behind).falls_behind


def test_one_burst_is_no_trend() -> None:
    trend = Trend(window_s=30)
    for second in range(31):
        trend.sample(float(second), 0 if second < 15 else 500 * MIB, 0)
    assert not trend.falls_behind
    trend.reset()
    assert not trend.falls_behind
    assert trend.written_per_s is None


def test_the_time_to_catch_up_is_told_while_it_does() -> None:
    trend = fed(Trend(window_s=30), 30, 4 * MIB, 10 * MIB, behind=360 * MIB)
    assert trend.eta_s == pytest.approx(30)  # 180 MiB are left, 6 MiB a second are won
    assert fed(Trend(), 10, MIB, MIB).eta_s == 0


def test_sizes_and_times_as_people_write_them() -> None:
    assert [size(n) for n in (0, 1_023, 1_536, 5 << 30, 3 << 50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3072.0 TiB",
    ]
    assert [parse_size("x", text) for text in ("16GiB", "16GB", "16g", "1.5 MiB", "42", "42 B")] == [
        16 << 30, 16 << 30, 16 << 30, 3 << 19, 42, 42,
    ]  # fmt: skip
    assert [duration(s) for s in (0.42, 52, 59.7, 200, 18_130)] == [
        "0.4 s",
        "52 s",
        "1 min 00 s",
        "3 min 20 s",
        "5 h 02 min",
    ]
    for text in ("", "0", "much", "-1", "16 XB", "1e9"):
        with pytest.raises(InvalidArgument, match="a size such as"):
            parse_size("max-slot-wal", text)


def some(job: int = 7) -> JobProgress:
    return JobProgress(
        job=job,
        at="2026-11-24T02:00:00.000+00:00",
        status="cutover",
        fraction=0.9,
        keys=12,
        tables=(
            TableProgress(leg=1, table='we"ird', rows=10, rows_total=10, bytes=None, done=True, eta_s=0.0),
            TableProgress(leg=1, table="new"),
        ),
        streams=(StreamProgress(leg=1, direction="forward", lag_bytes=0, falls_behind=True),),
        waiting=(Waiting(kind="prepared", shard="a", text="…", gid="g"),),
        warnings=("w",),
    )


def test_progress_is_read_as_it_was_written() -> None:
    assert decode_progress(encode_progress(some())) == some()
    with pytest.raises(InvalidTopology, match="progress cannot be read"):
        decode_progress(b'{"job": "x"}')


def test_the_metrics_leave_out_what_is_unknown() -> None:
    lines = metrics_text([some()]).splitlines()
    assert "shard_manager_reshard_jobs_active 1" in lines
    assert 'shard_manager_reshard_progress{job="7"} 0.9' in lines
    assert 'shard_reshard_table_rows{job="7",leg="1",table="we\\"ird"} 10' in lines
    assert 'shard_reshard_lag_bytes{job="7",leg="1",direction="forward"} 0' in lines
    assert 'shard_reshard_falls_behind{job="7",leg="1",direction="forward"} 1' in lines
    assert 'shard_reshard_waiting{job="7",kind="prepared"} 1' in lines
    for unknown in (
        'rows_expected{job="7",leg="1",table="new"}',
        "lag_seconds{",
        'table_bytes{job="7",leg="1",table="we',
    ):
        assert not any(unknown in line for line in lines), unknown
    assert "None" not in "".join(lines)
    assert metrics_text([]).startswith("# HELP shard_manager_reshard_jobs_active")


def test_progress_is_stored_beside_the_record_while_the_lease_is_held() -> None:
    catalog = open_catalog("memory://progress-store")
    store = JobStore(catalog)
    assert store.progress(7) is None
    lease = catalog.acquire("job-7", ttl_s=30, holder="test", wait_s=1)
    assert lease is not None
    for number in range(3):
        store.save_progress(JobProgress(job=7, at=str(number), status="precopy"), lease)
    other = JobStore(catalog)
    found = other.progress(7)
    assert found is not None
    assert found.at == "2"
    other.save_progress(JobProgress(job=7, at="later", status="precopy"), lease)
    with pytest.raises(Conflict):
        store.save_progress(JobProgress(job=7, at="stale", status="precopy"), lease)
    store.save_progress(JobProgress(job=7, at="read again", status="precopy"), lease)
    lease.release()
    with pytest.raises(Conflict):
        store.save_progress(JobProgress(job=7, at="too late", status="precopy"), lease)
    found = store.progress(7)
    assert found is not None
    assert found.at == "read again"
    catalog.close()


def copying() -> JobProgress:
    return JobProgress(
        job=7,
        at="2026-11-24T02:00:01.000+00:00",
        status="precopy",
        activity="copy",
        activity_s=83,
        fraction=0.31,
        keys=1_204_551,
        keys_exact=True,
        tables=(
            TableProgress(
                leg=1, table="orders", rows=1_200, rows_total=3_400, bytes=230 * MIB, rows_per_s=88, eta_s=25
            ),
            TableProgress(leg=1, table="items"),
        ),
        streams=(
            StreamProgress(
                leg=1, direction="forward", lag_bytes=400 * MIB, changes=5, falls_behind=True, wal_status="unreserved",
                retained_bytes=1 << 30,
            ),
        ),
        waiting=(Waiting(kind="transaction", shard="a", text="process 812 of app", pid=812, since="2026-11-24T01:58"),),
        warnings=("it falls behind",),
    )  # fmt: skip


JOB = Job(7, Kind.SPLIT, (), status=Status.PRECOPY, started_at="2026-11-24T01:00")
SEEN = job_view(JOB, {}, Wish.RUN)


def test_the_bar_of_a_state_that_is_over_is_not_drawn() -> None:
    def drawn(job: Job) -> str:
        out = io.StringIO()
        Console(file=out, width=140).print(watch._picture(job_view(job, {}, Wish.RUN), copying()))
        return out.getvalue()

    assert "31%" in drawn(JOB)
    later = drawn(Job(7, Kind.SPLIT, (), status=Status.VALIDATION, started_at="2026-11-24T01:00"))
    assert "31%" not in later
    assert "orders" in later


def test_the_picture_of_a_terminal_names_all_that_matters() -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=140).print(watch._picture(SEEN, copying()))
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    rows = text.splitlines()
    assert rows[0] == "job 7: precopy"
    assert "31%, copy for 1 min 23 s, 1,204,551 keys" in text
    (orders,) = [row for row in rows if "orders" in row]
    assert orders.split() == ["1", "orders", "1,200", "~3,400", "230.0", "MiB", "88", "?", "25", "s"]
    (items,) = [row for row in rows if "items" in row]
    assert items.split() == ["1", "items", "0", "?", "0", "B", "?", "?", "?"]
    (stream,) = [row for row in rows if "forward" in row]
    assert "400.0 MiB" in stream
    assert "never, at this rate" in stream
    assert "1.0 GiB (unreserved)" in stream
    assert "warning: it falls behind" in text
    assert "waits for: process 812 of app, since 2026-11-24T01:58" in text
    Console(file=out, width=140).print(watch._picture(SEEN, None))


def test_one_line_says_the_most_of_it() -> None:
    said = progress.summary(copying())
    assert said == (
        "31%, copy for 1 min 23 s, 1,204,551 keys, orders 1,200 of ~3,400 rows, 88 rows/s, ?/s, 25 s left, "
        "stream 1 is 400.0 MiB and ? behind"
    )


def test_lines_elsewhere_are_news_and_not_the_same_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    show = watch._plain_lines(render.console())
    show(SEEN, copying())
    first = capsys.readouterr().out.splitlines()
    assert first == [
        "job 7: precopy",
        "  warning: it falls behind",
        "  waits for: process 812 of app, since 2026-11-24T01:58",
    ]
    show(SEEN, copying())
    assert capsys.readouterr().out == ""
    now = 6.0
    show(SEEN, copying())
    assert capsys.readouterr().out.startswith("  31%, copy for")
    show(job_view(JOB.changed(paused=True), {}, Wish.PAUSE), copying())
    assert "paused" in capsys.readouterr().out


def test_lines_of_json_are_told_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    show = watch._lines_of_json()
    for told in (None, None, copying()):
        show(SEEN, told)
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["progress"] is None
    assert second["progress"]["tables"][1]["rows_total"] is None
    assert second["progress"]["waiting"][0]["pid"] == 812


def two_tables() -> tuple[Topology, Job]:
    shards = {"s1": 256, "s2": 256}
    topology = Topology(
        version=1,
        cluster_id="c",
        hash_function="murmur3",
        ring=build_ring(shards),
        shards=tuple(Shard(one, one, Dsn(f"postgresql://h/{one}")) for one in shards),
        gates=tuple(Gate(number, one, ()) for number, one in enumerate(shards, 1)),
        tables=(Table("visit", ("k",)), Table("late", ("k",))),
        next_shard=3,
        next_gate=3,
        nonce="n",
    )
    return topology, Job(7, Kind.SPLIT, legs_of([("s1", "s2", [TokenRange(0, 9)])]), status=Status.PRECOPY)


def test_what_an_earlier_runner_has_copied_stays_known() -> None:
    topology, job = two_tables()

    def taken() -> Tracker:
        return Tracker(job, topology, clock=lambda: 0.0, stamp=lambda: "then")

    first = taken()
    first.begins("copy")
    first.keys(1, 30, exact=True)
    first.copied(1, Copied("visit", 400, 8_000, 1.0))
    first.copied(1, Copied("late", 5, 100, 0.5))
    second = taken()
    second.goes_on(None)
    assert second.progress().keys is None
    second.goes_on(first.progress())
    visit, late = sorted(second.progress().tables, key=lambda one: one.table, reverse=True)
    assert (visit.rows, visit.bytes, visit.done) == (400, 8_000, True)
    assert (late.rows, late.done) == (0, False), "a half is copied again"
    assert (second.progress().keys, second.progress().keys_exact) == (30, True)
    second.keys(1, 31)
    assert (second.progress().keys, second.progress().keys_exact) == (31, False)
    second.copy_begins(1, anew=True)
    assert not any(table.done or table.rows for table in second.progress().tables)


def test_the_rate_of_a_table_begins_with_its_copy() -> None:
    now = 0.0
    topology, job = two_tables()
    tracker = Tracker(job, topology, clock=lambda: now, stamp=lambda: "then")
    tracker.estimated(1, "visit", None, 1000)
    tracker.begins("copy")
    now = 2.0
    tracker.copied(1, Copied("visit", 400, 8_000, 0.25))
    visit, late = sorted(tracker.progress().tables, key=lambda one: one.table, reverse=True)
    assert (visit.rows_per_s, visit.bytes_per_s) == (pytest.approx(200), pytest.approx(4_000))
    assert visit.eta_s == pytest.approx(6)
    assert (visit.rows_total, visit.bytes_total) == (1_600, 32_000)
    assert (late.rows_per_s, late.eta_s, late.rows_total) == (None, None, None)
    assert tracker.progress().fraction == pytest.approx(0.8 * 0.125)
