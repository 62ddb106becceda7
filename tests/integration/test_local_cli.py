"""`shardlib-ops local`: a cluster that runs on between commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from shardlib.catalog import open_catalog
from shardlib_ops.cli import render
from shardlib_ops.local.process import running_in
from tests.support.eventually import eventually

COMMAND = [sys.executable, "-c", "from shardlib_ops.cli.main import main; main()"]


def run(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code in (0, 3) or "--json" in arguments else done.stderr


def told(*arguments: str, code: int = 0) -> dict[str, Any]:
    found = json.loads(run(*arguments, "--json", code=code))
    assert isinstance(found, dict)
    return found


@pytest.fixture
def folder() -> Iterator[str]:
    place = Path(tempfile.mkdtemp(prefix="st-"))
    place.chmod(0o755)
    folder = str(place / "up")
    yield folder
    run("local", "down", "--dir", folder, "--yes")
    shutil.rmtree(place)


def test_up_status_down(folder: str) -> None:
    assert told("local", "status", "--dir", folder, code=3) == {"running": False, "directory": folder}
    started = told("local", "up", "--dir", folder, "--shards", "1", "--replicas", "1", "--synchronous")
    assert started["running"]
    assert [(one["shard"], one["role"]) for one in started["servers"]] == [
        ("shard-01", "primary"),
        ("shard-01", "replica"),
    ]
    assert told("local", "status", "--dir", folder) == started
    catalog = open_catalog(started["url"])
    assert catalog.version() == 1
    catalog.close()
    assert told("local", "down", "--dir", folder)["stopped"] is True
    assert not Path(folder).exists()
    assert running_in(Path(folder)) == []
    assert told("local", "down", "--dir", folder)["stopped"] is False


def test_passwords_are_shown_only_when_asked_for(folder: str) -> None:
    started = told("local", "up", "--dir", folder, "--shards", "1")
    hidden = started["servers"][0]["dsn"]
    shown = told("local", "status", "--dir", folder, "--reveal")["servers"][0]["dsn"]
    password = psycopg.conninfo.conninfo_to_dict(shown)["password"]
    assert password
    assert str(password) not in hidden
    assert str(password) not in run("local", "status", "--dir", folder)
    with psycopg.connect(shown) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert Path(folder, "cluster.json").stat().st_mode & 0o077 == 0


def test_kept_data_is_there_again(folder: str) -> None:
    first = told("local", "up", "--dir", folder, "--shards", "1")
    shown = told("local", "status", "--dir", folder, "--reveal")["servers"][0]["dsn"]
    with psycopg.connect(shown) as connection:
        connection.execute("CREATE TABLE t AS SELECT 42 AS n")
    assert told("local", "down", "--dir", folder, "--keep")["kept"] is True
    assert running_in(Path(folder)) == []
    assert told("local", "status", "--dir", folder, code=3)["running"] is False
    assert told("local", "up", "--dir", folder, "--shards", "1")["url"] == first["url"]
    with psycopg.connect(shown) as connection:
        assert connection.execute("SELECT n FROM t").fetchone() == (42,)


def test_killed_holder_takes_its_servers_along_but_not_the_data(folder: str) -> None:
    started = told("local", "up", "--dir", folder, "--shards", "1")
    os.kill(started["owner"], signal.SIGKILL)
    eventually(lambda: running_in(Path(folder)) == [], 15, "the servers have ended")
    assert told("local", "status", "--dir", folder, code=3)["running"] is False
    assert told("local", "up", "--dir", folder, "--shards", "1")["url"] == started["url"]


def test_errors_say_what_is_wrong(folder: str) -> None:
    refused = told("local", "up", "--dir", folder, "--shards", "0", code=1)
    assert refused["error"] == "InvalidArgument"
    assert "--shards 0 is not allowed" in refused["message"]
    told("local", "up", "--dir", folder, "--shards", "1")
    again = run("local", "up", "--dir", folder, "--shards", "1", code=1)
    assert f"local down --dir {folder}`" in again
    assert "a cluster runs in it already" in again
    with tempfile.TemporaryDirectory(prefix="mine-") as mine:
        (Path(mine) / "thesis.txt").touch()
        assert "the folder of a local cluster" in run("local", "down", "--dir", mine, code=1)
        assert (Path(mine) / "thesis.txt").exists()


def test_a_folder_that_cannot_be_made_is_the_reason(tmp_path: Path) -> None:
    if os.geteuid() == 0 and not Path("/proc/self").exists():
        pytest.skip("root may write everywhere here")
    tmp_path.chmod(0o555)
    place = "/proc/up" if os.geteuid() == 0 else str(tmp_path / "up")
    began = time.monotonic()
    refused = told("local", "up", "--dir", place, "--shards", "1", code=1)
    assert refused["error"] == "InvalidArgument"
    assert place in refused["message"]
    assert "can be made, read and written to" in refused["message"]
    assert time.monotonic() - began < 30


def test_the_command_is_named_as_it_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / ".venv" / "bin" / "shardlib-ops"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    monkeypatch.chdir(tmp_path)
    assert render.program() == ".venv/bin/shardlib-ops"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert render.program() == str(program)
    monkeypatch.setenv("PATH", str(program.parent))
    assert render.program() == "shardlib-ops"
    monkeypatch.setattr(sys, "argv", ["-m"])
    assert render.program() == f"{sys.executable} -m shardlib_ops.cli.main"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, shardlib_ops.cli.main as main\n"
        "sys.argv = ['shardlib-ops', 'local', '--help']\n"
        "try: main.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'sqlalchemy', 'psycopg', 'grpc', 'shardlib.engine'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "status" in done.stdout
