"""Ports, places, plans and programs of local clusters, without a server."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardlib.errors import InvalidArgument, InvalidTopology, UnsupportedOperation
from shardlib_ops.local import places, plan, registry
from shardlib_ops.local.binaries import find_etcd, find_postgres
from shardlib_ops.local.plan import Options
from shardlib_ops.local.ports import HOST, PortKeeper
from shardlib_ops.local.process import Account, Daemon, children_of, kill_all, running_in, started_at
from tests.support.eventually import eventually

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_ports_differ_and_stay_taken_until_closed() -> None:
    one, two = PortKeeper(), PortKeeper()
    ports = [keeper.take() for _ in range(50) for keeper in (one, two)]
    assert len(set(ports)) == len(ports)
    with socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind((HOST, ports[0]))
        one.close()
        two.close()
        other.bind((HOST, ports[0]))


def test_server_can_listen_on_a_kept_port_but_not_two() -> None:
    keeper = PortKeeper()
    port = keeper.take()
    for _ in range(2):
        with socket.create_server((HOST, port)):
            assert not PortKeeper().keep(port)
    keeper.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shards": 0}, "shards=0 "),
        ({"shards": True}, "shards=True "),
        ({"shards": 65}, "shards=65 "),
        ({"replicas": -1}, "replicas=-1 "),
        ({"replicas": 1.5}, r"replicas=1\.5 "),
        ({"etcd_members": 2}, "etcd_members=2 "),
        ({"synchronous": True}, "at least one replica"),
        ({"catalog_name": "a/b"}, "catalog_name='a/b'"),
        ({"catalog_name": ""}, "catalog_name=''"),
    ],
)
def test_options_name_what_is_wrong(arguments: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Options(**arguments)


def test_plan_comes_back_from_its_file_and_hides_passwords(tmp_path: Path) -> None:
    ports = iter(range(15_000, 16_000))
    options = Options(shards=2, replicas=2, synchronous=True, etcd_members=3, settings={"work_mem": "8MB"})
    made = plan.make(options, "postgres (PostgreSQL) 18.6", lambda: next(ports))
    assert [server.name for server in made.servers] == [
        f"shard-0{number}-{letter}" for number in (1, 2) for letter in "abc"
    ]
    assert made.servers[0].settings["synchronous_standby_names"] == 'ANY 1 ("shard-01-b", "shard-01-c")'
    assert "synchronous_standby_names" not in made.servers[1].settings
    assert [server.upstream for server in made.servers[:3]] == [None, made.servers[0].port, made.servers[0].port]
    plan.save(made, tmp_path)
    assert plan.load(tmp_path) == made
    assert (tmp_path / plan.STATE).stat().st_mode & 0o077 == 0
    for server in made.servers:
        assert server.password not in repr(made)


def test_durable_servers_call_fsync() -> None:
    ports = iter(range(15_000, 16_000))
    fast = plan.make(Options(), "", lambda: next(ports)).servers[0]
    safe = plan.make(Options(durable=True), "", lambda: next(ports)).servers[0]
    assert fast.settings["fsync"] == "off"
    assert "fsync" not in safe.settings


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "options": {"x": 1}}'])
def test_damaged_plan_is_told(tmp_path: Path, content: str) -> None:
    assert plan.load(tmp_path) is None
    (tmp_path / plan.STATE).write_text(content)
    with pytest.raises(InvalidTopology, match="is not the state of a local cluster"):
        plan.load(tmp_path)


def test_missing_wheels_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedOperation, match=r"pip install 'shardlib\[local\]'"):
        find_postgres(None, None)
    with pytest.raises(UnsupportedOperation, match=r"pip install 'shardlib\[local\]'"):
        find_etcd(None)


def test_wrong_programs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"pg_bin='{tmp_path}'"):
        find_postgres(tmp_path, None)
    with pytest.raises(InvalidArgument, match="etcd_program="):
        find_etcd(tmp_path / "etcd")


def test_closed_folder_is_found(tmp_path: Path) -> None:
    stranger = Account("stranger", 4_000_001, 4_000_001)
    closed = tmp_path / "closed"
    (closed / "in").mkdir(parents=True)
    tmp_path.chmod(0o755)
    closed.chmod(0o700)
    assert places.blocked_at(closed / "in", None) is None
    found = places.blocked_at(closed / "in", stranger)
    assert found is not None
    assert found in (closed, *closed.parents)
    assert places.blocked_at(closed / "in", Account("owner", os.getuid(), os.getgid())) is None


def test_made_folder_has_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        places.make(tmp_path / "new", 0o755)
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755
    (tmp_path / "old").mkdir(mode=0o700)
    places.make(tmp_path / "old", 0o755)
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileExistsError):
        places.make(tmp_path / "old", 0o755, fresh=True)


def test_lock_excludes_other_threads(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with places.locked(tmp_path / "lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)  # without a lock another thread gets in here
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_process_is_known_while_it_lives(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP) as process:
        started = started_at(process.pid)
        assert started is not None
        assert process.pid in children_of(os.getpid())
        assert started_at(process.pid) == started
        process.kill()
    assert started_at(process.pid) is None
    assert process.pid not in children_of(os.getpid())
    assert running_in(tmp_path) == []


def test_daemon_takes_its_children_along(tmp_path: Path) -> None:
    code = f"import subprocess, time; print(subprocess.Popen({SLEEP!r}).pid, flush=True); time.sleep(60)"
    daemon = Daemon("parent", [sys.executable, "-c", code], tmp_path / "log", dict(os.environ), None)
    daemon.spawn()
    try:
        child = int(eventually(lambda: daemon.tail(1), 10))
        parent = daemon.pid
        assert parent is not None
        assert child in children_of(parent)
    finally:
        daemon.kill()
    assert started_at(parent) is None
    assert started_at(child) is None
    assert kill_all([child])


def test_register_refuses_a_second_owner_and_forgets_the_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cluster"
    entry = registry.enter(folder, folder / "s", temporary=True)
    assert registry.owner_of(folder) == os.getpid()
    with pytest.raises(registry.OccupiedError, match=str(os.getpid())):
        registry.enter(folder, folder / "s", temporary=True)
    assert registry.clean_abandoned() == 0
    folder.mkdir()
    began = registry.read(entry)
    assert began is not None
    entry.write_text(entry.read_text().replace(f'"started": "{began.started}"', '"started": "long ago"'))
    assert registry.owner_of(folder) is None
    assert registry.clean_abandoned() == 1
    assert not folder.exists()
    assert not entry.exists()
