"""The life of a job by the commands alone, on real servers; and what they say to wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from typer.testing import CliRunner, Result

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError
from shardlib_ops import LocalCluster
from shardlib_ops.cli.main import app
from shardlib_ops.reshard.job import Status
from shardlib_ops.reshard.store import JobStore

pytestmark = pytest.mark.timeout(240)

KEYS = [f"sender-{number}" for number in range(80)]


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    __tablename__ = "parcel"

    sender: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Ops:
    """The commands on one cluster, each output looked through for passwords."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.spare = cluster.spare("spare-1")
        self.secrets = {
            str(psycopg.conninfo.conninfo_to_dict(server.dsn)["password"]) for server in (*cluster.servers, self.spare)
        }

    def __call__(self, *arguments: str, typed: str | None = None, code: int = 0) -> Result:
        result = CliRunner().invoke(app, arguments, env={"SHARDLIB_CATALOG": self.cluster.url}, input=typed)
        if isinstance(result.exception, Exception) and not isinstance(result.exception, ShardlibError):
            raise result.exception
        for secret in self.secrets:
            assert secret not in result.output
            assert secret not in str(result.exception)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self(*arguments, "--json", code=code).stdout)
        return found

    def watched(self, number: str, *, code: int = 0) -> list[dict[str, Any]]:
        """What `watch --json` prints, line by line."""
        lines = self("reshard", "watch", number, "--json", code=code).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def refused(self, *arguments: str) -> ShardlibError:
        result = self(*arguments, code=1)
        assert isinstance(result.exception, ShardlibError), result.output
        return result.exception


@pytest.fixture(scope="module")
def ops() -> Iterator[Ops]:
    with LocalCluster(shards=2) as cluster:
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(Base.metadata)
            for key in KEYS:
                with engine.session(key) as session:
                    session.add(Parcel(sender=key, number=1))
                    session.commit()
        yield Ops(cluster)


def rows_of(ops: Ops) -> list[str]:
    with ShardedEngine(ops.cluster.url) as engine, engine.session() as session:
        return sorted(session.scalars(select(Parcel.sender)).all())


def test_the_life_of_a_split(ops: Ops) -> None:
    source = ops.json("shard", "list")["shards"][0]
    made = ops.json("shard", "create", "extra", "--primary", ops.spare.dsn, "--vnode-count", "256")
    assert (made["name"], made["vnodes_owned"], made["share_of_all"]) == ("extra", 0, 0.0)
    assert made["primary"] == Dsn(ops.spare.dsn).safe()

    plan = ops.json("reshard", "split", source["name"], "--target", "extra", "--dry-run")
    assert plan["dry_run"] is True
    assert plan["kind"] == "split"
    (leg,) = plan["legs"]
    assert leg["source"] == {"id": source["id"], "name": source["name"]}
    assert leg["target"] == {"id": made["id"], "name": "extra"}
    assert 0.3 < leg["share_of_source"] < 0.7
    assert (
        f"{source['name']} -> extra" in ops("reshard", "split", source["name"], "--target", "extra", "--dry-run").output
    )
    assert ops.json("reshard", "list") == {"jobs": []}
    assert "no jobs" in ops("reshard", "list").output

    told = ops("reshard", "split", source["name"], "--target", "extra", "--run").output
    assert "job 1 (split) is made" in told
    assert "rests: job 1: validation" in told
    assert "job 1 is not run here any more" in told
    job = ops.json("reshard", "show", "1")
    assert (job["id"], job["kind"], job["status"], job["asked"], job["error"]) == (
        1,
        "split",
        "validation",
        "run",
        None,
    )
    assert job["attempts"] >= 1
    assert job["switched_at"] is not None
    assert job["completed_at"] is None
    shown = ops("reshard", "show", "1").output
    assert "validation" in shown
    assert "`complete` or `rollback`" in shown
    assert "split" in ops("reshard", "list").output
    (told,) = ops.watched("1")
    assert told["status"] == "validation"
    assert {table["table"]: table["done"] for table in told["progress"]["tables"]} == {"parcel": True}
    assert "parcel" in shown
    assert job["progress"] == told["progress"]
    ops("resharder", "run", "1")
    again = ops.json("reshard", "show", "1")["progress"]
    for figure in ("tables", "keys", "keys_exact"):
        assert again[figure] == job["progress"][figure], "another runner knows what the first has copied"
    assert rows_of(ops) == sorted(KEYS)

    assert "owns ranges" in str(ops.refused("shard", "delete", "s2", "--yes"))
    assert "takes part in job 1" in str(ops.refused("shard", "delete", "extra", "--yes"))
    assert "takes part in job 1" in str(ops.refused("reshard", "drain", source["name"]))
    assert "`rollback` takes it back" in str(ops.refused("reshard", "cancel", "1", "--yes"))

    assert "Rollback job 1" in ops("reshard", "rollback", "1", typed="n\n", code=1).stderr
    assert ops.json("reshard", "show", "1")["asked"] == "run"
    asked = ops.json("reshard", "rollback", "1", "--yes")
    assert (asked["status"], asked["asked"]) == ("validation", "rollback")
    assert "asked to rollback" in ops("reshard", "show", "1").output
    over = ops.json("resharder", "run", "1")
    assert (over["status"], over["outcome"], over["asked"]) == ("rolled_back", "rolled_back", None)
    assert rows_of(ops) == sorted(KEYS)
    assert "it is over" in str(ops.refused("reshard", "pause", "1"))
    assert "'rolled_back'" in str(ops.refused("reshard", "complete", "1", "--yes"))

    over = ops.json("reshard", "split", source["id"], "--target", "extra", "--keep", "768", "--run", "--complete")
    assert (over["id"], over["status"]) == (2, "completed")
    owned = {one["name"]: one for one in ops.json("shard", "list")["shards"]}
    assert 0 < owned["extra"]["share_of_all"] < owned[source["name"]]["share_of_all"]
    assert "extra" in ops("shard", "list").output
    assert "of all keys" in ops("shard", "show", "extra").output

    merged = ops("reshard", "merge", "extra", "--target", source["name"], "--run", "--complete").output
    assert "rests: job 3: completed" in merged
    assert rows_of(ops) == sorted(KEYS)
    assert "out of the cluster?" in ops("shard", "delete", "extra", typed="n\n", code=1).stderr
    assert ops.json("shard", "show", "extra")["vnodes_owned"] == 0
    assert ops.json("shard", "delete", "extra", "--yes") == {"id": made["id"], "name": "extra", "deleted": True}
    assert [one["name"] for one in ops.json("shard", "list")["shards"]] == [source["name"], "shard-02"]
    assert [one["status"] for one in ops.json("reshard", "list")["jobs"]] == ["rolled_back", "completed", "completed"]


