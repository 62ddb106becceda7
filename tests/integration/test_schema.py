"""Alembic over every shard: in order, alone, to the end or not at all, and never while rows move."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import BigInteger, Column, Integer, MetaData, Table, Text
from typer.testing import CliRunner, Result

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.errors import InvalidArgument, InvalidTopology, ShardKeyRequired
from shardlib_ops import LocalCluster
from shardlib_ops.cli.main import app
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Status
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.schema import BlockingSchemaManager, MigrationFailed, SchemaManager
from shardlib_ops.schema.turn import change_of
from tests.support.eventually import eventually, eventually_async
from tests.support.migrations import Migrations

pytestmark = pytest.mark.timeout(240)

ORDERS = 'op.execute("CREATE TABLE orders (tenant text NOT NULL, id bigint NOT NULL, PRIMARY KEY (tenant, id))")'
COUNTRY = 'op.execute("CREATE TABLE country (code text PRIMARY KEY)")'
SHARDS = ("shard-01", "shard-02", "shard-03")


def metadata() -> MetaData:
    found = MetaData()
    Table(
        "orders",
        found,
        Column("tenant", Text, primary_key=True, info={"shard_key": True}),
        Column("id", BigInteger, primary_key=True),
    )
    Table("country", found, Column("code", Text, primary_key=True), info={"reference": True})
    return found


@pytest.fixture(scope="module")
def running() -> Iterator[LocalCluster]:
    with LocalCluster(shards=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: LocalCluster) -> Iterator[LocalCluster]:
    """The three shards without a table or a revision."""
    yield running
    with ShardedEngine(running.url) as engine:
        engine.drop_all(metadata())
    for shard in SHARDS:
        with connected(running, shard) as conn:
            conn.execute("DROP TABLE IF EXISTS shardlib.alembic_version, orders, country, extra")
    with closing(open_catalog(running.url)) as catalog:
        found = change_of(catalog)
        assert found is None or not found.open, found


@pytest.fixture
def migrations(tmp_path: Path) -> Migrations:
    found = Migrations(tmp_path)
    found.add("a1", ORDERS, COUNTRY)
    return found


@contextmanager
def connected(cluster: LocalCluster, shard: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    with cluster.primary(shard).connect() as conn:
        yield conn


def revisions(cluster: LocalCluster) -> list[str | None]:
    found: list[str | None] = []
    for shard in SHARDS:
        with connected(cluster, shard) as conn:
            if conn.execute("SELECT to_regclass('shardlib.alembic_version')").fetchone() == (None,):
                found.append(None)
                continue
            rows = conn.execute("SELECT version_num FROM shardlib.alembic_version").fetchall()
            found.append(str(rows[0][0]) if rows else None)
    return found


def schema(cluster: LocalCluster, migrations: Migrations, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["schema", *arguments, "--catalog", cluster.url, "--config", migrations.ini], catch_exceptions=True
    )


def test_every_shard_is_brought_to_the_newest_revision(cluster: LocalCluster, migrations: Migrations) -> None:
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        (script,) = manager.sql()
        assert "CREATE TABLE orders" in script.sql
        assert "shardlib.alembic_version" in script.sql
        assert revisions(cluster) == [None, None, None]

        applied = manager.apply()
        assert applied.target == ("a1",)
        assert len(applied.changed) == 3
        assert applied.unknown == ("country", "orders")
        assert revisions(cluster) == ["a1", "a1", "a1"]

        again = manager.apply(metadata=metadata())
        assert (again.changed, again.registered, again.unknown) == ((), ("country", "orders"), ())
        status = manager.status(metadata=metadata())
        assert status.at_one_revision
        assert (status.heads, status.drift, status.unlike_metadata, status.unknown) == (("a1",), (), (), ())
    with ShardedEngine(cluster.url) as engine:
        assert {table.name for table in engine.topology.tables} == {"orders", "country"}


def test_a_shard_that_refuses_stops_the_change_and_the_next_run_goes_on(
    cluster: LocalCluster, migrations: Migrations
) -> None:
    with connected(cluster, SHARDS[1]) as conn:
        conn.execute("CREATE TABLE extra (x int)")
    migrations.add("a2", 'op.execute("CREATE TABLE extra (x int)")')
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        with pytest.raises(MigrationFailed) as caught:
            manager.apply()
        names = SHARDS
        assert caught.value.shard == names[1]
        assert caught.value.done == (names[0],)
        assert caught.value.left == (names[1], names[2])
        assert "revision a2" in str(caught.value)
        assert 'relation "extra" already exists' in str(caught.value)
        # One transaction: what stood before the fault is not there either.
        assert revisions(cluster) == ["a2", None, None]
        status = manager.status()
        assert not status.at_one_revision
        assert status.change is not None
        assert status.change.open
        assert status.change.failed == names[1]

        with connected(cluster, SHARDS[1]) as conn:
            conn.execute("DROP TABLE extra")
        applied = manager.apply()
        assert applied.unchanged == (names[0],)
        assert applied.changed == (names[1], names[2])
        after = manager.status()
    assert revisions(cluster) == ["a2", "a2", "a2"]
    assert after.at_one_revision
    assert after.change is not None
    assert not after.change.open


def test_several_shards_at_once(cluster: LocalCluster, migrations: Migrations, tmp_path: Path) -> None:
    """Each of the last two waits, in its migration, for the other: one after the other would never end."""
    (tmp_path / "met").mkdir()
    migrations.add(
        "a2",
        f"folder = Path({str(tmp_path / 'met')!r})",
        "port = op.get_bind().exec_driver_sql(\"SELECT current_setting('port')\").scalar()",
        "(folder / port).touch()",
        "until = time.monotonic() + 60",
        "while len(list(folder.iterdir())) == 2 and time.monotonic() < until: time.sleep(0.05)",
        "assert time.monotonic() < until",
    )
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        assert len(manager.apply(parallel=2).changed) == 3
    assert revisions(cluster) == ["a2", "a2", "a2"]


@contextmanager
def applying(cluster: LocalCluster, migrations: Migrations, flag: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`schema apply` in a process of its own, which is in the middle of the first shard's migration."""
    command = [sys.executable, "-m", "shardlib_ops.cli.main", "schema", "apply", "--catalog", cluster.url]
    process = subprocess.Popen([*command, "--config", migrations.ini])
    try:

        def begun() -> bool:
            assert process.poll() is None, "it has ended before"
            return flag.exists()

        eventually(begun, 60)
        yield process
    finally:
        process.kill()
        process.wait(30)


