"""A promotion that cannot be is refused with what stands in its way, and the shard serves as before."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import insert

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog, publish_change
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.promote import Demoted, Promotion, Stage
from shardlib_ops.manager.promote.server import Node
from shardlib_ops.manager.promote.swap import with_replica, without_replica
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.resharder import Resharder
from tests.support.eventually import eventually
from tests.support.promote_runner import die_at
from tests.support.writers import metadata, note

pytestmark = pytest.mark.timeout(240)

SHARD = "shard-01"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2, replicas=1, settings={"max_standby_streaming_delay": "30s"}) as made:
        with ShardedEngine(made.url) as engine:
            engine.create_all(metadata)
        yield made


@pytest.fixture(scope="module")
def engine(cluster: LocalCluster) -> Iterator[ShardedEngine]:
    with ShardedEngine(cluster.url, reroute_timeout_s=20) as made:
        yield made


@pytest.fixture(scope="module")
def key(engine: ShardedEngine) -> str:
    """A key of the shard."""
    return next(key for key in map(str, range(1000)) if engine.shard_for(key).name == SHARD)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that the servers' account may pass, unlike those of `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="shardtest-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def manager(cluster: LocalCluster) -> AsyncIterator[Manager]:
    async with Manager(cluster.url) as made:
        yield made


def primary(cluster: LocalCluster) -> LocalServer:
    return cluster.primary(SHARD)


def replica(cluster: LocalCluster) -> LocalServer:
    return cluster.replicas(SHARD)[0]


@asynccontextmanager
async def unchanged(manager: Manager, engine: ShardedEngine, key: str) -> AsyncIterator[None]:
    """Afterwards the same server is the primary, takes writes at once, and has only the gates of the topology."""
    before = await manager.get_shard(SHARD)
    yield
    topology = await manager.topology()
    after = topology.shard(SHARD)
    assert (after.primary, after.replicas) == (before.primary, before.replicas)
    await asyncio.to_thread(write, engine, key)
    with psycopg.connect(after.primary.conninfo()) as conn:
        assert conn.execute("SHOW default_transaction_read_only").fetchone() == ("off",)
        gates = conn.execute(
            "SELECT substring(relname FROM 6)::int FROM pg_class"
            " WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^gate_[0-9]+$'"
        ).fetchall()
        assert {number for (number,) in gates} == set(topology.gates_of(after.id))
    record = await manager.get_promotion(SHARD)
    assert record is None or record.stage.over


async def resumed(manager: Manager) -> Promotion:
    """Resume as soon as the lease of the dead manager has ended."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await manager.resume_promotion(SHARD)
            except InvalidTopology as error:
                if "another manager is at work" not in str(error):
                    raise


def write(engine: ShardedEngine, key: str) -> None:
    with engine.session(key) as session:
        session.execute(insert(note).values(key=key, uid=uuid4().hex))
        session.commit()


async def test_endpoints_that_are_none_of_its_replicas(manager: Manager, cluster: LocalCluster) -> None:
    own, other = primary(cluster), cluster.replicas("shard-02")[0]
    with pytest.raises(
        InvalidTopology, match=f"127.0.0.1:{other.port} is no replica of shard 'shard-01'.*its replicas"
    ):
        await manager.promote_replica(SHARD, other.dsn)
    with pytest.raises(InvalidTopology, match="is the primary of shard 'shard-01' already"):
        await manager.promote_replica(SHARD, f"127.0.0.1:{own.port}")
    with pytest.raises(InvalidTopology, match="there is no shard 'shard-09'"):
        await manager.promote_replica("shard-09")
    with pytest.raises(InvalidArgument, match="budget_s=0"):
        await manager.promote_replica(SHARD, budget_s=0)


async def test_everything_that_is_wrong_is_told_at_once(
    manager: Manager, cluster: LocalCluster, engine: ShardedEngine, key: str
) -> None:
    async with unchanged(manager, engine, key):
        with primary(cluster).connect() as here, replica(cluster).connect() as there:
            there.execute("SELECT pg_wal_replay_pause()")
            here.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
            here.execute("BEGIN; CREATE TABLE prepared(); PREPARE TRANSACTION 'forgotten'")
            here.execute("SELECT pg_logical_emit_message(true, 'test', repeat('x', 200000))")
            try:
                with pytest.raises(InvalidTopology) as refused:
                    await manager.promote_replica(SHARD, max_lag_bytes=100_000)
                faults = await manager.check_promotion(SHARD, max_lag_bytes=100_000)
            finally:
                here.execute("ROLLBACK PREPARED 'forgotten'")
                here.execute("SELECT pg_drop_replication_slot('cdc')")
                there.execute("SELECT pg_wal_replay_resume()")
        for told in (
            "holds prepared transaction 'forgotten' of postgres",
            "has the logical replication slot 'cdc'",
            "has its replay paused",
            "bytes behind, 100000 may be",
        ):
            assert told in refused.value.problem
            assert any(told in fault.problem for fault in faults)
        assert "ROLLBACK PREPARED" in refused.value.way_out


