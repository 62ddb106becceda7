"""Two shards of PostgreSQL versions that need not be the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardlib_ops import LocalCluster
from shardlib_ops.local import LocalServer
from tests.conftest import DEBIAN_15

_BIN: dict[str, Path | None] = {"18": None, "15": DEBIAN_15}
_PAIRS = [("18", "18"), ("15", "15"), ("15", "18")]

PAIRS = [
    pytest.param(
        pair,
        id="-".join(pair),
        marks=pytest.mark.skipif("15" in pair and not DEBIAN_15.exists(), reason=f"no PostgreSQL 15 in {DEBIAN_15}"),
    )
    for pair in _PAIRS
]
"""(version of the source, version of the target), for `parametrize`."""


@dataclass(frozen=True)
class TwoServers:
    """The first has a shard, and a catalog; the second is empty.

    Attributes:
        url: of the catalog.
        servers: (the source, the target).
    """

    url: str
    servers: tuple[LocalServer, LocalServer]


@contextmanager
def two_servers(versions: tuple[str, str]) -> Iterator[TwoServers]:
    """A cluster of one shard, of the first version, and a spare server of the second one."""
    first, second = versions
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(shards=1, pg_bin=_BIN[first]))
        if first == second:
            other = cluster.spare("spare-1")
        else:
            other = stack.enter_context(LocalCluster(shards=1, pg_bin=_BIN[second], bootstrap=False)).servers[0]
        for server, version in ((cluster.servers[0], first), (other, second)):
            with server.connect() as conn:
                assert conn.info.server_version // 10_000 == int(version)
        yield TwoServers(cluster.url, (cluster.servers[0], other))
