"""A healthy cluster has no findings, and each fault gives its own and no other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text
from typer.testing import CliRunner

from shardlib import ShardedEngine
from shardlib.catalog import Catalog, open_catalog
from shardlib.dsn import Dsn
from shardlib.fence import open_gate
from shardlib.ring import TokenRange
from shardlib_ops import LocalCluster
from shardlib_ops.cli.main import app
from shardlib_ops.doctor import Doctor, Limits, Severity
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.promote.record import Promotion, PromotionStore, Stage
from shardlib_ops.reshard.job import Job, Kind, Leg, Status
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.reshard.schema.change import CHANGE, Change, encode_change
from shardlib_ops.reshard.store import JobStore

pytestmark = pytest.mark.timeout(240)

KEYS = [f"tenant-{number}" for number in range(40)]
SLOW = Limits(catalog_s=30)
"""As by default, on a machine that does other things as well."""


def limits(**changes: Any) -> Limits:
    return Limits(**{"catalog_s": 30.0, **changes})


def tables() -> MetaData:
    metadata = MetaData()
    Table(
        "orders",
        metadata,
        Column("tenant", Text, primary_key=True, info={"shard_key": True}),
        Column("id", Integer, primary_key=True),
    )
    Table("country", metadata, Column("code", Text, primary_key=True), info={"reference": True})
    return metadata


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2, replicas=1) as running:
        metadata = tables()
        with ShardedEngine(running.url) as engine:
            engine.create_all(metadata)
            for key in KEYS:
                with engine.begin(key) as connection:
                    connection.execute(metadata.tables["orders"].insert().values(tenant=key, id=1))
        for shard in ("shard-01", "shard-02"):
            with running.primary(shard).connect() as conn:
                conn.execute("INSERT INTO country VALUES ('fr'), ('it')")
        yield running


Planted = AbstractContextManager[Any]


@contextmanager
def sql(cluster: LocalCluster, shard: str, plant: str, undo: str) -> Iterator[None]:
    with cluster.primary(shard).connect() as conn:
        conn.execute(plant)
        try:
            yield
        finally:
            conn.execute(undo)


def by_sql(shard: str, plant: str, undo: str) -> Callable[[LocalCluster], Planted]:
    return lambda cluster: sql(cluster, shard, plant, undo)


@contextmanager
def nothing(_: LocalCluster) -> Iterator[None]:
    yield


@contextmanager
def on_both(cluster: LocalCluster) -> Iterator[None]:
    plant, undo = "CREATE TABLE loose (x int)", "DROP TABLE loose"
    with sql(cluster, "shard-01", plant, undo), sql(cluster, "shard-02", plant, undo):
        yield


@contextmanager
def gate_closed(cluster: LocalCluster) -> Iterator[None]:
    with cluster.primary("shard-01").connect() as conn:
        conn.execute("DROP TABLE shardlib.gate_1")
        yield
        open_gate(conn, 1)


@contextmanager
def held_open(cluster: LocalCluster) -> Iterator[None]:
    with cluster.primary("shard-01").connect() as conn:
        conn.execute("BEGIN; SELECT FROM orders")
        yield
        conn.execute("ROLLBACK")


@contextmanager
def prepared(cluster: LocalCluster, gid: str) -> Iterator[None]:
    with cluster.primary("shard-01").connect() as conn:
        conn.execute(f"BEGIN; INSERT INTO orders VALUES ('tenant-1', 7); PREPARE TRANSACTION '{gid}'")
        yield
        conn.execute(f"ROLLBACK PREPARED '{gid}'")


@contextmanager
def misplaced(cluster: LocalCluster) -> Iterator[None]:
    with ShardedEngine(cluster.url) as engine:
        key = next(key for key in KEYS if engine.shard_for(key).id == "s2")
    undo = f"DELETE FROM orders WHERE tenant = '{key}'"
    with sql(cluster, "shard-01", f"INSERT INTO orders VALUES ('{key}', 5)", undo):
        yield


@contextmanager
def replica_stopped(cluster: LocalCluster) -> Iterator[None]:
    (replica,) = cluster.replicas("shard-01")
    replica.stop()
    yield
    replica.start()


@contextmanager
def replay_paused(cluster: LocalCluster) -> Iterator[None]:
    (replica,) = cluster.replicas("shard-01")
    with replica.connect() as conn, cluster.primary("shard-01").connect() as primary:
        conn.execute("SELECT pg_wal_replay_pause()")
        primary.execute("SELECT pg_logical_emit_message(false, 'test', repeat('x', 3000000))")
        yield
        conn.execute("SELECT pg_wal_replay_resume()")
        (lsn,) = primary.execute("SELECT pg_current_wal_lsn()::text").fetchone() or (None,)
        caught_up = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        while conn.execute(caught_up, (lsn,)).fetchone() != (True,):
            pass


@contextmanager
def primary_stopped(cluster: LocalCluster) -> Iterator[None]:
    server = cluster.primary("shard-02")
    server.stop()
    yield
    server.start()


@contextmanager
def stored(cluster: LocalCluster) -> Iterator[Catalog]:
    with closing(open_catalog(cluster.url)) as catalog:
        yield catalog


@contextmanager
def job(cluster: LocalCluster, **fields: Any) -> Iterator[None]:
    """A record of a job, which is over at the end."""
    now = datetime.now(UTC).isoformat()
    with stored(cluster) as catalog:
        jobs = JobStore(catalog)
        leg = Leg(1, "s1", "s2", (TokenRange(0, 10),))
        made = jobs.create(Job(id=0, kind=Kind.MOVE_KEYS, legs=(leg,), created_at=now, **fields))
        yield
        lease = catalog.acquire(made.lease_name, ttl_s=10, holder="test")
        assert lease is not None
        jobs.load(made.id)
        with lease:
            over = made.changed(status=Status.CANCELLED, outcome=None, completed_at="2020-01-01T00:00:00+00:00")
            jobs.save(over, lease)


@contextmanager
def promotion(cluster: LocalCluster) -> Iterator[None]:
    dsn = Dsn(cluster.primary("shard-01").dsn)
    record = Promotion(
        shard="s1", name="shard-01", old=dsn, new=dsn, stage=Stage.CLOSING, started_at="2020-01-01T00:00"
    )
    with stored(cluster) as catalog:
        promotions = PromotionStore(catalog)
        lease = catalog.acquire("promote-s1", ttl_s=10, holder="test")
        assert lease is not None
        with lease:
            promotions.save(record, lease)
            yield
            promotions.save(record.changed(stage=Stage.UNDONE), lease)


@contextmanager
def half_done(cluster: LocalCluster) -> Iterator[None]:
    change = Change(target=("a2",), began_at="2020-01-01T00:00:00+00:00", failed="shard-02", error="it says no")
    with stored(cluster) as catalog:
        revision = catalog.write_document(CHANGE, encode_change(change), expected=None)
        yield
        catalog.write_document(CHANGE, encode_change(change.changed(ended_at="2020")), expected=revision)


@dataclass(frozen=True)
class Case:
    """A fault, and what is found of it: the check, how bad it is, where (None: it may be anywhere), and a part."""

    plant: Callable[[LocalCluster], Planted]
    check: str
    severity: Severity
    where: str | None
    says: str
    limits: Limits = field(default_factory=limits)
    count: int = 1


ERROR, WARNING = Severity.ERROR, Severity.WARNING
FIRST, SECOND = "shard 'shard-01'", "shard 'shard-02'"
CASES = {
    "gate closed": Case(gate_closed, "gates", ERROR, FIRST, "the gates 1 are closed"),
    "old gate": Case(
        by_sql("shard-01", "CREATE TABLE shardlib.gate_2 ()", "DROP TABLE shardlib.gate_2"),
        "gates", ERROR, FIRST, "the gates 2 are open, and the topology names them no more",
    ),
    "gate from the future": Case(
        by_sql("shard-02", "CREATE TABLE shardlib.gate_999 ()", "DROP TABLE shardlib.gate_999"),
        "gates", ERROR, SECOND, "the gates 999 are open, and have numbers that were never given out",
    ),
    "another shard's database": Case(
        by_sql(
            "shard-02", "UPDATE shardlib.control SET shard_id = 's9'", "UPDATE shardlib.control SET shard_id = 's2'"
        ),
        "identity", ERROR, SECOND, "says that it is shard 's9'",
    ),
    "leftovers": Case(
        by_sql(
            "shard-01",
            "CREATE TABLE shardlib.job_77_keys (); CREATE PUBLICATION shardlib_job_77;"
            "SELECT pg_replication_origin_create('shardlib_job_77_1')",
            "DROP TABLE shardlib.job_77_keys; DROP PUBLICATION shardlib_job_77;"
            "SELECT pg_replication_origin_drop('shardlib_job_77_1')",
        ),
        "leftovers", WARNING, FIRST,
        "has left origin shardlib_job_77_1, publication shardlib_job_77, table job_77_keys",
    ),
    "slot of a job that is over": Case(
        by_sql(
            "shard-01",
            "SELECT pg_create_logical_replication_slot('shardlib_job_78_1_f', 'pgoutput')",
            "SELECT pg_drop_replication_slot('shardlib_job_78_1_f')",
        ),
        "leftovers", ERROR, FIRST, "slot shardlib_job_78_1_f", limits(slot_bytes=-1),
    ),
    "sessions are read-only": Case(
        by_sql(
            "shard-01",
            "ALTER ROLE current_user SET default_transaction_read_only = on",
            "ALTER ROLE current_user RESET default_transaction_read_only",
        ),
        "settings", WARNING, FIRST, "default_transaction_read_only is on",
    ),
    "in doubt": Case(
        lambda cluster: prepared(cluster, "shardlib:abc:s2:s1"),
        "in doubt", ERROR, FIRST, "shard 'shard-02' decides it", limits(in_doubt_s=0),
    ),
    "in doubt, without a decider": Case(
        lambda cluster: prepared(cluster, "shardlib:abc:s7:s1"),
        "in doubt", ERROR, FIRST, "its decider 's7' is no shard any more", limits(in_doubt_s=0),
    ),
    "in doubt, of somebody else": Case(
        lambda cluster: prepared(cluster, "other"),
        "in doubt", ERROR, FIRST, "it is not shardlib's", limits(in_doubt_s=0),
    ),
    "open transaction": Case(
        held_open, "transactions", WARNING, FIRST, "idle in transaction", limits(transaction_s=0)
    ),
    "old transaction ids": Case(
        nothing, "transaction ids", ERROR, None, "transactions old", limits(transaction_ids=1), count=2
    ),
    "slot that nobody reads": Case(
        by_sql(
            "shard-02",
            "SELECT pg_create_physical_replication_slot('forgotten', true)",
            "SELECT pg_drop_replication_slot('forgotten')",
        ),
        "slots", ERROR, SECOND, "'forgotten', which nobody reads", limits(slot_bytes=-1),
    ),
    "disk": Case(nothing, "disk", ERROR, None, "are free on the disk of", limits(disk_free=1.0), count=2),
    "misplaced row": Case(misplaced, "misplaced", ERROR, FIRST, "(of shard 'shard-02')"),
    "reference table": Case(
        by_sql("shard-02", "INSERT INTO country VALUES ('xx')", "DELETE FROM country WHERE code = 'xx'"),
        "references", ERROR, "table 'country'", "holds other rows",
    ),
    "drift": Case(
        by_sql("shard-02", "ALTER TABLE orders ADD note text", "ALTER TABLE orders DROP note"),
        "drift", ERROR, "tables", "column 'note'",
    ),
    "unknown tables": Case(
        on_both, "unknown tables", Severity.NOTE, "tables", "does not know the tables loose"
    ),
    "revisions": Case(
        by_sql(
            "shard-02",
            "CREATE TABLE shardlib.alembic_version AS SELECT 'a1'::varchar(32) AS version_num",
            "DROP TABLE shardlib.alembic_version",
        ),
        "revisions", WARNING, "tables", "shard-01 at none, shard-02 at a1",
    ),
    "replica away": Case(replica_stopped, "replicas", ERROR, None, "refused"),
    "replica behind": Case(replay_paused, "replicas", WARNING, None, "MiB of WAL behind", limits(lag_bytes=1_000_000)),
    "clocks": Case(nothing, "clocks", WARNING, None, "ahead of", limits(clocks_s=0)),
    "paused": Case(lambda cluster: job(cluster, paused=True), "jobs", WARNING, None, "it is paused in 'pending'"),
    "no runner": Case(job, "jobs", WARNING, None, "nobody has worked on it so far", limits(quiet_s=0)),
    "failed": Case(
        lambda cluster: job(
            cluster, status=Status.FAILED, error="a table was altered", completed_at=datetime.now(UTC).isoformat()
        ),
        "jobs", WARNING, None, "it has failed: a table was altered",
    ),
    "promotion": Case(promotion, "promotions", ERROR, FIRST, "its promotion stands at 'closing'"),
    "half done change": Case(half_done, "schema", WARNING, "catalog", "it says no"),
    "slow catalog": Case(nothing, "catalog", WARNING, "catalog", "one small read took", limits(catalog_s=-1)),
    "primary away": Case(primary_stopped, "reach", ERROR, SECOND, "refused"),
}  # fmt: skip


def test_a_healthy_cluster_has_no_findings(cluster: LocalCluster) -> None:
    report = Doctor.look(cluster.url, limits=SLOW)
    assert report.findings == ()
    assert report.fine
    assert report.shards == 2
    assert {case.check for case in CASES.values()} <= {*report.checks, "transaction ids"}


@pytest.mark.parametrize("name", CASES)
def test_each_fault_gives_its_finding_and_no_other(cluster: LocalCluster, name: str) -> None:
    case = CASES[name]
    with case.plant(cluster):
        report = Doctor.look(cluster.url, limits=case.limits)
    shown = "\n".join(map(str, report.findings))
    assert [finding.check for finding in report.findings] == [case.check] * case.count, shown
    for finding in report.findings:
        assert finding.severity is case.severity, shown
        assert case.where in (None, finding.where), shown
        assert case.says in finding.what, shown
        assert finding.todo
    assert report.fine is (case.severity is Severity.NOTE)
    assert Doctor.look(cluster.url, limits=SLOW).findings == ()


async def test_a_job_at_work_is_no_finding(cluster: LocalCluster) -> None:
    found: dict[str, list[str]] = {}
    with ShardedEngine(cluster.url) as engine:
        key = next(key for key in KEYS if engine.shard_for(key).id == "s1")
    async with (
        Manager(cluster.url) as manager,
        Doctor(cluster.url, limits=SLOW) as doctor,
        asyncio.timeout(200),
    ):

        async def at(step: str) -> None:
            if step in ("announced", "leg_copied", "leg_compared", "status_validation"):
                found[step] = [str(finding) for finding in (await doctor.examine()).findings]

        job = await manager.move_keys([key], target={"shard_id": "s2"})
        async with Resharder(cluster.url, on_step=at) as resharder:
            assert (await resharder.run(job.id)).status is Status.VALIDATION
            await manager.rollback(job.id)
            assert (await resharder.run(job.id)).status is Status.ROLLED_BACK
        assert list(found) == ["announced", "leg_copied", "leg_compared", "status_validation"]
        assert not any(found.values()), found
        assert (await doctor.examine()).findings == ()


def test_a_frozen_server_is_one_finding_within_the_limit(cluster: LocalCluster) -> None:
    server = cluster.primary("shard-02")
    server.pause()
    try:
        report = Doctor.look(cluster.url, limits=limits(check_s=4))
    finally:
        server.resume()
    assert [(finding.check, finding.where) for finding in report.findings] == [("reach", SECOND)], report.findings
    assert report.elapsed_s < 60


def test_a_catalog_that_is_away_is_a_finding() -> None:
    report = Doctor.look("etcd://user:secret-word@127.0.0.1:1/shop", timeout_s=1)
    (finding,) = report.findings
    assert finding.check == "catalog"
    assert finding.severity is Severity.ERROR
    assert "secret-word" not in str(report)
    assert report.version is None


def test_a_member_that_is_away(cluster: LocalCluster) -> None:
    head, _, rest = cluster.url.partition("127.0.0.1")
    url = f"{head}127.0.0.1{rest.split('/')[0]},127.0.0.1:1/{rest.split('/', 1)[1]}"
    report = Doctor.look(url, limits=SLOW)
    assert [finding.check for finding in report.findings] == ["members"]
    assert report.findings[0].where == "catalog member 127.0.0.1:1"


def test_the_command(cluster: LocalCluster) -> None:
    fine = CliRunner().invoke(app, ["doctor", "--catalog", cluster.url])
    assert fine.exit_code == 0, fine.output
    assert "nothing to do" in fine.stdout
    with CASES["drift"].plant(cluster):
        sick = CliRunner().invoke(app, ["doctor", "--catalog", cluster.url, "--json"])
        told = CliRunner().invoke(app, ["doctor", "--catalog", cluster.url])
    assert (sick.exit_code, told.exit_code) == (1, 1)
    content = json.loads(sick.stdout)
    assert content["fine"] is False
    assert [finding["check"] for finding in content["findings"]] == ["drift"]
    assert "error: tables: " in told.stdout
