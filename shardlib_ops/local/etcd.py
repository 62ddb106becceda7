"""One etcd member of a local cluster."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardlib.errors import CatalogUnavailable
from shardlib_ops.local.ports import HOST
from shardlib_ops.local.process import Daemon, Server, wait_until

__all__ = ["EtcdSpec", "LocalEtcd"]

_STOP_S: Final = 5.0
_ASK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class EtcdSpec:
    """One member: its name, and its ports on 127.0.0.1 for clients and for the other members."""

    name: str
    port: int
    peer_port: int


class LocalEtcd(Server):
    """One etcd member. All methods are idempotent, thread-safe and bounded in time.

    Args:
        spec: this member.
        members: all members of the cluster, this one included.
        program: path of etcd.
        home: its own folder: data and log.
        durable: whether it calls fsync. The kill of a process alone loses nothing without.
        timeout_s: limit for each start, in seconds.
    """

    def __init__(
        self,
        spec: EtcdSpec,
        members: Sequence[EtcdSpec],
        program: Path,
        home: Path,
        *,
        durable: bool,
        timeout_s: float,
    ) -> None:
        self._spec, self._home, self._timeout_s = spec, home, timeout_s
        self.log: Path = home / "etcd.log"
        """The member's log."""
        peers = ",".join(f"{one.name}=http://{HOST}:{one.peer_port}" for one in members)
        mine = f"http://{HOST}:{spec.peer_port}"
        command = [
            str(program), "--data-dir", str(home / "data"), "--name", spec.name, "--log-level", "warn",
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", mine, "--initial-advertise-peer-urls", mine, "--initial-cluster", peers,
            "--initial-cluster-token", f"shardlib-{members[0].peer_port}",
        ]  # fmt: skip
        if len(members) == 1:
            # Alone it cannot lose an election, so it need not wait a second for one after each restart.
            command += ["--heartbeat-interval", "20", "--election-timeout", "200"]
        if not durable:
            command.append("--unsafe-no-fsync")
        super().__init__(Daemon(spec.name, command, self.log, {"PATH": os.defpath, "HOME": str(home)}, None))

    @property
    def name(self) -> str:
        """Its name in the cluster."""
        return self._spec.name

    @property
    def port(self) -> int:
        """Its client port on 127.0.0.1, the same for all its life."""
        return self._spec.port

    @property
    def url(self) -> str:
        """Its client URL."""
        return f"http://{HOST}:{self._spec.port}"

    def __repr__(self) -> str:
        return f"LocalEtcd({self.name!r}, {self.url!r}, {'running' if self.running else 'down'})"

    def start(self) -> None:
        """Start it and wait until it serves: with several members, until most of them run.

        Raises:
            CatalogUnavailable: it ended or was not healthy in time; the message holds the end of its log.
        """
        self.spawn()
        self.wait_healthy()

    def spawn(self) -> None:
        """Start it without waiting: the first members of a cluster are healthy only together."""
        with self._lock:
            self._home.mkdir(mode=0o700, exist_ok=True)
            self._daemon.spawn()

    def wait_healthy(self) -> None:
        """Wait until it says that it is healthy.

        Raises:
            CatalogUnavailable: it ended or was not healthy in time.
        """
        if wait_until(lambda: not self.running or self.healthy(), self._timeout_s) and self.running:
            return
        reason = f"was not healthy in {self._timeout_s:g} s" if self.running else f"ended with {self._daemon.exit_code}"
        self.kill()
        raise CatalogUnavailable(self.url, f"etcd {reason}; the end of {self.log}:\n{self._daemon.tail()}")

    def healthy(self) -> bool:
        """Whether it answers, has a leader and can write."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_ASK_S)
        try:
            connection.request("GET", "/health")
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()
        return isinstance(answer, dict) and str(answer.get("health")) == "true"

    def stop(self) -> None:
        """Shut it down."""
        with self._lock:
            self._daemon.end([(signal.SIGTERM, _STOP_S)])
