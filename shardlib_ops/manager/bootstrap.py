"""The first topology of a cluster: shards that are ready, and a catalog that knows them."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from shardlib.catalog.base import Catalog, Conflict
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology, UnsupportedOperation
from shardlib.ring.build import VNODES_MAX
from shardlib.shard.prepare import prepare_shard, unavailable
from shardlib.token import hash_of
from shardlib.topology import Shard, Topology
from shardlib.topology.change import initial

__all__ = ["NewShard", "create_cluster", "create_cluster_async", "reached"]

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
_ID: Final = re.compile(r"s[0-9]+")
_OLDEST: Final = 15
"""The least major version of PostgreSQL."""


@dataclass(frozen=True, slots=True)
class NewShard:
    """A shard to be.

    Attributes:
        name: unique in the cluster; a letter, then letters, digits, `_`, `.` or `-`, 63 characters at most.
        primary: its primary, with a role that may create the schema `shardlib`.
        replicas: its replicas.
        vnode_count: virtual nodes on the ring, which is its weight.

    Raises:
        InvalidArgument: a name or count that is not allowed.
    """

    name: str
    primary: Dsn
    replicas: Sequence[Dsn] = ()
    vnode_count: int = 256

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidArgument("name", self.name, "a letter, then letters, digits, _ . -, 63 characters at most")
        if _ID.fullmatch(self.name):
            raise InvalidArgument("name", self.name, "names like s1 are the ids that shards get by themselves")
        if not 1 <= self.vnode_count <= VNODES_MAX:
            raise InvalidArgument("vnode_count", self.vnode_count, f"1 to {VNODES_MAX} virtual nodes")


def create_cluster(
    catalog: Catalog,
    shards: Sequence[NewShard],
    *,
    hash_function: str = "murmur3",
    app_roles: Sequence[str] = (),
    connect_timeout_s: int = 10,
) -> Topology:
    """Prepare the shards and publish version 1 of the topology in an empty catalog.

    Nothing is touched before every shard was reached. A failure before the topology is published takes the
    schema out again where this call put it.

    Args:
        catalog: an empty catalog.
        shards: at least one; their ids will be `s1`, `s2`, ... in this order.
        hash_function: `murmur3` or `xxhash`, for ever.
        app_roles: roles of applications, which get what the fence asks of them.
        connect_timeout_s: limit for each connection to a shard, in seconds.

    Returns:
        the published topology.

    Raises:
        InvalidArgument: an unknown hash function, or an application's role that a server does not know.
        InvalidTopology: the catalog is not empty, or the database of a shard belongs to a cluster already.
        ShardUnavailable: a shard's primary could not be reached.
        UnsupportedOperation: a server is a replica, or too old, or its role may not create the schema.
        CatalogUnavailable: the catalog did not answer. Run it again: if the topology was published after all,
            that says so.
    """
    hash_of(hash_function)
    _refuse_if_held(catalog, catalog.version())
    ready = [
        Shard(f"s{number}", new.name, new.primary, tuple(new.replicas), vnode_count=new.vnode_count)
        for number, new in enumerate(shards, 1)
    ]
    cluster_id = uuid.uuid4().hex
    topology = initial(ready, hash_function=hash_function, cluster_id=cluster_id, nonce=uuid.uuid4().hex)
    with ExitStack() as connections, ExitStack() as undo:
        opened = [(shard, connections.enter_context(reached(shard, connect_timeout_s))) for shard in ready]
        for shard, connection in opened:
            if not _has_schema(connection):
                undo.callback(_take_back, connection, cluster_id)
            gates = [topology.default_gate(shard.id)]
            prepare_shard(connection, shard, cluster_id=cluster_id, gates=gates, app_roles=app_roles)
        # From here on the topology may be there even if the call fails.
        undo.pop_all()
        try:
            catalog.publish(topology, expected=None)
        except Conflict as conflict:
            _refuse_if_held(catalog, conflict.found)
            raise
    return topology


async def create_cluster_async(
    catalog: Catalog,
    shards: Sequence[NewShard],
    *,
    hash_function: str = "murmur3",
    app_roles: Sequence[str] = (),
    connect_timeout_s: int = 10,
) -> Topology:
    """`create_cluster` in a thread, for coroutines."""
    return await asyncio.to_thread(
        create_cluster,
        catalog,
        shards,
        hash_function=hash_function,
        app_roles=app_roles,
        connect_timeout_s=connect_timeout_s,
    )


def _refuse_if_held(catalog: Catalog, version: int | None) -> None:
    if version is not None:
        raise InvalidTopology(
            f"the catalog {catalog.safe_url} already holds a topology, version {version}",
            "a cluster begins in an empty catalog: use another name in its URL, or add shards to this one",
        )


def reached(shard: Shard, timeout_s: int) -> psycopg.Connection[Any]:
    """A connection to a shard's primary, which is fit to be one; the caller closes it.

    Raises:
        ShardUnavailable: no answer in time.
        UnsupportedOperation: it is a replica, or too old.
    """
    try:
        connection = psycopg.connect(
            shard.primary.conninfo(connect_timeout=timeout_s, application_name="shardlib"), autocommit=True
        )
    except psycopg.Error as error:
        raise unavailable(shard, error) from None
    try:
        _check_server(shard, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_server(shard: Shard, connection: psycopg.Connection[Any]) -> None:
    if (major := connection.info.server_version // 10_000) < _OLDEST:
        raise UnsupportedOperation(
            f"shard {shard.name!r} runs PostgreSQL {major}",
            f"the fence needs {_OLDEST} or later: upgrade the server",
        )
    row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
    if row is not None and row[0]:
        raise UnsupportedOperation(
            f"{shard.primary} is a replica and cannot be the primary of shard {shard.name!r}",
            "give the address of its primary",
        )


def _has_schema(connection: psycopg.Connection[Any]) -> bool:
    return connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'shardlib'").fetchone() is not None


def _take_back(connection: psycopg.Connection[Any], cluster_id: str) -> None:
    """Drop the schema if it is that of the cluster that came to nothing."""
    found = connection.execute("SELECT to_regclass('shardlib.control') IS NOT NULL").fetchone()
    if found is None or not found[0]:
        return
    row = connection.execute("SELECT cluster_id FROM shardlib.control").fetchone()
    if row is not None and row[0] == cluster_id:
        connection.execute("DROP SCHEMA shardlib CASCADE")
