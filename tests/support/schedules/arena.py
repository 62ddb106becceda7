"""Where schedules run: servers that stay, and for each schedule databases and a catalog of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql
from sqlalchemy import insert

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from shardlib_ops.manager.bootstrap import NewShard, create_cluster
from shardlib_ops.manager.manager import Manager
from tests.support.eventually import eventually
from tests.support.faults import Proxy
from tests.support.schedules.client import account, ballast, lists, more
from tests.support.schedules.plan import Schedule
from tests.support.wire import Wire
from tests.support.workload import counter, metadata, register

SHARDS = 3
RUNNERS = 2
COINS = 100
BALLAST = 40
KEYS = tuple(f"key-{number}" for number in range(24))
DEBIAN_ETCD = Path("/usr/bin/etcd")
"""Of release 3.4; some releases of 3.5 lose data when they are killed (etcd's issue 13766)."""


def _with_path(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@dataclass(frozen=True)
class Place:
    """The databases and the catalog of one schedule.

    Attributes:
        name: of the databases, and of the catalog.
        url: of the catalog, straight to etcd.
        cluster_shards: names of the shards, in the order of the servers.
        dsns: of the databases, straight to the servers.
    """

    name: str
    url: str
    shards: tuple[str, ...]
    dsns: tuple[str, ...]


class Arena:
    """Three servers and an etcd, with proxies in front of them; use as a context manager.

    Attributes:
        cluster: the servers.
        runner_ways: proxies to the servers that the topology names: the runners' way, one a server.
        client_ways: proxies that some clients use, one a server.
        runner_etcd: a way to the catalog for each runner.
        client_etcd: that of some clients.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        enter = self._stack.enter_context
        try:
            etcd = DEBIAN_ETCD if DEBIAN_ETCD.exists() else None
            self.cluster = enter(LocalCluster(shards=SHARDS, etcd_program=etcd, bootstrap=False))
            self.servers: tuple[LocalServer, ...] = self.cluster.servers
            self.runner_ways = [enter(Proxy(server.dsn)) for server in self.servers]
            self.client_ways = [enter(Proxy(server.dsn)) for server in self.servers]
            self.runner_etcd = [enter(Wire(self.cluster.url)) for _ in range(RUNNERS)]
            self.client_etcd = enter(Wire(self.cluster.url))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def proxies(self) -> list[Proxy]:
        """All of them."""
        return [*self.runner_ways, *self.client_ways, *self.runner_etcd, self.client_etcd]

    def mend(self) -> None:
        """Everything runs and lets through."""
        for server in self.servers:
            server.resume()
            server.start()
        for member in self.cluster.etcd:
            member.resume()
            member.start()
        for proxy in self.proxies:
            proxy.heal()

    @contextmanager
    def place(self, schedule: Schedule) -> Iterator[Place]:
        """A cluster of databases of its own, with tables and rows; dropped at the end."""
        name = f"schedule_{schedule.seed}"
        url = _with_path(self.cluster.url, name)
        for server in self.servers:
            self._drop(server, name)
            with server.connect() as admin:
                admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        shards = tuple(f"shard-{number}" for number in range(1, SHARDS + 1))
        place = Place(name, url, shards, tuple(_with_path(server.dsn, name) for server in self.servers))
        try:
            self._found(place, schedule)
            yield place
        finally:
            self.mend()
            for server in self.servers:
                self._drop(server, name)

    def _found(self, place: Place, schedule: Schedule) -> None:
        ways = [_with_path(proxy.dsn, place.name) for proxy in self.runner_ways]
        catalog = open_catalog(place.url)
        try:
            first = [
                NewShard(name, Dsn(way))
                for name, way in zip(place.shards[: schedule.owners], ways[: schedule.owners], strict=True)
            ]
            create_cluster(catalog, first, hash_function=schedule.hash_function)
        finally:
            catalog.close()
        self._fill(place)
        with Manager.sync(place.url) as manager:
            for name, way in list(zip(place.shards, ways, strict=True))[schedule.owners :]:
                manager.create_shard(name, primary_endpoint=way)

    def _fill(self, place: Place) -> None:
        with ShardedEngine(place.url) as engine:
            engine.create_all(metadata)
            engine.create_all(more)
            for key in KEYS:
                with engine.session(key) as session:
                    session.execute(insert(counter).values(key=key, v=0))
                    session.execute(insert(register).values(key=key, v=0))
                    session.execute(insert(lists).values(key=key, elements=""))
                    session.execute(insert(account).values(key=key, coins=COINS))
                    session.execute(
                        insert(ballast), [{"key": key, "n": n, "text": f"{key} {n} " * 20} for n in range(BALLAST)]
                    )
                    session.commit()
        for dsn in place.dsns:
            with psycopg.connect(dsn) as conn:
                # The bag has no key: what a change tells of the old row has to be all of it.
                conn.execute("ALTER TABLE IF EXISTS bag REPLICA IDENTITY FULL")

    @staticmethod
    def _drop(server: LocalServer, name: str) -> None:
        with server.connect() as admin:
            found = admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone()
            if found is None:
                return
            with server.connect(dbname=name) as inside:
                for (gid,) in inside.execute(
                    "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
                ).fetchall():
                    inside.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))

                def no_slots() -> bool:
                    inside.execute(
                        "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots"
                        " WHERE database = current_database() AND active_pid IS NOT NULL"
                    )
                    inside.execute(
                        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                        " WHERE database = current_database()"
                    )
                    return True

                eventually(no_slots, 10, "slots are dropped", ignore=psycopg.errors.ObjectInUse)
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def shard_index(place: Place, topology: Topology, shard_id: str) -> int:
    """Which server a shard is."""
    return place.shards.index(topology.shard(shard_id).name)


def rows_of(dsn: str, text: str) -> list[Any]:
    """Rows of a table; none where it does not exist."""
    with psycopg.connect(dsn, connect_timeout=10) as conn:
        try:
            return conn.execute(text.encode()).fetchall()
        except psycopg.errors.UndefinedTable:
            return []