def slow(migrations: Migrations, flag: Path, seconds: float) -> None:
    migrations.add(
        "a2",
        'op.execute("CREATE TABLE extra (x int)")',
        f"flag = Path({str(flag)!r})",
        f"op.execute('SELECT 1'); flag.touch(); op.execute('SELECT pg_sleep({seconds})')",
    )


def test_two_at_once(cluster: LocalCluster, migrations: Migrations, tmp_path: Path) -> None:
    slow(migrations, tmp_path / "flag", 2)
    with applying(cluster, migrations, tmp_path / "flag") as first:
        with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
            with pytest.raises(InvalidTopology, match="another process changes the tables"):
                manager.apply()
            applied = manager.apply(wait_s=100)
        assert first.wait(60) == 0
    assert applied.changed == ()
    assert revisions(cluster) == ["a2", "a2", "a2"]


def test_killed_in_the_middle(cluster: LocalCluster, migrations: Migrations, tmp_path: Path) -> None:
    slow(migrations, tmp_path / "flag", 3)
    with applying(cluster, migrations, tmp_path / "flag") as first:
        os.kill(first.pid, signal.SIGKILL)
        first.wait(30)
        with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
            applied = manager.apply(wait_s=100)
    # Whether the shard that it was at came to its end or not: it was changed once.
    assert applied.target == ("a2",)
    assert revisions(cluster) == ["a2", "a2", "a2"]