async def test_a_server_that_is_no_copy_of_the_primary(manager: Manager, cluster: LocalCluster) -> None:
    alien = Dsn(cluster.spare("alien").dsn)
    catalog = open_catalog(cluster.url)

    def put(now: Topology) -> Topology:
        return with_replica(now, now.shard(SHARD).id, alien, nonce=uuid4().hex)

    def take(now: Topology) -> Topology:
        return without_replica(now, now.shard(SHARD).id, alien, nonce=uuid4().hex)

    publish_change(catalog, put)
    try:
        with pytest.raises(InvalidTopology, match="is no copy of the primary"):
            await manager.promote_replica(SHARD, alien.reveal())
    finally:
        publish_change(catalog, take)
        catalog.close()
    with pytest.raises(InvalidTopology, match="is no copy of the primary"):
        await manager.add_replica(SHARD, alien.reveal())


async def test_a_replica_that_is_down_can_be_taken_off_and_put_back(manager: Manager, cluster: LocalCluster) -> None:
    down = replica(cluster)
    down.stop()
    try:
        with pytest.raises(InvalidTopology, match=r"does not answer.*remove-replica"):
            await manager.promote_replica(SHARD)
        assert (await manager.remove_replica(SHARD, f"127.0.0.1:{down.port}")).replicas == ()
        with pytest.raises(InvalidTopology, match="has no replica"):
            await manager.promote_replica(SHARD)
    finally:
        down.start()
    assert (await manager.add_replica(SHARD, down.dsn)).replicas == (Dsn(down.dsn),)
    with pytest.raises(InvalidTopology, match="is a server of shard 'shard-01' already"):
        await manager.add_replica(SHARD, down.dsn)


async def test_a_transaction_that_holds_a_gate_is_named(
    manager: Manager, cluster: LocalCluster, engine: ShardedEngine, key: str
) -> None:
    async with unchanged(manager, engine, key):
        with engine.session(key) as session:
            session.execute(insert(note).values(key=key, uid="held"))
            pid = session.connection().connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
            with pytest.raises(
                InvalidTopology, match=f"transactions hold the shard's gates: process {pid} of postgres"
            ):
                await manager.promote_replica(SHARD, budget_s=0.5)
            session.commit()
    with primary(cluster).connect() as conn:
        assert conn.execute("SELECT count(*) FROM note WHERE uid = 'held'").fetchone() == (1,)


async def test_a_writer_without_a_gate_is_named_and_keeps_its_work(
    manager: Manager, cluster: LocalCluster, engine: ShardedEngine, key: str
) -> None:
    async with unchanged(manager, engine, key):
        with primary(cluster).connect(autocommit=False, application_name="nightly") as conn:
            conn.execute("INSERT INTO note (key, uid) VALUES (%s, 'nightly')", (key,))
            with pytest.raises(
                InvalidTopology, match=r"take no gate have not ended: process \d+ of postgres \(nightly"
            ):
                await manager.promote_replica(SHARD, budget_s=0.5)
            conn.commit()
    with primary(cluster).connect() as conn:
        assert conn.execute("SELECT count(*) FROM note WHERE uid = 'nightly'").fetchone() == (1,)


async def test_a_replica_that_does_not_replay_the_closing_is_not_promoted(
    manager: Manager, cluster: LocalCluster, engine: ShardedEngine, key: str
) -> None:
    async with unchanged(manager, engine, key):
        gate = (await manager.topology()).default_gate("s1")
        there = replica(cluster)

        def replicated() -> bool:
            with there.connect() as conn:
                row = conn.execute("SELECT to_regclass(%s) IS NOT NULL", (f"shardlib.gate_{gate}",)).fetchone()
                return bool(row and row[0])

        eventually(replicated, within_s=40)
        with there.connect(autocommit=False, application_name="report") as conn:
            conn.execute(f"LOCK TABLE shardlib.gate_{gate} IN ACCESS SHARE MODE")
            with pytest.raises(InvalidTopology, match=r"has not replayed.*\(report\) holds a gate there"):
                await manager.promote_replica(SHARD, budget_s=1.0)
            conn.rollback()
        assert there.role == "replica"


