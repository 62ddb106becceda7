"""One local server: stopped, killed, frozen and started again, on the oldest and the newest PostgreSQL."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from shardlib.dsn import Dsn
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from shardlib_ops.local.process import account, children_of, running_in
from tests.support.eventually import eventually


@pytest.fixture(scope="module")
def cluster(pg_bin: Path | None) -> Iterator[LocalCluster]:
    with LocalCluster(shards=2, replicas=1, pg_bin=pg_bin, bootstrap=False) as cluster:
        yield cluster


@pytest.fixture
def primary(cluster: LocalCluster) -> LocalServer:
    for server in cluster.servers:
        server.resume()
        server.start()
    server = cluster.primary("shard-01")
    with server.connect() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS t (n int)")
        connection.execute("TRUNCATE t")
    return server


def rows(server: LocalServer) -> list[int]:
    with server.connect() as connection:
        return [n for (n,) in connection.execute("SELECT n FROM t ORDER BY n")]


def answered(connection: psycopg.Connection[Any]) -> bool:
    """Whether the answer to what `send_query` sent is here, which is then taken."""
    connection.pgconn.consume_input()
    if connection.pgconn.is_busy():
        return False
    while connection.pgconn.get_result() is not None:
        pass
    return True


def insert(server: LocalServer, n: int) -> None:
    with server.connect() as connection:
        connection.execute("INSERT INTO t VALUES (%s)", (n,))


def test_what_was_committed_survives_kills(primary: LocalServer) -> None:
    port = primary.port
    for n in range(3):
        insert(primary, n)
        primary.kill()
        assert not primary.running
        assert running_in(primary.data) == []
        primary.start()
    assert rows(primary) == [0, 1, 2]
    assert primary.port == port


def test_every_call_is_idempotent(primary: LocalServer) -> None:
    primary.start()
    pid = primary.pid
    primary.start()
    assert primary.pid == pid
    primary.pause()
    primary.pause()
    primary.resume()
    primary.resume()
    for end in (primary.stop, primary.kill):
        primary.start()
        end()
        end()
        primary.stop()
        primary.kill()
        primary.pause()
        primary.resume()
        assert not primary.running


def test_open_transaction_is_gone_after_a_stop(primary: LocalServer) -> None:
    with primary.connect(autocommit=False) as connection:
        connection.execute("INSERT INTO t VALUES (1)")
        primary.stop()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    primary.start()
    assert rows(primary) == []


def test_paused_server_hangs_and_goes_on(primary: LocalServer) -> None:
    with primary.connect() as connection:
        primary.pause()
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            psycopg.connect(Dsn(primary.dsn).conninfo(connect_timeout=2))
        connection.pgconn.send_query(b"SELECT 1")
        time.sleep(0.2)  # what must not come within this time has no event to wait for
        connection.pgconn.consume_input()
        assert connection.pgconn.is_busy()
        primary.resume()

        eventually(lambda: answered(connection), 5)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_paused_server_can_be_ended(primary: LocalServer, end: str) -> None:
    insert(primary, 1)
    primary.pause()
    began = time.monotonic()
    getattr(primary, end)()
    assert time.monotonic() - began < 10
    assert running_in(primary.data) == []
    primary.start()
    assert rows(primary) == [1]


def test_starts_after_somebody_else_killed_its_postmaster(primary: LocalServer) -> None:
    insert(primary, 1)
    pid = primary.pid
    assert pid is not None
    with primary.connect():  # a backend that takes a moment to notice
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not primary.running, 5)
        primary.start()
    assert rows(primary) == [1]


def test_lock_file_with_the_number_of_a_living_process_is_no_hindrance(primary: LocalServer) -> None:
    primary.kill()
    lines = (primary.data / "postmaster.pid").read_text().splitlines()
    (primary.data / "postmaster.pid").write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    primary.start()
    assert rows(primary) == []


def test_pause_reaches_every_process(primary: LocalServer) -> None:
    def states() -> set[str]:
        assert primary.pid is not None
        family = [primary.pid, *children_of(primary.pid)]
        return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in family}

    if not Path("/proc/self/stat").exists():
        pytest.skip("there is no /proc")
    with primary.connect():
        primary.pause()
        eventually(lambda: states() == {"T"}, 5, "all are stopped")
        primary.resume()
        eventually(lambda: "T" not in states(), 5, "all go on")


def test_settings_that_shards_need(primary: LocalServer) -> None:
    wanted = {
        "wal_level": "logical",
        "wal_log_hints": "on",
        "max_prepared_transactions": "64",
        "max_connections": "200",
        "listen_addresses": "127.0.0.1",
        "fsync": "off",
        "data_checksums": "on",
    }
    with primary.connect() as connection:
        found = {
            name: connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
            for name in wanted  # one by one: an unknown name fails by itself
        }
    assert found == {name: (value,) for name, value in wanted.items()}


def test_password_is_asked_for_and_hidden(primary: LocalServer, cluster: LocalCluster) -> None:
    other = cluster.primary("shard-02")
    password = str(psycopg.conninfo.conninfo_to_dict(primary.dsn)["password"])
    assert password != psycopg.conninfo.conninfo_to_dict(other.dsn)["password"]
    assert password not in repr(primary)
    assert password not in repr(cluster)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(Dsn(primary.dsn).conninfo(password="wrong"))
    assert password not in primary.log.read_text()


def test_every_primary_has_its_own_identity(primary: LocalServer, cluster: LocalCluster) -> None:
    def identity(server: LocalServer) -> int:
        with server.connect() as connection:
            row = connection.execute("SELECT system_identifier FROM pg_control_system()").fetchone()
            assert row is not None
            return int(row[0])

    (replica,) = cluster.replicas("shard-01")
    assert identity(primary) == identity(replica)
    assert identity(primary) != identity(cluster.primary("shard-02"))


def test_replica_follows_through_kills_of_either(primary: LocalServer, cluster: LocalCluster) -> None:
    (replica,) = cluster.replicas("shard-01")
    insert(primary, 1)
    replica.kill()
    insert(primary, 2)
    replica.start()
    eventually(lambda: rows(replica) == [1, 2], 10)
    primary.kill()
    primary.start()
    insert(primary, 3)
    eventually(lambda: rows(replica) == [1, 2, 3], 10)


def test_root_gives_its_servers_to_another_account(primary: LocalServer) -> None:
    owner = account()
    if owner is None:
        pytest.skip("only root drops to another account")
    assert Path(f"/proc/{primary.pid}").stat().st_uid == owner.uid != 0


def test_promoted_replica_is_a_primary(pg_bin: Path | None) -> None:
    with LocalCluster(shards=1, replicas=1, pg_bin=pg_bin, bootstrap=False) as cluster:
        first, second = cluster.servers
        assert (first.role, second.role) == ("primary", "replica")
        first.kill()
        with second.connect() as connection:
            connection.execute("SELECT pg_promote(true, 20)")
            connection.execute("CREATE TABLE t (n int)")
        assert second.role == "primary"
        second.kill()
        second.start()
        insert(second, 1)
        assert rows(second) == [1]
