"""A local cluster that runs gets further servers, and takes back those that no shard uses any more."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from shardlib.errors import InvalidArgument
from shardlib_ops.local import plan
from shardlib_ops.local.members import Members
from shardlib_ops.local.named import Named, named_servers, read_topology
from shardlib_ops.local.postgres import LocalServer

if TYPE_CHECKING:
    from shardlib_ops.manager.promote import Demoted

__all__ = ["Growth"]

_LETTERS: Final = "bcdefghijklmnopqrstuvwxyz"
"""A shard's first server has the `a`."""


class Growth(Members):
    """The calls of a cluster that make and remake servers while the others run."""

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
