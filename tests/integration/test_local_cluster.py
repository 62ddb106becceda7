"""LocalCluster as a whole: topology, replicas, folders, and starts that fail."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardlib.catalog import open_catalog
from shardlib.errors import InvalidArgument, ShardUnavailable, UnsupportedOperation
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from shardlib_ops.local import places
from shardlib_ops.local.binaries import find_postgres
from shardlib_ops.local.process import Account, account, running_in
from tests.support.eventually import eventually


def topology_of(cluster: LocalCluster) -> Topology:
    catalog = open_catalog(cluster.url, timeout_s=10)
    try:
        return catalog.load()
    finally:
        catalog.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that the servers' account may pass, unlike those of `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="shardtest-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def temporary(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where clusters of the test have their folders, empty at first."""
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def entries() -> set[str]:
    """What the register says that this process owns."""
    return {path.name for path in places.cache().glob(f"clusters/{os.getpid()}-*.json")}


def test_topology_names_the_servers() -> None:
    with LocalCluster(shards=2, replicas=1, vnode_count=16, hash_function="xxhash") as cluster:
        topology = topology_of(cluster)
        assert topology.version == 1
        assert topology.hash_function == "xxhash"
        assert len(topology.ring) == 32
        assert [(shard.id, shard.name) for shard in topology.shards] == [
            ("s1", "shard-01"),
            ("s2", "shard-02"),
        ]
        for shard in topology.shards:
            assert shard.primary.reveal() == cluster.primary(shard.name).dsn
            assert [one.reveal() for one in shard.replicas] == [one.dsn for one in cluster.replicas(shard.name)]
            with cluster.primary(shard.name).connect() as connection:
                gate = f"shardlib.gate_{topology.default_gate(shard.id)}"
                assert connection.execute("SELECT to_regclass(%s) IS NOT NULL", (gate,)).fetchone() == (True,)


def test_synchronous_commit_waits_for_the_replica() -> None:
    with LocalCluster(shards=1, replicas=1, synchronous=True, bootstrap=False) as cluster:
        primary, replica = cluster.servers
        with primary.connect() as writer, primary.connect() as watcher:
            writer.execute("CREATE TABLE t (n int)")
            replica.pause()
            writer.pgconn.send_query(b"INSERT INTO t VALUES (1)")
            waiting = f"SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = {writer.info.backend_pid}"
            eventually(lambda: watcher.execute(waiting).fetchone() == (True,), 5, "the commit waits")
            replica.resume()

            def answered() -> bool:
                writer.pgconn.consume_input()
                return not writer.pgconn.is_busy()

            eventually(answered, 10, "the commit is confirmed")
            while writer.pgconn.get_result() is not None:
                pass


def test_three_members_survive_the_loss_of_any_one() -> None:
    with LocalCluster(shards=1, etcd_members=3) as cluster:
        catalog = open_catalog(cluster.url, timeout_s=5)
        try:
            for member in cluster.etcd:
                member.kill()
                eventually(lambda: catalog.version() == 1, 20, f"without {member.name}", ignore=Exception)
                member.start()
        finally:
            catalog.close()


def test_catalog_survives_kill_and_pause() -> None:
    with LocalCluster(shards=1) as cluster:
        (etcd,) = cluster.etcd
        etcd.kill()
        etcd.kill()
        assert not etcd.running
        etcd.start()
        etcd.start()
        assert topology_of(cluster).version == 1
        etcd.pause()
        assert not etcd.healthy()
        etcd.resume()
        eventually(etcd.healthy, 5)
        etcd.pause()
        etcd.stop()
        assert not etcd.running


def test_folder_keeps_the_cluster(place: Path) -> None:
    folder = place / "cluster"
    with LocalCluster(shards=1, replicas=1, directory=folder) as cluster:
        url, before = cluster.url, topology_of(cluster)
        cluster.spare("spare-1")
        with cluster.primary("shard-01").connect() as connection:
            connection.execute("CREATE TABLE t AS SELECT 42 AS n")
        with pytest.raises(InvalidArgument, match=f"process {os.getpid()} runs"):
            LocalCluster(shards=1, replicas=1, directory=folder).start()
    assert running_in(folder) == []
    with pytest.raises(InvalidArgument, match="other options"):
        LocalCluster(shards=2, directory=folder).start()
    with LocalCluster(shards=1, replicas=1, directory=folder) as cluster:
        assert cluster.url == url
        assert topology_of(cluster).cluster_id == before.cluster_id
        assert [spare.name for spare in cluster.spares] == ["spare-1"]
        for server in cluster.servers:
            with server.connect() as connection:
                assert connection.execute("SELECT n FROM t").fetchone() == (42,)


def test_folder_with_something_else_is_left_alone(place: Path) -> None:
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidArgument, match="an empty folder, or that of a local cluster"):
        LocalCluster(shards=1, directory=place).start()
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]


