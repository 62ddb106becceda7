"""PgBouncer in transaction mode in front of servers of a local cluster."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import psycopg

from shardlib.dsn import Dsn
from shardlib_ops.local import LocalServer
from shardlib_ops.local.ports import HOST, PortKeeper
from tests.support.eventually import eventually

MISSING: Final = "PgBouncer is not installed (Debian: apt-get install pgbouncer)"


def find_pgbouncer() -> str | None:
    """Path of the program; Debian keeps it where only root looks."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


class PgBouncer:
    """One pooler for several servers; use as a context manager.

    Args:
        home: an empty folder for its files.
        servers: each is a database of the pooler, under the server's name.
        pool_size: server connections for each, fewer than the clients have: transactions take turns on them.

    Attributes:
        dsns: server name -> DSN through the pooler.
    """

    def __init__(self, home: Path, servers: Sequence[LocalServer], *, pool_size: int = 6) -> None:
        self._home, self._ports = home, PortKeeper()
        self._port = self._ports.take()
        self._log = home / "pgbouncer.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.dsns: dict[str, str] = {}
        databases, users = [], {}
        for server in servers:
            parts = urlsplit(server.dsn)
            users[str(parts.username)] = "x"
            databases.append(
                f"{server.name} = host={parts.hostname} port={parts.port} dbname={parts.path.lstrip('/')}"
                f" user={parts.username} password={parts.password} pool_size={pool_size}"
            )
            self.dsns[server.name] = f"postgresql://{parts.username}:x@{HOST}:{self._port}/{server.name}"
        self._settings = "\n".join(
            [
                "[databases]",
                *databases,
                "[pgbouncer]",
                f"listen_addr = {HOST}",
                f"listen_port = {self._port}",
                "unix_socket_dir =",
                "auth_type = plain",
                f"auth_file = {home / 'users.txt'}",
                "pool_mode = transaction",
                "max_client_conn = 500",
                "server_check_delay = 1",
                "server_login_retry = 1",
            ]
        )
        self._users = "".join(f'"{name}" "{word}"\n' for name, word in users.items())

    def __enter__(self) -> Self:
        program = find_pgbouncer()
        assert program is not None, MISSING
        command = [program, str(self._home / "pgbouncer.ini")]
        (self._home / "users.txt").write_text(self._users)
        (self._home / "pgbouncer.ini").write_text(self._settings + "\n")
        if os.getuid() == 0:  # it refuses to run as root
            who = pwd.getpwnam("nobody")
            for path in (self._home, *self._home.iterdir()):
                os.chown(path, who.pw_uid, who.pw_gid)
            for folder in self._home.parents:
                if folder.owner() == "root" and not folder.stat().st_mode & 0o001:
                    folder.chmod(folder.stat().st_mode | 0o011)
            command += ["-u", "nobody"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        for dsn in self.dsns.values():
            eventually(lambda dsn=dsn: self._answers(dsn), 10, "PgBouncer answers", ignore=psycopg.OperationalError)  # type: ignore[misc]
        return self

    def _answers(self, dsn: str) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        with psycopg.connect(Dsn(dsn).conninfo(connect_timeout=3)) as conn:
            return conn.execute("SELECT 1").fetchone() == (1,)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
        self._ports.close()
