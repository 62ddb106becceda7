"""One PostgreSQL server of a local cluster: a primary or a replica that can be stopped, killed and frozen."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from shardlib.dsn import Dsn, scrub
from shardlib.errors import InvalidArgument, ShardUnavailable
from shardlib_ops.local import template
from shardlib_ops.local.binaries import Postgres
from shardlib_ops.local.ports import HOST
from shardlib_ops.local.process import Account, Daemon, Server, free_shared_memory, running_in, wait_until

__all__ = ["DATABASE", "LocalServer", "ServerSpec"]

DATABASE: Final = "postgres"
_log: Final = logging.getLogger("shardlib.local")
_STOP_S: Final = 20.0
_IMMEDIATE_S: Final = 8.0
_SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": HOST,
    "max_connections": "200",
    "shared_buffers": "32MB",
    "wal_level": "logical",
    "wal_log_hints": "on",
    "max_wal_senders": "32",
    "max_replication_slots": "32",
    "max_worker_processes": "32",
    "max_logical_replication_workers": "16",
    "max_sync_workers_per_subscription": "4",
    "max_prepared_transactions": "64",
    "wal_retrieve_retry_interval": "200ms",
    "password_encryption": "scram-sha-256",
    # Segments in the data folder: a kill leaves none in /dev/shm, whose size would be a limit.
    "dynamic_shared_memory_type": "mmap",
    "unix_socket_permissions": "0700",
    "log_line_prefix": "%m [%p] %a ",
}


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """What a server is made of, and all that starting it again later needs.

    Attributes:
        name: unique in the cluster; a standby's `application_name`.
        shard: name of the shard it serves, None for a spare.
        port: TCP port on 127.0.0.1, also the number of its Unix socket.
        password: of the superuser; never shown.
        upstream: port of the primary that it was copied from, None for a primary.
        settings: server settings beyond the usual.
    """

    name: str
    shard: str | None
    port: int
    password: str = field(repr=False)
    upstream: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


class LocalServer(Server):
    """One PostgreSQL server. All methods are idempotent, thread-safe and bounded in time.

    Args:
        spec: its name, port and settings.
        postgres: the programs.
        home: its own folder, made at the first start: the data folder and the log.
        sockets: folder of Unix sockets, shared by the servers of a cluster.
        owner: the account it runs as, None for the caller's.
        timeout_s: limit for each start, in seconds.
    """

    def __init__(
        self,
        spec: ServerSpec,
        postgres: Postgres,
        home: Path,
        sockets: Path,
        owner: Account | None,
        timeout_s: float,
    ) -> None:
        self._spec, self._postgres, self._owner, self._timeout_s = spec, postgres, owner, timeout_s
        self._home, self._sockets = home, sockets
        self.data: Path = home / "data"
        """The data folder."""
        self.log: Path = home / "postgres.log"
        """The server's log."""
        command = [postgres.program("postgres"), "-D", str(self.data)]
        super().__init__(Daemon(spec.name, command, self.log, postgres.environment(home), owner))

    @property
    def spec(self) -> ServerSpec:
        """What it is made of now."""
        return self._spec

    @property
    def name(self) -> str:
        """Its name, unique in the cluster; it says nothing of its role, which may change."""
        return self._spec.name

    @property
    def shard(self) -> str | None:
        """Name of the shard it belongs to; None for a spare."""
        return self._spec.shard

    @property
    def port(self) -> int:
        """Its TCP port on 127.0.0.1, the same for all its life."""
        return self._spec.port

    @property
    def dsn(self) -> str:
        """The DSN of its superuser, password included: for `psycopg.connect` or as an endpoint of a shard."""
        return f"postgresql://{template.SUPERUSER}:{self._spec.password}@{HOST}:{self.port}/{DATABASE}"

    @property
    def role(self) -> Literal["primary", "replica"]:
        """What it is now, or will be when started: a promoted replica is a primary."""
        return "replica" if (self.data / "standby.signal").exists() else "primary"

    def __repr__(self) -> str:
        state = "running" if self.running else "down"
        return f"LocalServer({self.name!r}, {Dsn(self.dsn).safe()!r}, {state})"

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """A psycopg connection as superuser, in autocommit unless said otherwise."""
        return psycopg.connect(Dsn(self.dsn).conninfo(), **{"autocommit": True, "connect_timeout": 10, **options})

    def start(self) -> None:
        """Start it and wait until it takes connections; after a kill it recovers first.

        Raises:
            ShardUnavailable: it ended or was not ready in time; the message holds the end of its log.
        """
        with self._lock:
            if self.running:
                return
            self._write_settings()
            fresh = not (self._home / "ready").exists()
            self._spawn_and_wait()
            if fresh:
                if self.role == "primary":
                    self._set_password()
                (self._home / "ready").touch()

    def stop(self, *, immediate: bool = False) -> None:
        """Shut it down: open transactions are rolled back, and it writes a checkpoint.

        Args:
            immediate: no checkpoint; it recovers at its next start.
        """
        with self._lock:
            fast = [] if immediate else [(signal.SIGINT, _STOP_S)]
            self._daemon.end([*fast, (signal.SIGQUIT, _IMMEDIATE_S)])

    def create(self) -> None:
        """Make the data folder of a primary from the cached template, unless it exists."""
        with self._lock:
            if (self._home / "made").exists():
                return
            self._make_home()
            source = template.template(self._postgres, self._owner, self._timeout_s)
            template.clone(self._postgres, source, self.data, self._owner, self._timeout_s)
            (self._home / "made").touch()

    def create_from(self, primary: LocalServer) -> None:
        """Make the data folder of a replica by a base backup of a running primary, with a slot of its own."""
        with self._lock:
            if (self._home / "made").exists():
                return
            self._make_home()
            source = make_conninfo("", host=str(self._sockets), port=primary.port, user=template.SUPERUSER)
            how = [
                "--checkpoint=fast",
                "--wal-method=stream",
                "--create-slot",
                f"--slot={self.slot}",
                "--no-sync",
            ]
            self._postgres.run(
                "pg_basebackup", "-D", str(self.data), "-d", source, *how,
                home=self._home, owner=self._owner, timeout_s=self._timeout_s,
            )  # fmt: skip
            (self.data / "standby.signal").touch()
            self._give(self.data / "standby.signal")
            (self._home / "made").touch()

    def follow(self, primary: LocalServer) -> None:
        """Become a replica of another server of the shard, by a new base backup: rows that only this one has are gone.

        Args:
            primary: a running primary.
        """
        with self._lock:
            upstream = primary.port
            if self._spec.upstream == upstream and self.role == "replica" and (self._home / "made").exists():
                self.start()  # it was made by a call whose caller has died
                return
            self.stop()
            # The copy has the roles of the other one, hence its password.
            self._spec = replace(self._spec, upstream=upstream, password=primary.spec.password)
            (self._home / "made").unlink(missing_ok=True)
            self._drop_slot(primary)
            self.create_from(primary)
            self._forget_settings("primary_conninfo", "primary_slot_name", "default_transaction_read_only")
            self.start()

    def discard(self, primary: LocalServer) -> None:
        """Remove a replica that came to nothing, and what its primary keeps for it."""
        with self._lock:
            self.kill()
            shutil.rmtree(self._home, ignore_errors=True)
            try:
                self._drop_slot(primary)
            except psycopg.OperationalError as error:
                _log.warning("%s may keep WAL for the slot %r: %s", primary.name, self.slot, error)

    def _drop_slot(self, primary: LocalServer) -> None:
        with primary.connect_locally() as connection:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                " WHERE slot_name = %s AND NOT active",
                (self.slot,),
            )

    def _forget_settings(self, *names: str) -> None:
        """Take settings of the server that this one is a copy of out of what `ALTER SYSTEM` has written."""
        path = self.data / "postgresql.auto.conf"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line.partition("=")[0].strip() not in names))

    @property
    def slot(self) -> str:
        """Name of the physical replication slot it uses on its primary."""
        return self.name.replace("-", "_").lower()

    def _make_home(self) -> None:
        # A start that was cut short left half a data folder.
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.mkdir(mode=0o700)
        self._give(self._home)

    def _give(self, path: Path) -> None:
        if self._owner is not None:
            os.chown(path, self._owner.uid, self._owner.gid)

    def _write_settings(self) -> None:
        values = {**_SETTINGS, "port": str(self.port), "unix_socket_directories": str(self._sockets)}
        values |= {"cluster_name": self.name}
        if self._spec.upstream is not None:
            values["primary_slot_name"] = self.slot
            values["primary_conninfo"] = (
                f"host={HOST} port={self._spec.upstream} user={template.SUPERUSER} "
                f"password={self._spec.password} application_name={self.name}"
            )
        values |= self._spec.settings
        lines = (f"{name} = '{_quoted(name, value)}'\n" for name, value in values.items())
        path = self.data / template.INCLUDED
        path.touch(mode=0o600)
        self._give(path)
        path.write_text("".join(lines))

    def _spawn_and_wait(self) -> None:
        spawned = False

        def ready() -> bool:
            nonlocal spawned
            if self._daemon.pid is None:
                if spawned and not self._still_attached():
                    return True
                self._forget_dead()
                self._daemon.spawn()
                spawned = True
            return self._accepts()

        if wait_until(ready, self._timeout_s) and self.running:
            return
        reason = (
            f"was not ready within {self._timeout_s:g} s" if self.running else f"ended with {self._daemon.exit_code}"
        )
        self._daemon.kill()
        tail = scrub(self._daemon.tail(), self.dsn)
        raise ShardUnavailable(self.name, f"PostgreSQL {reason}; the end of {self.log}:\n{tail}")

    def _still_attached(self) -> bool:
        """Whether the last start failed only since backends of a killed postmaster have not ended yet."""
        return "is still in use" in self._daemon.tail(4)

    def _accepts(self) -> bool:
        lines = self._pid_file()
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() in ("ready", "standby")

    def _pid_file(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _forget_dead(self) -> None:
        """Remove the lock file of a killed server: its process number may be another program's by now."""
        if self._pid_file() and not running_in(self.data):
            for path in (self.data / "postmaster.pid", self._sockets / f".s.PGSQL.{self.port}.lock"):
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Free what a killed server left outside of its folder, when it will not be started again."""
        free_shared_memory(self.data)

    def _set_password(self) -> None:
        with self.connect_locally() as connection:
            verifier = connection.pgconn.encrypt_password(
                self._spec.password.encode(), template.SUPERUSER.encode(), b"scram-sha-256"
            ).decode()
            # A synchronous primary has no replica yet that could confirm.
            connection.execute("SET synchronous_commit = local")
            role = sql.Identifier(template.SUPERUSER)
            connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(verifier)))

    def connect_locally(self) -> psycopg.Connection[Any]:
        """An autocommit connection over the Unix socket, which asks for no password."""
        return psycopg.connect(
            host=str(self._sockets), port=self.port, user=template.SUPERUSER, dbname=DATABASE,
            autocommit=True, connect_timeout=10,
        )  # fmt: skip


def _quoted(name: str, value: str) -> str:
    if "\n" in value or "\0" in value:
        raise InvalidArgument(f"settings[{name!r}]", value, "a setting is one line of text")
    return value.replace("\\", "\\\\").replace("'", "''")