def test_spare_is_empty_and_asked_for_twice_the_same() -> None:
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        spare = cluster.spare("spare-1")
        assert spare.shard is None
        assert spare not in cluster.servers
        spare.kill()
        assert cluster.spare("spare-1") is spare
        with spare.connect() as connection:
            query = "SELECT count(*) FROM pg_namespace WHERE nspname = 'shardlib'"
            assert connection.execute(query).fetchone() == (0,)
        for name in ("shard-01-a", "../up", ""):
            with pytest.raises(InvalidArgument):
                cluster.spare(name)


def test_failed_start_tells_why_and_leaves_nothing(temporary: Path) -> None:
    before = entries()
    cluster = LocalCluster(shards=2, settings={"work_mem": "plenty"}, timeout_s=10)
    with pytest.raises(ShardUnavailable, match="invalid value for parameter") as caught:
        cluster.start()
    assert "password" not in str(caught.value)
    assert not cluster.running
    assert list(temporary.iterdir()) == []
    assert entries() == before
    cluster.stop()


def test_names_what_is_not_there() -> None:
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        with pytest.raises(InvalidArgument, match=r"'shard-9'.*shard-01"):
            cluster.primary("shard-9")
        with pytest.raises(InvalidArgument, match=r"'x'.*shard-01-a"):
            cluster.server("x")
    with pytest.raises(UnsupportedOperation, match="is not running"):
        _ = cluster.url


def test_starts_again_after_a_stop() -> None:
    cluster = LocalCluster(shards=1, bootstrap=False)
    for _ in range(2):
        with cluster:
            folder = cluster.directory
            assert running_in(folder)
        assert not folder.exists()


async def test_async_with() -> None:
    async with LocalCluster(shards=1, bootstrap=False) as cluster:
        folder = cluster.directory
        assert cluster.running
    assert not folder.exists()


async def test_cancelled_start_leaves_nothing(temporary: Path) -> None:
    before = entries()
    cluster = LocalCluster(shards=2, bootstrap=False)
    entering = asyncio.ensure_future(cluster.__aenter__())
    await asyncio.sleep(0.05)  # somewhere in the start
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert not cluster.running
    assert os.listdir(temporary) == []  # noqa: PTH208 - blocks no longer than iterdir would
    assert entries() == before


def test_clusters_side_by_side_do_not_meet() -> None:
    clusters = [LocalCluster(shards=1, bootstrap=False) for _ in range(4)]
    threads = [threading.Thread(target=cluster.start) for cluster in clusters]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(cluster.running for cluster in clusters)
        ports = [port for one in clusters for port in (one.servers[0].port, one.etcd[0].port)]
        assert len(set(ports)) == len(ports)
    finally:
        for cluster in clusters:
            cluster.stop()


def test_template_is_made_once_by_concurrent_starters(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIB_CACHE", str(place))
    code = "from shardlib_ops import LocalCluster\nwith LocalCluster(shards=1, bootstrap=False): pass"
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
    for run in runs:
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors.decode()
    templates = [path for path in (place / "templates").iterdir() if path.is_dir()]
    assert len(templates) == 1
    assert list((place / "clusters").glob("*.json")) == []


def test_programs_below_a_closed_folder_are_copied(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if account() is None:
        pytest.skip("only root drops to another account, which may not pass")
    monkeypatch.setenv("SHARDLIB_CACHE", str(place))
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    package = find_postgres(None, None).bin.parent.parent
    for folder in (package, package.with_name(f"{package.name}.libs")):
        if folder.is_dir():
            shutil.copytree(folder, closed / folder.name, symlinks=True)
    for _ in range(2):
        with LocalCluster(shards=1, pg_bin=closed / package.name / "pginstall" / "bin", bootstrap=False) as cluster:
            assert cluster.servers[0].running
    assert closed.stat().st_mode & 0o777 == 0o700
    assert len([path for path in (place / "programs").iterdir() if path.is_dir()]) == 1


def test_ordinary_user_needs_no_other_account(place: Path) -> None:
    """Run as `nobody` by root; any other user runs all of these tests so anyway."""
    nobody = account()
    if nobody is None:
        pytest.skip("the tests run as an ordinary user already")
    python = _python_for(nobody)
    code = (
        "import os\n"
        "from shardlib_ops import LocalCluster\n"
        "with LocalCluster(shards=2, replicas=1, bootstrap=False) as cluster:\n"
        "    assert os.geteuid() != 0\n"
        "    cluster.servers[0].kill(); cluster.servers[0].start()\n"
        "    print(cluster.directory)\n"
    )
    home = place / "home"
    home.mkdir()
    os.chown(home, nobody.uid, nobody.gid)
    run = subprocess.run(
        [python, "-c", code],
        user=nobody.uid, group=nobody.gid, extra_groups=[], cwd=home, capture_output=True, text=True, timeout=60,
        env={"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not Path(run.stdout.strip()).exists()
    assert (home / ".cache" / "shardlib" / "templates").is_dir()


def _python_for(owner: Account) -> str:
    wanted = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{wanted}", f"/usr/local/bin/{wanted}"):
        path = Path(candidate)
        if path.exists() and places.blocked_at(path.resolve(), owner) is None:
            return candidate
    pytest.skip(f"{owner.name} can execute no {wanted} of this machine")
