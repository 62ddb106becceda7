"""What the catalog says of a local cluster's servers: a server alone cannot tell whether it was replaced."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from shardlib_ops.local.ports import HOST

if TYPE_CHECKING:
    from shardlib.dsn import Dsn
    from shardlib.topology import Topology

__all__ = ["Named", "named_servers", "read_topology"]

_CATALOG_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Named:
    """One server as the catalog names it.

    Attributes:
        shard: name of the shard.
        role: what it is to that shard.
    """

    shard: str
    role: Literal["primary", "replica"]


def read_topology(url: str, timeout_s: float = _CATALOG_S) -> Topology:
    """The topology in a local cluster's catalog.

    Raises:
        CatalogUnavailable: no answer within `timeout_s` seconds.
        InvalidTopology: there is none yet.
    """
    from shardlib.catalog import open_catalog

    with closing(open_catalog(url, timeout_s=timeout_s)) as catalog:
        return catalog.load()


def named_servers(topology: Topology) -> dict[int, Named]:
    """Port -> what the topology says of the server there, of those on this machine."""
    found: dict[int, Named] = {}
    for shard in topology.shards:
        found |= {port: Named(shard.name, "replica") for port in map(_port, shard.replicas) if port is not None}
        if (port := _port(shard.primary)) is not None:
            found[port] = Named(shard.name, "primary")
    return found


def _port(dsn: Dsn) -> int | None:
    return int(dsn.port) if dsn.host == HOST and dsn.port.isdigit() else None
