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
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Final

from shardlib.dsn import Dsn
from shardlib.errors import CatalogUnavailable, InvalidArgument, InvalidTopology, ShardlibError, UnsupportedOperation
from shardlib_ops.local import keeper, places, plan, registry
from shardlib_ops.local.cluster import LocalCluster
from shardlib_ops.local.named import Named, named_servers, read_topology
from shardlib_ops.local.passwords import reference
from shardlib_ops.local.ports import HOST
from shardlib_ops.local.postgres import DATABASE, ServerSpec
from shardlib_ops.local.process import started_at, wait_until
from shardlib_ops.local.template import SUPERUSER

__all__ = ["Status", "add", "default_directory", "differing", "down", "holds", "rejoin", "server", "status", "up"]

_END_S: Final = 120.0
_ADD_S: Final = 300.0
"""A base backup of a shard that has rows takes its time."""
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
        topology: version of the topology in the catalog; None if that did not answer.
        servers: of each server its name, shard (of the catalog, or for which it was made), role (by its data folder),
            `named` (what the catalog has it as: `primary`, `replica`, or None), port, dsn, reference (a DSN that
            names the file of the password) and `listening`.
        etcd: likewise the members of the catalog.
    """

    directory: str
    owner: int | None
    url: str
    topology: int | None
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
        options: arguments of `LocalCluster`; those left out are as in the cluster that is there.
        timeout_s: limit for each server, in seconds.

    Raises:
        ShardlibError: as `LocalCluster` does; nothing runs then.
    """
    there = plan.load(directory)
    known = {} if there is None else asdict(there.options)
    arguments = json.dumps({**known, **options, "timeout_s": timeout_s})
    command = [sys.executable, "-c", _RUN, str(_ROOT), str(directory), arguments]
    holder = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
        start_new_session=True,
    )  # fmt: skip
    if holder.stdout is None:
        raise InvalidTopology("the keeper of the cluster has no output", "this is a fault of shardlib: report it")
    # The first servers, their replicas, the catalog and the topology, one after the other.
    within_s = 4 * timeout_s + 10
    with holder.stdout as answer:
        ready, _, _ = select.select([answer], [], [], within_s)
        line = answer.readline() if ready else b""
    if not line:
        with contextlib.suppress(ProcessLookupError):
            holder.terminate()
        code = holder.wait(_END_S)
        how = f"its process ended with {code} and said nothing" if ready else f"not within {within_s:g} s"
        raise UnsupportedOperation(f"the cluster in {directory} did not start: {how}", "look at the logs in it")
    said = json.loads(line)
    if "error" in said:
        holder.wait(_END_S)
        raise keeper.raised(said)
    # It is meant to outlive this process, which therefore never waits for it.
    holder.returncode = 0
    found = status(directory)
    if found is None:
        raise InvalidTopology(f"the cluster in {directory} left no state", "this is a fault of shardlib: report it")
    return found


def differing(directory: Path, options: Mapping[str, Any]) -> str:
    """What the options ask for other than the cluster of a folder has it; empty if nothing, or there is none.

    Raises:
        InvalidArgument: a value that is not allowed.
        InvalidTopology: the folder's state cannot be read.
    """
    there = plan.load(directory)
    if there is None:
        return ""
    asked = {name: value for name, value in options.items() if name in plan.Options.__dataclass_fields__}
    return plan.differing(there.options, replace(there.options, **asked))


def holds(directory: Path) -> bool:
    """Whether a folder holds a local cluster, in whatever state."""
    return (directory / plan.STATE).exists()


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
    topology = None
    if owner is not None:
        with contextlib.suppress(CatalogUnavailable, InvalidTopology):  # told by what the answer lacks
            topology = read_topology(found.url)
    named = {} if topology is None else named_servers(topology)
    return Status(
        directory=str(directory),
        owner=owner,
        url=found.url,
        topology=None if topology is None else topology.version,
        servers=tuple(_server(directory, spec, named.get(spec.port), reveal=reveal) for spec in found.all_servers),
        etcd=tuple(
            {"name": one.name, "url": f"http://{HOST}:{one.port}", "listening": _listens(one.port)}
            for one in found.etcd
        ),
    )