def test_a_job_before_its_switch_can_be_paused_and_cancelled(ops: Ops) -> None:
    job = ops.json("reshard", "move-keys", KEYS[0], KEYS[1], "--target", "shard-01")
    number = str(job["id"])
    assert (job["kind"], job["status"], job["asked"]) == ("move_keys", "pending", "run")
    assert "no resharder has taken it yet" in ops("reshard", "show", number).output
    assert "`cancel`" in str(ops.refused("reshard", "rollback", number, "--yes"))
    assert "validation" in str(ops.refused("reshard", "complete", number, "--yes"))
    assert ops.json("reshard", "pause", number)["asked"] == "pause"
    assert ops.json("reshard", "resume", number)["asked"] == "run"
    assert ops("reshard", "resume", number).stdout.strip() == f"job {number} is not paused"
    ops("reshard", "pause", number)
    assert f"asked job {number} to resume" in ops("reshard", "resume", number).stdout
    ops("reshard", "cancel", number, "--yes")
    assert "asked to cancel, which is withdrawn" in ops("reshard", "resume", number).stdout
    told = ops("reshard", "cancel", number, typed="y\n")
    assert f"Cancel job {number}" in told.stderr
    assert f"asked job {number} to cancel" in told.stdout
    assert ops.json("resharder", "run", number)["status"] == "cancelled"
    assert "tables that the job has made on shard-01, without its rows" in ops("reshard", "show", number).stdout
    assert "cancelled" in ops("reshard", "watch", number).output


def test_a_failed_job_is_an_exit_code(ops: Ops) -> None:
    """The record is written as its runner writes it, since only a broken server makes a job fail."""
    number = ops.json("reshard", "drain", "shard-02")["id"]
    with closing(open_catalog(ops.cluster.url)) as catalog:
        store = JobStore(catalog)
        job = store.load(number)
        lease = catalog.acquire(job.lease_name, ttl_s=10.0, holder="test", wait_s=1.0)
        assert lease is not None
        store.save(job.to(Status.CLEANUP, outcome=Status.FAILED).to(Status.FAILED, error="the sides differ"), lease)
        lease.release()
    for command in (["reshard", "watch"], ["resharder", "run"]):
        assert json.loads(ops(*command, str(number), "--json", code=1).stdout)["error"] == "the sides differ"
        assert "the sides differ" in ops(*command, str(number), code=1).output