def test_ctrl_c_in_the_middle(cluster: LocalCluster, migrations: Migrations, tmp_path: Path) -> None:
    slow(migrations, tmp_path / "flag", 120)
    with applying(cluster, migrations, tmp_path / "flag") as first:
        first.send_signal(signal.SIGINT)
        assert first.wait(30) == 130
    # What ran on the server has ended as well, and let go of its locks.
    running = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shardlib schema'"
    with connected(cluster, SHARDS[0]) as conn:
        eventually(lambda: conn.execute(running).fetchone() == (0,), 30, running)
    assert revisions(cluster) == [None, None, None]
    migrations.add("a2")
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        assert manager.apply().target == ("a2",)


def test_what_runs_outside_of_a_transaction(cluster: LocalCluster, migrations: Migrations) -> None:
    migrations.env(
        "from shardlib_ops.schema import run_migrations\nassert run_migrations(transaction_per_migration=True)\n"
    )
    migrations.add(
        "a2",
        "with op.get_context().autocommit_block():",
        "    op.execute('CREATE INDEX CONCURRENTLY by_id ON orders (id)')",
        'op.execute("CREATE TABLE extra (x int)")',
    )
    migrations.add("a3", 'op.execute("CREATE TABLE extra (x int)")')
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        with pytest.raises(MigrationFailed, match="revision a3"):
            manager.apply()
        assert revisions(cluster) == ["a2", None, None]  # each migration is a transaction here
        migrations.add("a3")
        assert manager.apply().target == ("a3",)
        assert manager.status().drift == ()


def test_a_lock_is_waited_for_a_moment_at_a_time(cluster: LocalCluster, migrations: Migrations) -> None:
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        manager.apply()
        migrations.add("a2", 'op.execute("ALTER TABLE orders ADD note text")')
        with connected(cluster, SHARDS[0]) as holder, connected(cluster, SHARDS[0]) as reader:
            holder.execute("BEGIN; SELECT FROM orders")
            with pytest.raises(MigrationFailed, match="the oldest transactions there are: process") as caught:
                manager.apply(lock_timeout_s=0.1, lock_wait_s=1)
            assert str(holder.info.backend_pid) in str(caught.value)
            # Nobody waits behind it, and nothing is half done.
            reader.execute("SET statement_timeout = '5s'")
            reader.execute("SELECT FROM orders")
            holder.execute("ROLLBACK")
        assert revisions(cluster) == ["a1", "a1", "a1"]
        assert manager.apply().target == ("a2",)


def test_tables_without_a_revision(cluster: LocalCluster, migrations: Migrations) -> None:
    with ShardedEngine(cluster.url) as engine:
        engine.create_all(metadata())
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        with pytest.raises(InvalidTopology, match="and no revision; say which one they are at: `schema stamp"):
            manager.apply()
        assert manager.stamp("a1") == ("a1",)
        assert manager.apply().changed == ()


def test_stamping_one_shard_tells_of_that_one_alone(cluster: LocalCluster, migrations: Migrations) -> None:
    def change(manager: BlockingSchemaManager) -> tuple[tuple[str, ...], bool]:
        found = manager.status().change
        assert found is not None
        return found.done, found.open

    migrations.add("a2")
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        manager.stamp("a1", shards=["shard-02"])
        assert change(manager) == (("shard-02",), True)
        assert revisions(cluster) == [None, "a1", None]
        # Of those that are at another revision none counts as done; one that is at it does, stamped now or before.
        manager.stamp("a2", shards=["s3"])
        assert change(manager) == (("shard-03",), True)
        manager.stamp("a2", shards=["shard-01"])
        assert change(manager) == (("shard-01", "shard-03"), True)
        manager.stamp("a2", shards=["shard-01"])
        assert change(manager) == (("shard-01", "shard-03"), True)
        manager.stamp("a2")
        assert change(manager) == (SHARDS, False)
    assert revisions(cluster) == ["a2", "a2", "a2"]


