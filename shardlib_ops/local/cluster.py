"""LocalCluster: shards, replicas and a catalog, as real servers on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from shardlib.errors import InvalidArgument, ShardUnavailable, UnsupportedOperation
from shardlib_ops.local import places, plan, registry, watchdog
from shardlib_ops.local.binaries import find_etcd, find_postgres
from shardlib_ops.local.etcd import LocalEtcd
from shardlib_ops.local.named import Named, named_servers, read_topology
from shardlib_ops.local.passwords import write_passwords
from shardlib_ops.local.plan import Options, Plan
from shardlib_ops.local.ports import PortKeeper
from shardlib_ops.local.postgres import LocalServer, ServerSpec
from shardlib_ops.local.process import account, wait_until

if TYPE_CHECKING:
    from shardlib_ops.manager.promote import Demoted

__all__ = ["LocalCluster"]

_log: Final = logging.getLogger("shardlib.local")
_SOCKET_PATH_MAX: Final = 90
_WORKERS_MAX: Final = 8
_LETTERS: Final = "bcdefghijklmnopqrstuvwxyz"
"""A shard's first server has the `a`."""


class LocalCluster:
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
        self._options = Options(
            shards, replicas, synchronous, etcd_members, hash_function, vnode_count, catalog_name, durable,
            dict(settings or {}),
        )  # fmt: skip
        if timeout_s <= 0:
            raise InvalidArgument("timeout_s", timeout_s, "seconds, more than 0")
        self._bootstrap, self._timeout_s = bootstrap, timeout_s
        self._account = account()
        self._postgres = find_postgres(pg_bin, self._account)
        self._etcd_program = find_etcd(etcd_program)
        self._wanted = None if directory is None else Path(directory).absolute()
        self._lock = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        self._ports = PortKeeper()
        self._plan: Plan | None = None
        self._entry: Path | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._owner = 0
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

    def spare(self, name: str) -> LocalServer:
        """One more empty PostgreSQL that no shard uses yet, running; asked for again, the same one.

        Args:
            name: letters, digits and `-`, unlike the name of any other server.

        Raises:
            InvalidArgument: the name is taken or not allowed.
            ShardUnavailable: it did not start.
        """
        with self._lock:
            current = self._started()
            for server in self._spares:
                if server.name == name:
                    server.start()
                    return server
            self._refuse_taken(name)
            spec = plan.server_spec(name, None, self._ports.take(), self._options)
            server = self._server(spec)
            server.create()
            self._spares.append(server)
            self._remember(replace(current, spares=(*current.spares, spec)))
            server.start()
            return server

    def add_replica(self, shard: str, name: str | None = None) -> LocalServer:
        """One more replica of a shard, running. It is not in the catalog until `Manager.add_replica` puts it there.

        Args:
            shard: name or id of a shard of the catalog whose primary is a server of this cluster.
            name: letters, digits and `-`, unlike the name of any other server; None for the shard's, and a letter.

        Raises:
            InvalidArgument: the name is taken or not allowed, or the shard's primary is another server.
            InvalidTopology: there is no such shard.
            ShardUnavailable: it did not start.
        """
        with self._lock:
            current = self._started()
            primary = self._primary_by_catalog(shard)
            if name is None:
                base, taken = primary.shard or primary.name, {server.name for server in self._everyone}
                name = next((one for one in (f"{base}-{letter}" for letter in _LETTERS) if one not in taken), "")
            self._refuse_taken(name)
            source = primary.spec
            spec = plan.server_spec(
                name, source.shard, self._ports.take(), self._options, password=source.password, upstream=source.port
            )
            server = self._server(spec)
            try:
                server.create_from(primary)
                server.start()
            except BaseException:
                server.discard(primary)
                raise
            if source.shard is None:
                self._spares.append(server)
                self._remember(replace(current, spares=(*current.spares, spec)))
            else:
                self._servers.append(server)
                self._remember(replace(current, servers=(*current.servers, spec)))
            return server

    def rejoin_server(self, name: str, shard: str | None = None) -> LocalServer:
        """Make a server that no shard uses now, such as an old primary, a replica of a shard: what it holds is gone.

        One that is such a replica already is started, if it is down. It is not in the catalog until
        `Manager.add_replica` puts it there.

        Args:
            name: the server.
            shard: name or id of the shard; None for that which it was made for.

        Raises:
            InvalidArgument: there is no such server, it is in use by the catalog, or it was made for no shard.
            InvalidTopology: there is no such shard.
            ShardUnavailable: it did not start.
        """
        with self._lock:
            server = self.server(name)
            topology = read_topology(self.url)
            if (used := named_servers(topology).get(server.port)) is not None:
                if used == Named(topology.shard(shard or used.shard).name, "replica"):
                    server.start()
                    return server
                way_out = "promote a replica first" if used.role == "primary" else "`remove_replica` first"
                raise InvalidArgument("name", name, f"it is the {used.role} of shard {used.shard!r}: {way_out}")
            if (wanted := shard or server.shard) is None:
                raise InvalidArgument("name", name, "it was made for no shard: name the one that it is to follow")
            self._follow(server, self._primary_by_catalog(wanted))
            return server

    async def rejoin(self, demoted: Demoted) -> None:
        """Make an old primary a replica of the new one: for `Manager.promote_replica(..., rejoin=cluster.rejoin)`.

        Raises:
            InvalidArgument: they are no servers of this cluster.
            ShardUnavailable: it did not start.
        """
        servers = {server.port: server for server in self._everyone}
        try:
            old, new = servers[int(demoted.old.port)], servers[int(demoted.new.port)]
        except KeyError:
            raise InvalidArgument("demoted", demoted, "servers of this cluster") from None
        await asyncio.to_thread(self._follow, old, new)

    def _follow(self, old: LocalServer, new: LocalServer) -> None:
        old.follow(new)
        with self._lock:
            self._remember(self._started().changed(old.spec))

    def _primary_by_catalog(self, shard: str) -> LocalServer:
        """The server of this cluster that the catalog names as the primary of a shard."""
        topology = read_topology(self.url)
        found, named = topology.shard(shard), named_servers(topology)
        for server in self._everyone:
            if named.get(server.port) == Named(found.name, "primary"):
                return server
        raise InvalidArgument("shard", found.name, f"its primary {found.primary} is no server of this cluster")

    def _refuse_taken(self, name: str) -> None:
        letters = name.replace("-", "")
        # The folder holds more than servers.
        if not (letters.isascii() and letters.isalnum()) or (self._directory / name).exists():
            raise InvalidArgument("name", name, "letters, digits and -, and no other server's name")

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

    def _started(self) -> Plan:
        if self._plan is None:
            raise UnsupportedOperation("the local cluster is not running", "use it inside `with`, or call start()")
        return self._plan

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

    def _server(self, spec: ServerSpec) -> LocalServer:
        home = self._directory / spec.name
        return LocalServer(spec, self._postgres, home, self._sockets, self._account, self._timeout_s)

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

    def _remember(self, changed: Plan) -> None:
        self._plan = changed
        write_passwords(self._directory, changed.all_servers)
        plan.save(changed, self._directory)

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
