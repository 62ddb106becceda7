"""What every part of the manager stands on: the catalog, and the jobs in it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from shardlib.catalog import Catalog, open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.topology import Shard, Topology
from shardlib_ops.manager.passwords import PlainPasswords, kept
from shardlib_ops.manager.passwords import plain_passwords as plain_rule
from shardlib_ops.manager.promote.record import Promotion, PromotionStore
from shardlib_ops.reshard.check import Fault
from shardlib_ops.reshard.job import Job
from shardlib_ops.reshard.store import JobStore

__all__ = ["CONNECT_S", "Base", "refuse_busy", "refuse_faults", "refuse_promoting", "same_server"]

CONNECT_S: Final = 10
"""Limit for a connection to a shard, in seconds."""


class Base:
    """The catalog of one cluster.

    Args:
        url: the catalog, such as `etcd://127.0.0.1:2379/shop`.
        timeout_s: limit for one answer of the catalog, in seconds.
        plain_passwords: as for `Manager`.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0, plain_passwords: PlainPasswords | None = None) -> None:
        self._plain_passwords = plain_rule(plain_passwords)
        self._catalog: Catalog = open_catalog(url, timeout_s=timeout_s)
        self._jobs = JobStore(self._catalog)
        self._promotions = PromotionStore(self._catalog)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the catalog; idempotent."""
        await asyncio.to_thread(self._catalog.close)

    async def _kept(self, dsn: Dsn, place: str) -> Dsn:
        """An endpoint that somebody named, as the catalog is to hold it."""
        return await asyncio.to_thread(kept, dsn, self._plain_passwords, place)

    async def topology(self) -> Topology:
        """The topology as it is now.

        Raises:
            CatalogUnavailable: no answer.
        """
        return await asyncio.to_thread(self._catalog.load)


def same_server(one: Dsn, other: Dsn) -> bool:
    """Whether two DSNs lead to one database, as far as their texts tell."""
    return (one.host, one.port, one.dbname) == (other.host, other.port, other.dbname)


def refuse_busy(jobs: Sequence[Job], shards: Sequence[Shard], topology: Topology, *, moving: bool = False) -> None:
    """No job that is not over works on any of these; and what is not moving owns nothing."""
    for job in jobs:
        for shard in shards:
            if not job.status.over and shard.id in job.shards:
                raise InvalidTopology(
                    f"shard {shard.name!r} takes part in job {job.id}, which is {job.status.value!r}",
                    "wait for it, complete it, cancel it or roll it back",
                )
    for shard in () if moving else shards:
        if shard.id in topology.ring.shard_ids:
            raise InvalidTopology(f"shard {shard.name!r} owns ranges", "drain it first")


def refuse_promoting(promotions: Mapping[str, Promotion], shards: Sequence[Shard]) -> None:
    """The primary of none of these is about to change."""
    for shard in shards:
        if shard.id in promotions:
            raise InvalidTopology(
                f"a promotion of shard {shard.name!r} is under way",
                f"wait for it; if its manager is gone, `shard promote {shard.name} --resume`",
            )


def refuse_faults(faults: Sequence[Fault]) -> None:
    """Everything that stands in the way, in one error."""
    if found := [fault for fault in faults if not fault.note]:
        raise InvalidTopology(
            "; ".join(f"{fault.where}: {fault.problem}" for fault in found),
            "; ".join(dict.fromkeys(fault.way_out for fault in found)),
        )