def test_drift_is_found(cluster: LocalCluster, migrations: Migrations) -> None:
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        manager.apply(metadata=metadata())
        with connected(cluster, SHARDS[2]) as conn:
            conn.execute("ALTER TABLE orders ADD note text; DROP TABLE country")
        drift = manager.status().drift
        assert len(drift) == 2, drift
        assert "table 'country': missing, but on 'shard-01', 'shard-02': table" in drift[0]
        assert "table 'orders', column 'note': text NULL, but on 'shard-01', 'shard-02': missing" in drift[1]
        more = metadata()
        more.tables["orders"].append_column(Column("price", Integer))
        unlike = manager.status(metadata=more).unlike_metadata
        assert unlike == ("column 'price' of table 'orders' is in the metadata and not on the shards",)
    shown = schema(cluster, migrations, "status")
    assert shown.exit_code == 1
    assert "the shards differ:" in shown.output


def test_a_new_shard_has_the_revision_and_a_job_keeps_changes_away(
    cluster: LocalCluster, migrations: Migrations
) -> None:
    spare = cluster.spare("late")

    async def story() -> None:
        async with (
            SchemaManager(cluster.url, config=migrations.ini) as manager,
            Manager(cluster.url) as operator,
            asyncio.timeout(200),
        ):
            await manager.apply(metadata=metadata())
            job = await operator.split("s1", targets=[{"name": "late", "primary_endpoint": spare.dsn}])
            migrations.add("a2", 'op.execute("ALTER TABLE orders ADD note text")')
            refusals: dict[str, str] = {}

            async def at(step: str) -> None:
                if step in ("leg_copied", "leg_compared"):
                    with pytest.raises(InvalidTopology, match=f"job {job.id} is ") as caught:
                        await manager.apply()
                    refusals[step] = str(caught.value)

            async with Resharder(cluster.url, on_step=at) as resharder:
                rested = await resharder.run(job.id)
                assert rested.status is Status.VALIDATION, rested.error
                assert "'precopy'" in refusals["leg_copied"]
                assert f"`reshard cancel {job.id}`" in refusals["leg_copied"]
                assert "leg_compared" in refusals
                with pytest.raises(InvalidTopology, match="`reshard complete` or `reshard rollback`"):
                    await manager.apply()
                done = await resharder.run(job.id, complete=True)
            assert done.status is Status.COMPLETED, done.error
            status = await manager.status(metadata=metadata())
            assert [(one.name, one.revision) for one in status.shards][-1] == ("late", ("a1",))
            assert status.drift == ()
            assert len((await manager.apply()).changed) == 4

            back = await operator.merge(["late"], target={"shard_id": "s1"})
            async with Resharder(cluster.url) as resharder:
                ended = await resharder.run(back.id, complete=True)
                assert ended.status is Status.COMPLETED, ended.error
            await operator.delete_shard("late")

    asyncio.run(story())


async def test_a_job_waits_for_a_half_done_change(cluster: LocalCluster, migrations: Migrations) -> None:
    with connected(cluster, SHARDS[1]) as conn:
        conn.execute("CREATE TABLE extra (x int)")
    async with (
        SchemaManager(cluster.url, config=migrations.ini) as manager,
        Manager(cluster.url) as operator,
        asyncio.timeout(200),
    ):
        await manager.apply(metadata=metadata())
        migrations.add("a2", 'op.execute("CREATE TABLE extra (x int)")')
        with pytest.raises(MigrationFailed):
            await manager.apply()
        job = await operator.drain("shard-03")
        async with Resharder(cluster.url) as resharder:
            running = asyncio.create_task(resharder.run(job.id))

            async def waits() -> bool:
                assert not running.done()
                return "it stopped at shard 'shard-02'" in ((await operator.get_job(job.id)).error or "")

            await eventually_async(waits, 60, every_s=0.2)
            with connected(cluster, SHARDS[1]) as conn:
                conn.execute("DROP TABLE extra")
            await manager.apply()
            assert (await running).status is Status.VALIDATION
            await operator.rollback(job.id)
            assert (await resharder.run(job.id)).status is Status.ROLLED_BACK
    assert revisions(cluster) == ["a2", "a2", "a2"]