SECRET = "postgresql://u:s3cr3t@h/d"


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["shard", "show", "nowhere"], InvalidTopology, "'nowhere'"),
        (["shard", "show", SECRET], InvalidArgument, "shard='***'"),
        (["shard", "delete", "nowhere", "--yes"], InvalidTopology, "'nowhere'"),
        (["shard", "create", "s9", "--primary", SECRET], InvalidArgument, "names like s1"),
        (["shard", "create", SECRET, "--primary", SECRET], InvalidArgument, "name='***'"),
        (["shard", "create", "x", "--primary", "redis://u:s3cr3t@h/d"], InvalidArgument, "postgresql://"),
        (["shard", "create", "x", "--primary", SECRET, "--vnode-count", "0"], InvalidArgument, "vnode_count=0"),
        (["reshard", "split", "nowhere", "--target", "shard-02"], InvalidTopology, "'nowhere'"),
        (["reshard", "split", "shard-01", "--target", "nowhere"], InvalidTopology, "'nowhere'"),
        (["reshard", "split", "shard-01", "--target", SECRET], InvalidArgument, "target='***'"),
        (["reshard", "split", "shard-01", "--target", SECRET + "?a=b"], InvalidArgument, "NAME=DSN"),
        (["reshard", "split", "shard-01", "--target", "shard-01"], InvalidArgument, "shard"),
        (["reshard", "split", "shard-01", "--target", "shard-02", "--complete"], InvalidArgument, "--run"),
        (["reshard", "split", "shard-01", "--target", "shard-02", "--run", "--dry-run"], InvalidArgument, "--dry-run"),
        (["reshard", "split", "shard-01", "--target", "shard-02", "--retention", "-1"], InvalidArgument, "retention"),
        (["reshard", "show", "99"], InvalidTopology, "no job 99"),
        (["reshard", "watch", "99"], InvalidTopology, "no job 99"),
        (["reshard", "cancel", "99", "--yes"], InvalidTopology, "no job 99"),
        (["resharder", "run", "99"], InvalidTopology, "no job 99"),
        (["resharder", "run", "--complete"], InvalidArgument, "only with a JOB"),
        (["resharder", "run", "1", "--max-slot-wal", "much"], InvalidArgument, "max_slot_wal='much'"),
        (
            ["reshard", "drain", "shard-01", "--run", "--max-slot-wal", "much"],
            InvalidArgument,
            "max_slot_wal='much'",
        ),
        (["reshard", "drain", "shard-01", "--max-slot-wal", "1GiB"], InvalidArgument, "only with --run"),
        (["reshard", "resume", "1", "--max-slot-wal", "1GiB"], InvalidArgument, "only with --run"),
    ],
)
def test_wrong_input_is_named_without_a_secret(
    ops: Ops, arguments: list[str], kind: type[ShardlibError], said: str
) -> None:
    error = ops.refused(*arguments)
    assert isinstance(error, kind)
    assert said in str(error)
    assert "s3cr3t" not in f"{error!r} {error}"


@pytest.mark.parametrize("arguments", [["reshard", "show", "x"], ["reshard", "show", "0"], ["reshard", "split", "a"]])
def test_wrong_usage_is_exit_code_2(ops: Ops, arguments: list[str]) -> None:
    ops(*arguments, code=2)


def test_a_catalog_in_memory_would_be_lost(ops: Ops) -> None:
    assert "outlives" in str(ops.refused("shard", "list", "--catalog", "memory://x"))


def test_a_dry_run_makes_no_shard(ops: Ops) -> None:
    before = ops.json("shard", "list")
    plan = ops.json("reshard", "rebalance", "--target", f"later={ops.spare.dsn}", "--dry-run")
    assert {leg["target"]["name"] for leg in plan["legs"]} == {"later"}
    assert ops.json("shard", "list") == before


def test_a_serving_resharder_takes_jobs_and_stops_at_a_signal(ops: Ops, tmp_path: Path) -> None:
    metrics = tmp_path / "shardlib.prom"
    serving = subprocess.Popen(
        [sys.executable, "-m", "shardlib_ops.cli.main", "resharder", "run", "--json", "--metrics-file", str(metrics)],
        env={**os.environ, "SHARDLIB_CATALOG": ops.cluster.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        number = str(ops.json("reshard", "drain", "shard-02")["id"])
        assert "validation" in ops("reshard", "watch", number).output
        ops("reshard", "rollback", number, "--yes")
        followed = ops.watched(number)
        assert followed[-1]["status"] == "rolled_back"
        assert all(one["id"] == int(number) and "progress" in one for one in followed)
        serving.send_signal(signal.SIGTERM)
        out, err = serving.communicate(timeout=60)
    finally:
        serving.kill()
        serving.wait(timeout=30)
    assert serving.returncode == 0, err
    assert json.loads(out) == {"stopped": True}
    assert "Traceback" not in err
    said = [line.partition(f"job {number}")[2] for line in err.splitlines() if f"job {number}" in line]
    assert said[0] == " (drain): taken, it is in pending", err
    for phase in ("precopy", "deltasync", "cutover", "validation", "cleanup"):
        assert said.count(f": now in {phase}") == 1, err
    assert said[-1] == ": over, rolled_back", err
    text = metrics.read_text()
    assert f'shard_reshard_status{{job="{number}",status="rolled_back"}} 1' in text
    assert "shard_manager_reshard_jobs_active 0" in text
    assert [path.name for path in tmp_path.iterdir()] == [metrics.name]
    assert rows_of(ops) == sorted(KEYS)
