"""LocalCluster: shards, replicas and a catalog, as real servers on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from shardlib.errors import InvalidArgument, ShardUnavailable, UnsupportedOperation
from shardlib_ops.local import places, plan, registry, watchdog
from shardlib_ops.local.binaries import find_etcd, find_postgres
from shardlib_ops.local.etcd import LocalEtcd
from shardlib_ops.local.growth import Growth
from shardlib_ops.local.plan import Options, Plan
from shardlib_ops.local.postgres import LocalServer
from shardlib_ops.local.process import account, wait_until

__all__ = ["LocalCluster"]

_SOCKET_PATH_MAX: Final = 90
_WORKERS_MAX: Final = 8


class LocalCluster(Growth):
    """Real PostgreSQL and etcd servers on free ports of 127.0.0.1, with a first topology in the catalog.

    ::

        with LocalCluster(shards=3, replicas=1, synchronous=True) as cluster:
            engine = ShardedEngine(cluster.url)

    Nothing stays behind: neither after the `with` block, nor after Ctrl-C or SIGTERM, nor when the process
    that owns it is killed (a watchdog process cleans up then, and if that is killed as well, the next cluster
    does). As root the servers run as `nobody`. Every shard has a password of its own (SCRAM).

    Args:
        shards: number of shards, 1 to 64; named `shard-01`, ...
        replicas: replicas of each shard, 0 to 8.
        synchronous: whether a commit waits until one replica has it on disk.
        etcd_members: 1, or 3.
        directory: folder to keep the data in: the same servers start again from it. None for a temporary one.
        pg_bin: folder of the programs of another PostgreSQL; None for that of the extra `local`.
        etcd_program: another etcd; None for that of the extra `local`.
        hash_function: `murmur3` or `xxhash`.
        vnode_count: virtual nodes of each shard.
        catalog_name: last part of `url`.
        settings: further PostgreSQL settings of every server, such as `{"work_mem": "64MB"}`.
        durable: whether servers call fsync, as the loss of the whole machine would ask for. The kill of a
            process loses nothing without.
        bootstrap: False leaves the catalog and the shards empty.
        timeout_s: limit for the start of each server, in seconds.

    Raises:
        InvalidArgument: a value that is not allowed.
        UnsupportedOperation: there are no server programs; the message names the extra to install.
    """

    def __init__(
        self,
        shards: int = 2,
        replicas: int = 0,
        synchronous: bool = False,
        *,
        etcd_members: int = 1,
        directory: str | os.PathLike[str] | None = None,
        pg_bin: str | os.PathLike[str] | None = None,
        etcd_program: str | os.PathLike[str] | None = None,
        hash_function: str = "murmur3",
        vnode_count: int = 256,
        catalog_name: str = "local",
        settings: Mapping[str, str] | None = None,
        durable: bool = False,
        bootstrap: bool = True,
        timeout_s: float = 30.0,
    ) -> None:
        options = Options(
            shards, replicas, synchronous, etcd_members, hash_function, vnode_count, catalog_name, durable,
            dict(settings or {}),
        )  # fmt: skip
        if timeout_s <= 0:
            raise InvalidArgument("timeout_s", timeout_s, "seconds, more than 0")
        owner = account()
        super().__init__(options, find_postgres(pg_bin, owner), owner, timeout_s)
        self._bootstrap = bootstrap
        self._etcd_program = find_etcd(etcd_program)
        self._wanted = None if directory is None else Path(directory).absolute()

    def _reset(self) -> None:
        super()._reset()
        self._entry: Path | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __repr__(self) -> str:
        state = f"at {self.url}" if self.running else "down"
        return f"LocalCluster({self._options.shards} shards, {self._options.replicas} replicas each, {state})"

    def start(self) -> Self:
        """Start everything and publish the first topology; idempotent, and a failure leaves nothing behind.

        Raises:
            ShardUnavailable: a server did not start; the message holds the end of its log.
            CatalogUnavailable: etcd did not start.
            InvalidArgument: the folder is not fit for it.
        """
        with self._lock:
            if self.running:
                return self
            registry.clean_abandoned()
            try:
                self._prepare()
                self._start_servers()
                self._publish()
            except BaseException:
                self._end()
                raise
            return self

    def stop(self) -> None:
        """Stop everything; a temporary folder is removed. Idempotent; does nothing in a forked child."""
        with self._lock:
            if self.running and self._owner == os.getpid():
                self._end()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be cancelled; what it starts must not outlive this.
            await asyncio.wait([starting])
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self.stop))

    def _prepare(self) -> None:
        """Folder, register, watchdog, ports: everything but processes."""
        temporary = self._wanted is None
        token = secrets.token_hex(4)
        base = Path(tempfile.gettempdir()).resolve()
        self._directory = self._wanted or base / f"shardlib-{token}"
        with self._fit():
            self._check_directory()
        near = self._directory / "s"
        self._sockets = near if len(str(near)) <= _SOCKET_PATH_MAX else base / f"shardlib-s-{token}"
        self._owner = os.getpid()
        try:
            self._entry = registry.enter(self._directory, self._sockets, temporary=temporary)
        except registry.OccupiedError as held:
            raise InvalidArgument("directory", str(self._directory), f"{held}: stop that first") from None
        self._watchdog = watchdog.spawn(self._entry)
        with self._fit():
            # Others pass, for the servers' account, but cannot look around.
            places.make(self._directory, 0o711 if self._account else 0o700, fresh=temporary)
            places.make(self._sockets, 0o700)
            if self._account is not None:
                os.chown(self._sockets, self._account.uid, self._account.gid)
            found = plan.load(self._directory)
        if found is not None:
            self._remember(self._again(found))
        else:
            self._remember(plan.make(self._options, self._postgres.version, self._ports.take))

    @contextlib.contextmanager
    def _fit(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = "" if error.filename in (None, str(self._directory)) else f": {error.filename}"
            raise InvalidArgument(
                "directory",
                str(self._directory),
                f"a folder that can be made, read and written to ({error.strerror or error}{where})",
            ) from None

    def _check_directory(self) -> None:
        there = next(folder for folder in (self._directory, *self._directory.parents) if folder.exists())
        if (closed := places.blocked_at(there, self._account)) is not None and self._account is not None:
            raise InvalidArgument(
                "directory",
                str(self._directory),
                f"{closed} is closed to {self._account.name}, as whom servers run that root starts",
            )
        try:
            content = any(self._directory.iterdir())
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise InvalidArgument("directory", str(self._directory), "a folder") from None
        if content and not (self._directory / plan.STATE).exists():
            raise InvalidArgument("directory", str(self._directory), "an empty folder, or that of a local cluster")

    def _again(self, found: Plan) -> Plan:
        where = str(self._directory)
        if what := plan.differing(found.options, self._options):
            raise InvalidArgument(
                "directory",
                where,
                f"it holds a cluster with other options: {what}; give those that it has, or name another folder, or "
                "remove this one with `shardlib-ops local down`",
            )
        if found.postgres != (mine := self._postgres.version):
            raise InvalidArgument("directory", where, f"its data was made by {found.postgres}, not {mine}")
        ports = [server.port for server in found.all_servers]
        ports += [port for member in found.etcd for port in (member.port, member.peer_port)]
        for port in ports:
            if not self._ports.keep(port):
                raise UnsupportedOperation(f"port {port} of the cluster in {self._directory} is in use", "free it")
        return found

    def _start_servers(self) -> None:
        current = self._started()
        self._servers = [self._server(spec) for spec in current.servers]
        self._spares = [self._server(spec) for spec in current.spares]
        self._etcd = [
            LocalEtcd(
                member, current.etcd, self._etcd_program, self._directory / member.name,
                durable=self._options.durable, timeout_s=self._timeout_s,
            )
            for member in current.etcd
        ]  # fmt: skip
        for member in self._etcd:
            member.spawn()
        groups: dict[str, list[LocalServer]] = {}
        for server in (*self._servers, *self._spares):
            groups.setdefault(server.shard or server.name, []).append(server)
        _together([lambda group=group: self._start_shard(group) for group in groups.values()])  # type: ignore[misc]
        for member in self._etcd:
            member.wait_healthy()

    def _start_shard(self, group: Sequence[LocalServer]) -> None:
        first, *others = group
        first.create()
        first.start()
        for server in others:
            server.create_from(first)
            server.start()
        if first.role == "primary":
            self._await_replicas(first, {server.name for server in others if server.role == "replica"})

    def _await_replicas(self, primary: LocalServer, names: set[str]) -> None:
        """Until every replica streams: a commit of a synchronous primary would wait for one without limit."""
        if not names:
            return
        query = "SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'"
        with primary.connect_locally() as connection:

            def streaming() -> bool:
                return names <= {row[0] for row in connection.execute(query)}

            if not wait_until(streaming, self._timeout_s):
                raise ShardUnavailable(
                    primary.name, f"its replicas {sorted(names)} did not stream within {self._timeout_s:g} s"
                )

    def _publish(self) -> None:
        current = self._started()
        if not self._bootstrap or current.ready:
            return
        from shardlib.catalog import open_catalog
        from shardlib.dsn import Dsn
        from shardlib_ops.manager.bootstrap import NewShard, create_cluster

        shards = []
        for server in self._servers:
            if server.role == "primary":
                name = str(server.shard)
                replicas = [Dsn(one.dsn) for one in self.replicas(name)]
                shards.append(NewShard(name, Dsn(server.dsn), replicas, self._options.vnode_count))
        catalog = open_catalog(self.url, timeout_s=self._timeout_s)
        try:
            create_cluster(catalog, shards, hash_function=self._options.hash_function)
        finally:
            catalog.close()
        self._remember(replace(current, ready=True))

    def _end(self) -> None:
        """Everything down, also after half a start; an error of one server does not leave the others up."""
        entry, temporary = self._entry, self._wanted is None
        servers: Iterable[LocalServer | LocalEtcd] = (*self._servers, *self._spares, *self._etcd)
        try:
            # What is removed anyway needs no checkpoint.
            _together([server.kill if temporary else server.stop for server in servers])
        finally:
            if entry is not None:
                # Also what a start that failed had begun: base backups, servers not in the lists yet.
                registry.clean(entry)
            if self._watchdog is not None:
                self._watchdog.kill()
                self._watchdog.wait()
            self._ports.close()
            self._reset()


def _together(calls: Sequence[Callable[[], None]]) -> None:
    """Run calls side by side, all to their end; then raise the first error, with the others as notes."""
    if not calls:
        return
    with ThreadPoolExecutor(min(len(calls), _WORKERS_MAX), "shardlib-local") as pool:
        running = [pool.submit(call) for call in calls]
    errors = [error for future in running if (error := future.exception()) is not None]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"also: {other}")
        raise errors[0]
