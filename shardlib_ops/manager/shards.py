"""Shards are made, listed and taken out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final
from uuid import uuid4

from shardlib.catalog import publish_change
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.session.settling import gid_of, settle
from shardlib.shard.prepare import prepare_shard
from shardlib.topology import Shard, Topology
from shardlib.topology.change import with_shard, without_shard
from shardlib_ops.manager.base import CONNECT_S, Base, refuse_busy, refuse_promoting, same_server
from shardlib_ops.manager.bootstrap import NewShard, reached

__all__ = ["Shards", "planned_shard"]

_SETTLE_AFTER_S: Final = 60.0
"""Younger prepared transactions are left to their sessions."""
_PREPARED: Final = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() AND gid LIKE %s ORDER BY gid"


class Shards(Base):
    """The calls of the manager that concern shards."""

    async def list_shards(self) -> list[Shard]:
        """Every shard, in the order in which they were made."""
        return list((await self.topology()).shards)

    async def get_shard(self, shard: str) -> Shard:
        """One shard.

        Raises:
            InvalidTopology: there is none of that name or id.
        """
        return (await self.topology()).shard(shard)

    async def create_shard(
        self, name: str, *, primary_endpoint: str, replicas: Sequence[str] = (), vnode_count: int = 256
    ) -> Shard:
        """Add a shard that owns nothing yet: `split`, `rebalance` and others give it ranges.

        Its database gets the schema `shardlib`; tables come with the first job that moves rows there.

        Args:
            name: unique in the cluster; a letter, then letters, digits, `_`, `.` or `-`, 63 characters at most.
            primary_endpoint: DSN of its primary, with a role that may create the schema `shardlib`.
            replicas: DSNs of its replicas.
            vnode_count: virtual nodes, which is its weight when ranges are dealt.

        Raises:
            InvalidArgument: a value that is not allowed, a name or endpoint that is taken.
            InvalidTopology: the database belongs to a cluster already.
            ShardUnavailable: the primary cannot be reached.
            UnsupportedOperation: it is a replica, or too old.
        """
        primary = await self._kept(Dsn(primary_endpoint), "primary_endpoint")
        followers = [await self._kept(Dsn(text), "replicas") for text in replicas]
        new = NewShard(name, primary, followers, vnode_count)
        return await asyncio.to_thread(self._create_shard, new)

    def _create_shard(self, new: NewShard) -> Shard:
        def change(topology: Topology) -> Topology:
            shard = planned_shard(topology, new)
            after = with_shard(topology, shard, nonce=uuid4().hex)
            with reached(shard, CONNECT_S) as connection:
                _free(connection, topology)  # also what this change left there if another has overtaken it
                roles = _app_roles(topology)
                gates = [after.default_gate(shard.id)]
                prepare_shard(connection, shard, cluster_id=topology.cluster_id, gates=gates, app_roles=roles)
            return after

        return publish_change(self._catalog, change).shard(new.name)

    async def delete_shard(self, shard: str) -> None:
        """Take a shard that owns nothing out of the cluster. Its rows and its server are left as they are.

        First settles two-phase transactions of lost sessions that it decides: nobody could ask it afterwards.

        Raises:
            InvalidTopology: it owns ranges, or a job that is not over uses it, or another shard holds a prepared
                transaction that it decides, or there is none.
            ShardUnavailable: another shard does not tell what it has prepared.
        """
        await asyncio.to_thread(self._delete_shard, shard)

    def _delete_shard(self, name: str) -> None:
        def change(topology: Topology) -> Topology:
            shard = topology.shard(name)
            refuse_busy(self._jobs.all(), [shard], topology)
            refuse_promoting(self._promotions.open(), [shard])
            _refuse_deciding(topology, shard)
            return without_shard(topology, shard.id, nonce=uuid4().hex)

        publish_change(self._catalog, change)


def _refuse_deciding(topology: Topology, shard: Shard) -> None:
    """No other shard holds a prepared transaction that only this one can decide."""
    if _decided_by(topology, shard):
        settle(topology, older_than_s=_SETTLE_AFTER_S, timeout_s=CONNECT_S)
        if left := _decided_by(topology, shard):
            raise InvalidTopology(
                f"shard {shard.name!r} decides prepared transactions of other shards: {', '.join(left)}",
                "wait for their sessions; if these are gone, `engine.settle()`, then delete it again",
            )


def _decided_by(topology: Topology, decider: Shard) -> list[str]:
    """The global ids of what is prepared on other shards and decided by this one."""
    found: list[str] = []
    for shard in topology.shards:
        if shard.id != decider.id:
            with reached(shard, CONNECT_S) as connection:
                found += [gid for (gid,) in connection.execute(_PREPARED, (gid_of("%", decider.id, "%"),)).fetchall()]
    return found


def planned_shard(topology: Topology, new: NewShard) -> Shard:
    """The shard that `new` becomes, if nothing of it is taken."""
    for shard in topology.shards:
        if shard.name == new.name:
            raise InvalidArgument("name", new.name, "another shard has it")
        for endpoint in (new.primary, *new.replicas):
            if any(same_server(endpoint, known) for known in (shard.primary, *shard.replicas)):
                raise InvalidArgument("primary_endpoint", str(endpoint), f"it is a server of shard {shard.name!r}")
    return Shard(f"s{topology.next_shard}", new.name, new.primary, tuple(new.replicas), vnode_count=new.vnode_count)


def _free(connection: Any, topology: Topology) -> None:
    """Take out what a `create_shard` of this cluster that came to nothing has left in the database."""
    row = connection.execute("SELECT to_regclass('shardlib.control') IS NOT NULL").fetchone()
    if row is None or not row[0]:
        return
    cluster_id, shard_id = connection.execute("SELECT cluster_id, shard_id FROM shardlib.control").fetchone()
    if cluster_id != topology.cluster_id:
        return  # `install` says whose it is
    known = next((shard for shard in topology.shards if shard.id == shard_id), None)
    if known is not None:
        # Its number may have gone to another database meanwhile.
        with reached(known, CONNECT_S) as theirs:
            if _database(theirs) == _database(connection):
                raise InvalidArgument("primary_endpoint", shard_id, "this database is that shard already")
    connection.execute("DROP SCHEMA shardlib CASCADE")


def _database(connection: Any) -> tuple[Any, ...]:
    """Tells a database from those of other servers, and a replica not from its primary."""
    query = (
        "SELECT system_identifier, (SELECT oid FROM pg_database WHERE datname = current_database())"
        " FROM pg_control_system()"
    )
    return tuple(connection.execute(query).fetchone())


def _app_roles(topology: Topology) -> tuple[str, ...]:
    """The applications' roles, as the first shard that answers has them."""
    for shard in topology.shards:
        with reached(shard, CONNECT_S) as connection:
            row = connection.execute("SELECT app_roles FROM shardlib.control").fetchone()
            if row is not None:
                return tuple(row[0])
    return ()
