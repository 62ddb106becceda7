"""Whatever ends the owner of a local cluster, nothing of the cluster stays behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from shardlib_ops import LocalCluster
from shardlib_ops.local.process import running_in, started_at
from tests.support.eventually import eventually

pytestmark = pytest.mark.fault

OWNER = """
import json, os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, in which the tests may run, has it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from shardlib_ops import LocalCluster
with LocalCluster(shards=1, replicas=1, bootstrap=False) as cluster:
    cluster.spare("spare-1")
    watchdog = cluster._watchdog.pid
    print(json.dumps([str(cluster.directory), watchdog]), flush=True)
    {then}
"""
GONE_S = 40.0


class Owned(NamedTuple):
    process: subprocess.Popen[str]
    directory: Path
    watchdog: int


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache, hence a register, of this test alone, and its own temporary folder."""
    place = Path(tempfile.mkdtemp(prefix="st-"))
    place.chmod(0o755)
    monkeypatch.setenv("SHARDLIB_CACHE", str(place / "cache"))
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place / "cache"
    shutil.rmtree(place)


def owner(then: str = "time.sleep(60)") -> Owned:
    command = [sys.executable, "-c", OWNER.replace("{then}", then)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        directory, watchdog = json.loads(output.readline())
    assert running_in(Path(directory)), "the test must have something to lose"
    return Owned(process, Path(directory), watchdog)


def gone(owned: Owned, cache: Path) -> bool:
    entries = list((cache / "clusters").glob("*.json"))
    return not running_in(owned.directory) and not owned.directory.exists() and not entries


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_owner_ended_by_a_signal(cache: Path, number: signal.Signals) -> None:
    owned = owner()
    owned.process.send_signal(number)
    owned.process.wait(GONE_S)
    eventually(lambda: gone(owned, cache), GONE_S, "all is gone")
    eventually(lambda: started_at(owned.watchdog) is None, GONE_S, "the watchdog as well")


@pytest.mark.parametrize("then", ["os._exit(0)", "raise RuntimeError", "os.abort()", "sys.exit(3)"])
def test_owner_ends_by_itself(cache: Path, then: str) -> None:
    owned = owner(then)
    owned.process.wait(GONE_S)
    eventually(lambda: gone(owned, cache), GONE_S, "all is gone")


def test_paused_servers_go_too(cache: Path) -> None:
    owned = owner("cluster.servers[0].pause(); cluster.etcd[0].pause(); os.kill(os.getpid(), 9)")
    owned.process.wait(GONE_S)
    eventually(lambda: gone(owned, cache), GONE_S, "all is gone")


def test_next_cluster_cleans_when_the_watchdog_was_killed_as_well(cache: Path) -> None:
    owned = owner()
    os.kill(owned.watchdog, signal.SIGKILL)
    owned.process.kill()
    owned.process.wait(GONE_S)
    eventually(lambda: started_at(owned.watchdog) is None, GONE_S)
    assert running_in(owned.directory), "nobody cleaned yet"
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        assert not running_in(owned.directory)
        assert not owned.directory.exists()
        assert cluster.servers[0].running
    assert gone(owned, cache)


def test_owner_killed_in_the_middle_of_its_start(cache: Path) -> None:
    with LocalCluster(shards=1, bootstrap=False):
        pass  # a warm template: the kill falls on servers, not on initdb
    code = "from shardlib_ops import LocalCluster; LocalCluster(shards=2, replicas=2, bootstrap=False).start()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    eventually(lambda: list(cache.parent.glob("shardlib-*/*/data")), GONE_S, "it has begun")
    (directory,) = cache.parent.glob("shardlib-*")
    process.kill()
    process.wait(GONE_S)
    eventually(lambda: not running_in(directory) and not directory.exists(), GONE_S, "all is gone")
    eventually(lambda: not list((cache / "clusters").glob("*.json")), GONE_S)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_does_not_stop_its_parents_servers() -> None:
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        child = os.fork()
        if child == 0:
            try:
                cluster.stop()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        with cluster.servers[0].connect() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_shared_memory_of_killed_servers_is_freed(cache: Path) -> None:
    segments = Path("/proc/sysvipc/shm")
    if not segments.exists():
        pytest.skip("the segments of this system cannot be listed")
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        server = cluster.servers[0]
        segment = (server.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
        server.kill()
        assert segment in segments.read_text().split()
    assert segment not in segments.read_text().split()