def add(directory: Path, name: str | None = None, *, replica_of: str | None = None) -> Mapping[str, object]:
    """Start one more server in the cluster of a folder: an empty one, or a replica of a shard.

    Args:
        directory: the folder.
        name: of the server; None for one that is free.
        replica_of: name or id of a shard; None for an empty server.

    Returns:
        the server, as `Status.servers` has it. It is not in the catalog yet.

    Raises:
        ShardlibError: as `LocalCluster.spare` and `LocalCluster.add_replica`, or no cluster runs there.
    """
    return _asked(directory, {"add": name, "replica_of": replica_of})


def rejoin(directory: Path, name: str, shard: str | None = None) -> Mapping[str, object]:
    """Make a server that no shard uses now a replica; see `LocalCluster.rejoin_server` and `add`."""
    return _asked(directory, {"rejoin": name, "shard": shard})


def _asked(directory: Path, request: Mapping[str, object]) -> Mapping[str, object]:
    entry = registry.entry_of(directory)
    if entry is None:
        raise UnsupportedOperation(f"no cluster runs in {directory}", "start it first: `local up`")
    made: str = keeper.ask(Path(entry.sockets), request, _ADD_S)
    return server(directory, made)


def server(directory: Path, name: str, *, reveal: bool = False) -> Mapping[str, object]:
    """One server of a folder's cluster, as `Status.servers` has it.

    Raises:
        InvalidArgument: there is none of that name.
    """
    found = status(directory, reveal=reveal)
    servers = () if found is None else found.servers
    for one in servers:
        if one["name"] == name:
            return one
    known = ", ".join(str(one["name"]) for one in servers) or "none"
    raise InvalidArgument("name", name, f"a server of the cluster in {directory}: {known}")


def _server(directory: Path, spec: ServerSpec, named: Named | None, *, reveal: bool) -> Mapping[str, object]:
    dsn = f"postgresql://{SUPERUSER}:{spec.password}@{HOST}:{spec.port}/{DATABASE}"
    standby = (directory / spec.name / "data" / "standby.signal").exists()
    return {
        "name": spec.name,
        "shard": spec.shard if named is None else named.shard,
        "role": "replica" if standby else "primary",
        "named": None if named is None else named.role,
        "port": spec.port,
        "dsn": dsn if reveal else Dsn(dsn).safe(),
        "reference": reference(directory, spec),
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
        if not holds(directory) and any(directory.iterdir()):
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
        started = cluster
        _say({"url": cluster.url})
        keeper.answer(cluster.sockets, lambda request: _handle(started, request))
    except ShardlibError as error:
        _say(keeper.failure(error))
    except Exception as error:
        what = f"the cluster in {directory} did not start: {type(error).__name__}: {error}"
        _say(keeper.failure(UnsupportedOperation(what, "look at the logs in it")))
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if cluster is not None:
            cluster.stop()


def _handle(cluster: LocalCluster, request: Mapping[str, Any]) -> str:
    """Do what `_asked` asks for; the name of the server that was made."""
    if "rejoin" in request:
        return cluster.rejoin_server(request["rejoin"], request["shard"]).name
    name = request["add"]
    if request["replica_of"] is not None:
        return cluster.add_replica(request["replica_of"], name).name
    taken = {one.name for one in (*cluster.servers, *cluster.spares)}
    if name in taken:
        raise InvalidArgument("name", name, "letters, digits and -, and no other server's name")
    return cluster.spare(name or next(one for one in map("spare-{}".format, count(1)) if one not in taken)).name


def _ended(number: int, frame: object) -> None:
    raise SystemExit(0)


def _say(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what, default=str) + "\n")
    sys.stdout.flush()
    # The one who reads it is gone after this line.
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.close(quiet)