async def test_a_job_and_a_promotion_exclude_each_other(
    manager: Manager, cluster: LocalCluster, engine: ShardedEngine, key: str
) -> None:
    async with unchanged(manager, engine, key):
        job = await manager.split(SHARD, targets=[{"shard_id": "shard-02"}])
        try:
            with pytest.raises(InvalidTopology, match=f"shard 'shard-01' takes part in job {job.id}"):
                await manager.promote_replica(SHARD)
        finally:
            await manager.cancel(job.id)
            async with Resharder(cluster.url) as resharder, asyncio.timeout(60):
                await resharder.run(job.id)
        await asyncio.to_thread(die_at, cluster.url, SHARD, "recorded")
        with pytest.raises(InvalidTopology, match="a promotion of shard 'shard-01' is under way"):
            await manager.split(SHARD, targets=[{"shard_id": "shard-02"}])
        with pytest.raises(InvalidTopology, match=r"another manager is at work|is open since"):
            await manager.promote_replica(SHARD)
        record = await resumed(manager)
        assert (record.stage, record.error) == (Stage.UNDONE, "the manager that began it is gone")


async def test_a_manager_that_was_replaced_cannot_promote(cluster: LocalCluster) -> None:
    there = Dsn(replica(cluster).dsn)
    with primary(cluster).connect() as conn:
        conn.execute("INSERT INTO shardlib.job (id, token) VALUES (0, 8)")
        try:
            node = Node(there, SHARD, Runner(0, 7))
            found = conn.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            assert found is not None
            assert await node.replayed(found[0], 10)
            assert not await node.promote()
            assert await node.in_recovery()
            await node.close()
        finally:
            conn.execute("DELETE FROM shardlib.job WHERE id = 0")


async def test_a_cancelled_promotion_opens_the_shard_again(manager: Manager, engine: ShardedEngine, key: str) -> None:
    async with unchanged(manager, engine, key):
        closed = asyncio.Event()

        async def told(step: str) -> None:
            if step == "read_only":
                closed.set()
                await asyncio.sleep(30)

        task = asyncio.create_task(manager.promote_replica(SHARD, on_step=told))
        await asyncio.wait_for(closed.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        record = await manager.get_promotion(SHARD)
        assert record is not None
        assert (record.stage, record.error) == (Stage.UNDONE, "it was cancelled")


def shard_command(cluster: LocalCluster, *arguments: str) -> tuple[int, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "shardlib_ops.cli.main", "shard", *arguments, "--catalog", cluster.url, "--json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return ran.returncode, json.loads(ran.stdout)


async def test_the_command_promotes_and_fences_the_old_primary(
    manager: Manager, cluster: LocalCluster, engine: ShardedEngine, key: str
) -> None:
    old, new = primary(cluster), replica(cluster)
    assert await asyncio.to_thread(shard_command, cluster, "promote", SHARD, "--check") == (0, {"faults": []})
    with old.connect(autocommit=False, application_name="reader") as reader:
        reader.execute("SELECT 1")  # it has written nothing: its session is ended
        code, said = await asyncio.to_thread(shard_command, cluster, "promote", SHARD, "--yes", "--budget", "10")
        with pytest.raises(psycopg.OperationalError):
            reader.execute("SELECT 1")
    assert (code, said["stage"]) == (0, "done"), said
    assert said["new"] == Dsn(new.dsn).safe()
    assert f"127.0.0.1:{old.port} is no server of the shard now" in said["error"]
    await asyncio.to_thread(write, engine, key)
    with old.connect() as conn:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            conn.execute("INSERT INTO note (key, uid) VALUES ('x', 'foreign')")
        gates = conn.execute(
            "SELECT 1 FROM pg_class WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^gate_'"
        ).fetchall()
        assert gates == []
    code, said = await asyncio.to_thread(shard_command, cluster, "add-replica", SHARD, old.dsn)
    assert code == 1
    assert "takes writes" in said["message"]
    await cluster.rejoin(Demoted(SHARD, Dsn(old.dsn), Dsn(new.dsn)))
    code, said = await asyncio.to_thread(shard_command, cluster, "add-replica", SHARD, old.dsn)
    assert (code, said["primary"], said["replicas"]) == (0, Dsn(new.dsn).safe(), [Dsn(old.dsn).safe()])


async def test_a_local_cluster_starts_again_as_it_was_promoted(place: Path) -> None:
    folder = place / "kept"
    with LocalCluster(shards=1, replicas=1, directory=folder) as cluster:
        async with Manager(cluster.url) as manager:
            promoted = await manager.promote_replica(SHARD, rejoin=cluster.rejoin)
    with LocalCluster(shards=1, replicas=1, directory=folder) as again:
        async with Manager(again.url) as manager:
            assert await manager.get_shard(SHARD) == promoted
        assert str(again.primary(SHARD).port) == promoted.primary.port
        with again.primary(SHARD).connect() as conn:

            def streaming() -> bool:
                return bool(conn.execute("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'").fetchall())

            eventually(streaming, within_s=60, what="the old primary does not follow")
