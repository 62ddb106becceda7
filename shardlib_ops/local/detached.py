"""A local cluster that runs on between commands, held by a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError, UnsupportedOperation
from shardlib_ops.local import places, plan, registry
from shardlib_ops.local.cluster import LocalCluster
from shardlib_ops.local.ports import HOST
from shardlib_ops.local.postgres import ServerSpec
from shardlib_ops.local.process import started_at, wait_until
from shardlib_ops.local.template import SUPERUSER

__all__ = ["Status", "default_directory", "down", "status", "up"]

_END_S: Final = 120.0
_ANSWER_S: Final = 1.0
_ROOT: Final = Path(__file__).resolve().parents[2]
_RUN: Final = "import sys; sys.path[:0] = [sys.argv[1]]; from shardlib_ops.local.detached import main; main(sys.argv)"


@dataclass(frozen=True, slots=True)
class Status:
    """What runs in a folder.

    Attributes:
        directory: the folder.
        owner: number of the process that holds the cluster; None if it is down.
        url: URL of the catalog.
        servers: name, shard, role, port, dsn and `listening` of each server; etcd members likewise.
    """

    directory: str
    owner: int | None
    url: str
    servers: tuple[Mapping[str, object], ...]
    etcd: tuple[Mapping[str, object], ...]

    @property
    def running(self) -> bool:
        """Whether a process holds the cluster."""
        return self.owner is not None


def default_directory() -> Path:
    """The folder that is meant when none is named."""
    return places.cache() / "up"


def up(directory: Path, options: Mapping[str, Any], timeout_s: float) -> Status:
    """Start a cluster that goes on after this process; one that stopped there starts again with its data.

    Args:
        directory: its folder.
        options: arguments of `LocalCluster`.
        timeout_s: limit for each server, in seconds.

    Raises:
        ShardlibError: as `LocalCluster` does; nothing runs then.
    """
    arguments = json.dumps({**options, "timeout_s": timeout_s})
    command = [sys.executable, "-c", _RUN, str(_ROOT), str(directory), arguments]
    keeper = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
        start_new_session=True,
    )  # fmt: skip
    if keeper.stdout is None:
        raise InvalidTopology("the keeper of the cluster has no output", "this is a fault of shardlib: report it")
    # The first servers, their replicas, the catalog and the topology, one after the other.
    within_s = 4 * timeout_s + 10
    with keeper.stdout as answer:
        ready, _, _ = select.select([answer], [], [], within_s)
        line = answer.readline() if ready else b""
    if not line:
        with contextlib.suppress(ProcessLookupError):
            keeper.terminate()
        code = keeper.wait(_END_S)
        how = f"its process ended with {code} and said nothing" if ready else f"not within {within_s:g} s"
        raise UnsupportedOperation(f"the cluster in {directory} did not start: {how}", "look at the logs in it")
    said = json.loads(line)
    if "error" in said:
        keeper.wait(_END_S)
        raise _again(said["kind"], said["arguments"])
    # It is meant to outlive this process, which therefore never waits for it.
    keeper.returncode = 0
    found = status(directory)
    if found is None:
        raise InvalidTopology(f"the cluster in {directory} left no state", "this is a fault of shardlib: report it")
    return found


def _again(kind: str, arguments: list[Any]) -> ShardlibError:
    """The keeper's error as it was there."""
    from shardlib import errors

    made = getattr(errors, kind)(*arguments)
    if not isinstance(made, ShardlibError):
        raise TypeError(f"{kind} is no error of shardlib")
    return made


def status(directory: Path, *, reveal: bool = False) -> Status | None:
    """What is in a folder; None if that is no cluster.

    Args:
        directory: the folder.
        reveal: show DSNs with their passwords.
    """
    found = plan.load(directory)
    if found is None:
        return None
    owner = registry.owner_of(directory)
    return Status(
        directory=str(directory),
        owner=owner,
        url=found.url,
        servers=tuple(_server(directory, spec, reveal=reveal) for spec in (*found.servers, *found.spares)),
        etcd=tuple(
            {"name": one.name, "url": f"http://{HOST}:{one.port}", "listening": _listens(one.port)}
            for one in found.etcd
        ),
    )


def _server(directory: Path, spec: ServerSpec, *, reveal: bool) -> Mapping[str, object]:
    dsn = f"postgresql://{SUPERUSER}:{spec.password}@{HOST}:{spec.port}/postgres"
    standby = (directory / spec.name / "data" / "standby.signal").exists()
    return {
        "name": spec.name,
        "shard": spec.shard,
        "role": "replica" if standby else "primary",
        "port": spec.port,
        "dsn": dsn if reveal else Dsn(dsn).safe(),
        "listening": _listens(spec.port),
    }


def _listens(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=_ANSWER_S):
            return True
    except OSError:
        return False


def down(directory: Path, *, keep: bool = False) -> bool:
    """Stop the cluster of a folder and remove the folder; whether a cluster ran there.

    Args:
        directory: the folder.
        keep: leave the data, so that `up` starts the same cluster again.

    Raises:
        InvalidArgument: the folder holds something, and no cluster: it is left alone.
        UnsupportedOperation: the process that holds the cluster did not end.
    """
    owner = registry.owner_of(directory)
    if owner is not None:
        began = started_at(owner)
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner, signal.SIGTERM)
        if not wait_until(lambda: started_at(owner) != began or began is None, _END_S):
            raise UnsupportedOperation(f"process {owner} did not end within {_END_S:g} s", "kill it: the rest follows")
    # What an owner left that was killed.
    registry.clean_abandoned()
    if not keep and directory.exists():
        if plan.load(directory) is None and any(directory.iterdir()):
            raise InvalidArgument("directory", str(directory), "the folder of a local cluster")
        shutil.rmtree(directory)
    return owner is not None


def main(arguments: list[str]) -> None:
    """Hold a cluster until SIGTERM; the first line of output tells how its start went."""
    directory, options = Path(arguments[2]), json.loads(arguments[3])
    signal.signal(signal.SIGTERM, _ended)
    cluster = None
    try:
        cluster = LocalCluster(directory=directory, **options)
        cluster.start()
        _say({"url": cluster.url})
        while True:
            signal.pause()
    except ShardlibError as error:
        _say({"error": str(error), "kind": type(error).__name__, "arguments": error.args})
    except Exception as error:
        what = f"the cluster in {directory} did not start: {type(error).__name__}: {error}"
        _say({"error": what, "kind": "UnsupportedOperation", "arguments": [what, "look at the logs in it"]})
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if cluster is not None:
            cluster.stop()


def _ended(number: int, frame: object) -> None:
    raise SystemExit(0)


def _say(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what, default=str) + "\n")
    sys.stdout.flush()
    # The one who reads it is gone after this line.
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.close(quiet)
