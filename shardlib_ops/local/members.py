"""The servers of a local cluster as they are now, and where they are written down."""

from __future__ import annotations

import threading
from pathlib import Path

from shardlib.errors import InvalidArgument, UnsupportedOperation
from shardlib_ops.local import plan
from shardlib_ops.local.binaries import Postgres
from shardlib_ops.local.etcd import LocalEtcd
from shardlib_ops.local.passwords import write_passwords
from shardlib_ops.local.plan import Options, Plan
from shardlib_ops.local.ports import PortKeeper
from shardlib_ops.local.postgres import LocalServer, ServerSpec
from shardlib_ops.local.process import Account

__all__ = ["Members"]


class Members:
    """What there is while a cluster runs; `LocalCluster` starts and ends it.

    Args:
        options: what was asked for.
        postgres: the programs.
        account: the one that servers run as, None for the caller's.
        timeout_s: limit for the start of each server, in seconds.
    """

    def __init__(self, options: Options, postgres: Postgres, account: Account | None, timeout_s: float) -> None:
        self._options, self._postgres, self._account, self._timeout_s = options, postgres, account, timeout_s
        self._lock = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        self._ports = PortKeeper()
        self._plan: Plan | None = None
        self._directory = self._sockets = Path()
        self._servers: list[LocalServer] = []
        self._spares: list[LocalServer] = []
        self._etcd: list[LocalEtcd] = []

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._plan is not None

    @property
    def url(self) -> str:
        """URL of the catalog, for `ShardedEngine`."""
        return self._started().url

    @property
    def servers(self) -> tuple[LocalServer, ...]:
        """The servers of the shards, in the order of the shards, the one that began as primary first."""
        return tuple(self._servers)

    @property
    def spares(self) -> tuple[LocalServer, ...]:
        """The servers made by `spare`, and the replicas that were added to shards made of them."""
        return tuple(self._spares)

    @property
    def etcd(self) -> tuple[LocalEtcd, ...]:
        """The members of the catalog."""
        return tuple(self._etcd)

    @property
    def sockets(self) -> Path:
        """Folder of the Unix sockets."""
        self._started()
        return self._sockets

    @property
    def directory(self) -> Path:
        """Folder of the servers' data and logs."""
        self._started()
        return self._directory

    def server(self, name: str) -> LocalServer:
        """A server, spares included, by its name.

        Raises:
            InvalidArgument: there is none of that name.
        """
        everyone = self._everyone
        for server in everyone:
            if server.name == name:
                return server
        raise InvalidArgument("name", name, f"the servers are: {', '.join(server.name for server in everyone)}")

    @property
    def _everyone(self) -> tuple[LocalServer, ...]:
        return (*self._servers, *self._spares)

    def primary(self, shard: str) -> LocalServer:
        """The server of a shard that is its primary now (by its data folder; it may be down).

        Raises:
            InvalidArgument: there is no such shard, or none of its servers is a primary.
        """
        for server in self._servers:
            if server.shard == shard and server.role == "primary":
                return server
        known = ", ".join(dict.fromkeys(str(server.shard) for server in self._servers))
        raise InvalidArgument("shard", shard, f"a shard with a primary; the shards are: {known}")

    def replicas(self, shard: str) -> tuple[LocalServer, ...]:
        """The servers of a shard that are replicas now."""
        return tuple(server for server in self._servers if server.shard == shard and server.role == "replica")

    def _started(self) -> Plan:
        if self._plan is None:
            raise UnsupportedOperation("the local cluster is not running", "use it inside `with`, or call start()")
        return self._plan

    def _server(self, spec: ServerSpec) -> LocalServer:
        home = self._directory / spec.name
        return LocalServer(spec, self._postgres, home, self._sockets, self._account, self._timeout_s)

    def _remember(self, changed: Plan) -> None:
        self._plan = changed
        write_passwords(self._directory, changed.all_servers)
        plan.save(changed, self._directory)
