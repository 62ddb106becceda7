"""A server is admitted as a replica of a shard, once it is seen to be one."""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import uuid4

from shardlib.catalog import Catalog, Lease, publish_change
from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.topology import Topology
from shardlib_ops.manager.promote.server import Node, arrives
from shardlib_ops.manager.promote.swap import with_replica
from shardlib_ops.reshard.connect import Runner

__all__ = ["add_replica", "admit"]

_STREAM_S: Final = 30.0


async def add_replica(catalog: Catalog, topology: Topology, shard_id: str, replica: Dsn, *, lease: Lease) -> Topology:
    """See `Manager.add_replica`. The lease is that of the shard's servers."""
    shard, runner = topology.shard(shard_id), Runner(0, 0)
    primary, server = Node(shard.primary, shard.name, runner), Node(replica, shard.name, runner)
    try:
        return await admit(catalog, primary, server, shard.id, lease=lease)
    finally:
        await primary.close()
        await server.close()


async def admit(catalog: Catalog, primary: Node, replica: Node, shard_id: str, *, lease: Lease) -> Topology:
    """Put a server into the topology as a replica, after it has replayed what the primary writes now.

    One that was fenced as an old primary may begin writing sessions again, should it ever be the primary.

    Raises:
        InvalidTopology: it is no replica of this primary.
        ShardUnavailable: it does not answer.
    """
    where = f"{replica.dsn.host}:{replica.dsn.port}"
    system = "SELECT system_identifier::text FROM pg_control_system()"
    if await replica.value(system) != await primary.value(system):
        raise InvalidTopology(f"{where} is no copy of the primary", "make it one by a base backup")
    if not await replica.in_recovery():
        raise InvalidTopology(f"{where} takes writes", "make it a replica of the primary")
    if not await arrives(primary, replica, _STREAM_S):
        raise InvalidTopology(
            f"{where} does not replay what the primary writes within {_STREAM_S:g} s",
            "look at its log; primary_conninfo has to lead to the primary",
        )
    await replica.set("default_transaction_read_only", None, shows="off")

    def change(now: Topology) -> Topology:
        if now.shard(shard_id).primary != primary.dsn:
            raise InvalidTopology(f"shard {now.shard(shard_id).name!r} has another primary by now", "try again")
        return with_replica(now, shard_id, replica.dsn, nonce=uuid4().hex)

    return await asyncio.to_thread(publish_change, catalog, change, lease=lease)
