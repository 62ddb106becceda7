"""A local cluster that grows and changes its primaries by commands alone, as the how-tos ask for it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError
from shardlib_ops import LocalCluster, Manager

pytestmark = pytest.mark.timeout(300)

OPS = [sys.executable, "-m", "shardlib_ops.cli.main"]


class Shell:
    """Commands on one cluster that runs on between them; what they print is looked through for passwords."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog: dict[str, str] = {}

    def done(self, *arguments: str, code: int = 0, typed: str = "") -> subprocess.CompletedProcess[str]:
        here = ["--dir", str(self.folder)] if arguments[0] == "local" else []
        found = subprocess.run(
            [*OPS, *arguments, *here],
            env={**os.environ, **self.catalog},
            input=typed,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert found.returncode == code, found.stdout + found.stderr
        for file in (self.folder / ".passwords").glob("*"):
            assert file.read_text().strip() not in found.stdout + found.stderr
        return found

    def __call__(self, *arguments: str) -> str:
        return self.done(*arguments).stdout.strip()

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.done(*arguments, "--json", code=code).stdout)
        return found

    def up(self, *options: str) -> None:
        self.catalog = {"SHARDLIB_CATALOG": self.json("local", "up", *options)["url"]}

    def servers(self) -> dict[str, tuple[str | None, str, str | None]]:
        """Name -> shard, what it runs as, and what the catalog names it."""
        return {
            one["name"]: (one["shard"], one["role"], one["named"]) for one in self.json("local", "status")["servers"]
        }


@pytest.fixture
def shell() -> Iterator[Shell]:
    place = Path(tempfile.mkdtemp(prefix="g r-"))
    place.chmod(0o755)
    found = Shell(place / "up")
    yield found
    found("local", "down", "--yes")
    shutil.rmtree(place)


def test_a_shard_is_added_and_its_primary_replaced(shell: Shell) -> None:
    shell.up("--shards", "1", "--replicas", "1")
    spare = shell("local", "add")
    assert "password=file:" in spare
    assert shell("local", "dsn", "spare-1") == spare
    assert shell.servers()["spare-1"] == (None, "primary", None)
    assert shell.json("shard", "create", "extra", "--primary", spare)["name"] == "extra"
    assert shell.servers()["spare-1"] == ("extra", "primary", "primary")

    told = shell.done("local", "add", "--replica-of", "extra", "--json")
    replica = json.loads(told.stdout)
    assert (replica["name"], replica["role"], replica["named"]) == ("spare-1-b", "replica", None)
    shell("shard", "add-replica", "extra", replica["reference"])
    rejoin = f"{shlex.join(OPS)} local rejoin --dir {shlex.quote(str(shell.folder))}"
    promoted = shell.json("shard", "promote", "extra", "--yes", "--rejoin-command", rejoin)
    assert (promoted["stage"], promoted["error"]) == ("done", None)
    assert shell.servers()["spare-1"] == ("extra", "replica", "replica")
    assert shell.servers()["spare-1-b"] == ("extra", "primary", "primary")

    assert "is no server of the shard now" in shell.json("shard", "promote", "shard-01", "--yes")["error"]
    assert shell.servers()["shard-01-a"] == ("shard-01", "primary", None)
    status = shell("local", "status")
    assert "shard-01-a is no server of shard shard-01 now" in status
    assert "local rejoin shard-01-a" in status
    assert "is the primary of shard 'shard-01'" in shell.json("local", "rejoin", "shard-01-b", code=1)["message"]
    assert shell.servers()["shard-01-b"] == ("shard-01", "primary", "primary"), "a primary in use is left alone"
    back = shell("local", "rejoin", "shard-01-a")
    assert shell.json("shard", "add-replica", "shard-01", back)["replicas"] == [Dsn(back).safe()]
    assert shell.servers()["shard-01-a"] == ("shard-01", "replica", "replica")

    before = shell.servers()
    assert shell.json("local", "down", "--keep")["kept"] is True
    shell.up()
    assert shell.servers() == before
    for name in before:
        with psycopg.connect(Dsn(shell("local", "dsn", name)).conninfo()) as connection:
            connection.execute("SELECT 1")


def test_data_is_not_deleted_unasked(shell: Shell) -> None:
    shell.up("--shards", "1")
    assert "; its data is left" in shell("local", "down", "--keep")
    refused = shell.json("local", "up", "--shards", "2", "--replicas", "1", code=1)["message"]
    assert "shards=1 (not 2), replicas=0 (not 1)" in refused
    for way_out in ("up", "down"):
        assert f"local {way_out} --dir {shlex.quote(str(shell.folder))}" in refused
    assert "--shards 0 is not" in shell.json("local", "up", "--shards", "0", code=1)["message"]
    asked = shell.done("local", "down", code=1)
    assert f"Delete the data of the stopped cluster in {shell.folder} (--yes" in asked.stderr
    shell.done("local", "down", code=1, typed="n\n")
    assert (shell.folder / "shard-01-a" / "data").is_dir()
    shell.up("--shards", "1")
    assert f"its data in {shell.folder} is deleted (--keep" in shell("local", "down")
    assert not shell.folder.exists()
    assert "no cluster ran" in shell("local", "down"), "nothing is there to be asked about"


def test_nobody_is_there_to_be_asked(shell: Shell) -> None:
    for command in (["add"], ["rejoin", "shard-01-a"]):
        assert "no cluster runs in" in shell.json("local", *command, code=1)["message"]
    assert "a server of the cluster" in shell.json("local", "dsn", "shard-01-a", code=1)["message"]


async def test_what_is_refused_and_what_failed_leaves_nothing() -> None:
    with LocalCluster(shards=1) as cluster:
        primary = cluster.primary("shard-01")
        for taken in ("etcd-1", "shard-01-a", "s", "", "a b", "a/b"):
            with pytest.raises(InvalidArgument, match="no other server's name"):
                cluster.add_replica("shard-01", taken)
            if taken != "shard-01-a":
                with pytest.raises(InvalidArgument, match="no other server's name"):
                    cluster.spare(taken)
        with pytest.raises(InvalidTopology, match="nowhere"):
            cluster.add_replica("nowhere")
        with pytest.raises(InvalidArgument, match="made for no shard"):
            cluster.rejoin_server(cluster.spare("empty").name)
        primary.kill()
        with pytest.raises(ShardlibError):
            cluster.add_replica("shard-01")
        primary.start()
        replica = cluster.add_replica("shard-01")
        assert (replica.name, replica.role, replica.shard) == ("shard-01-b", "replica", "shard-01")
        with primary.connect() as connection:
            found = connection.execute("SELECT slot_name FROM pg_replication_slots ORDER BY 1").fetchall()
        assert found == [("shard_01_b",)]
        async with Manager(cluster.url) as manager:
            shard = await manager.add_replica("shard-01", replica.dsn)
            assert [one.port for one in shard.replicas] == [str(replica.port)]
            shard = await manager.promote_replica("shard-01", rejoin=cluster.rejoin)
            assert shard.primary.port == str(replica.port)
        # An empty server becomes a replica too, with the password of the shard.
        empty = cluster.rejoin_server("empty", "shard-01")
        with empty.connect() as connection:
            assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
        assert cluster.rejoin_server("shard-01-a").role == "replica", "it is one: nothing is made anew"
        passwords = cluster.directory / ".passwords"
        assert stat.S_IMODE(passwords.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in passwords.iterdir()} == {0o600}
