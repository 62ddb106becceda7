"""An etcd with options of the test's own: users, TLS, compaction; and `etcdctl` to command it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from shardlib_ops.local.binaries import find_etcd
from shardlib_ops.local.ports import HOST, PortKeeper
from tests.support.eventually import eventually


class EtcdServer:
    """One member, or one of several.

    Args:
        home: folder for its data.
        ports: keeps the ports.
        flags: further arguments of etcd.
        tls: arguments of `etcdctl` for TLS; none for a plain server.
    """

    def __init__(self, home: Path, ports: PortKeeper, *flags: str, tls: tuple[str, ...] = ()) -> None:
        self.port, peer = ports.take(), ports.take()
        scheme = "https" if tls else "http"
        self.url, self._tls = f"{scheme}://{HOST}:{self.port}", tls
        self.endpoint = f"{HOST}:{self.port}"
        home.mkdir(parents=True, exist_ok=True)
        self._log = home / "etcd.log"
        mine = f"http://{HOST}:{peer}"
        self._command = [
            str(find_etcd(None)), "--data-dir", str(home / "data"), "--name", "one", "--log-level", "warn",
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", mine, "--initial-advertise-peer-urls", mine,
            "--initial-cluster", f"one={mine}", "--unsafe-no-fsync",
            "--heartbeat-interval", "20", "--election-timeout", "200", *flags,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        eventually(self._answers, 20, f"etcd on {self.endpoint} serves")

    def _answers(self) -> bool:
        # "user name is empty" is an answer too: with users, nobody may read without a name.
        done = self.ctl("get", "no-such-key", check=False)
        return done.returncode == 0 or "user name is empty" in done.stderr

    def ctl(self, *arguments: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run `etcdctl`."""
        program = str(Path(find_etcd(None)).with_name("etcdctl"))
        return subprocess.run(
            [program, "--endpoints", self.url, "--command-timeout", "3s", *self._tls, *arguments],
            capture_output=True, text=True, check=check, timeout=20, input=stdin,
            env={"PATH": os.defpath, "ETCDCTL_API": "3", "HOME": "/"},
        )  # fmt: skip

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it was started"
        self._process.send_signal(number)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


@contextlib.contextmanager
def etcd_server(home: Path, *flags: str, tls: tuple[str, ...] = ()) -> Iterator[EtcdServer]:
    """A running member, killed at the end."""
    ports = PortKeeper()
    server = EtcdServer(home, ports, *flags, tls=tls)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        ports.close()