def test_alembic_by_itself_does_as_before(migrations: Migrations) -> None:
    """`run_migrations` leaves it to the rest of `env.py`."""
    with pytest.raises(SystemExit, match="started by itself"):
        command.upgrade(Config(migrations.ini), "heads", sql=True)


def test_an_env_that_does_not_call_shardlib(cluster: LocalCluster, migrations: Migrations) -> None:
    migrations.env("raise SystemExit('it would migrate another database')")
    with (
        SchemaManager.sync(cluster.url, config=migrations.ini) as manager,
        pytest.raises(InvalidTopology, match=r"does not call shardlib.*from shardlib_ops.schema import run_migrations"),
    ):
        manager.apply()
    assert revisions(cluster) == [None, None, None]


def test_what_cannot_be_applied(cluster: LocalCluster, migrations: Migrations) -> None:
    unkeyed = MetaData()
    Table("loose", unkeyed, Column("id", Integer, primary_key=True))
    with SchemaManager.sync(cluster.url, config=migrations.ini) as manager:
        with pytest.raises(InvalidTopology, match="nowhere"):
            manager.apply("nowhere")
        with pytest.raises(ShardKeyRequired):
            manager.apply(metadata=unkeyed)
        for wrong in ({"parallel": 0}, {"lock_timeout_s": -1.0}, {"lock_wait_s": float("nan")}):
            with pytest.raises(InvalidArgument):
                manager.apply(**wrong)
    with SchemaManager.sync(cluster.url, config="nowhere.ini") as manager, pytest.raises(InvalidArgument, match="init"):
        manager.apply()
    assert revisions(cluster) == [None, None, None]


def test_the_commands(cluster: LocalCluster, migrations: Migrations, monkeypatch: pytest.MonkeyPatch) -> None:
    (migrations.folder / "shop_models.py").write_text(
        "from sqlalchemy import *\nm = MetaData()\n"
        "Table('orders', m, Column('tenant', Text, primary_key=True, info={'shard_key': True}),"
        " Column('id', BigInteger, primary_key=True))\n"
        "Table('country', m, Column('code', Text, primary_key=True), info={'reference': True})\n"
    )
    monkeypatch.chdir(migrations.folder)
    monkeypatch.setenv("SHARDLIB_CATALOG", cluster.url)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = CliRunner().invoke
    told = run(app, ["schema", "apply", "--sql"])
    assert "CREATE TABLE orders" in told.stdout, told.output
    before = run(app, ["schema", "status", "--json"])
    assert json.loads(before.stdout)["heads"] == ["a1"], before.output
    applied = run(app, ["schema", "apply", "--metadata", "shop_models:m", "--json"])
    assert applied.exit_code == 0, (applied.output, applied.exception)
    assert json.loads(applied.stdout)["registered"] == ["country", "orders"]
    assert json.loads(applied.stdout)["target"] == ["a1"]
    fine = run(app, ["schema", "status", "--metadata", "shop_models:m"])
    assert fine.exit_code == 0, fine.output
    assert "newest: a1" in fine.stdout
    assert run(app, ["schema", "stamp", "base", "--yes"]).exit_code == 0
    assert revisions(cluster) == [None, None, None]
    wrong = run(app, ["schema", "status", "--metadata", "shop_models:nothing"])
    assert isinstance(wrong.exception, InvalidArgument)
