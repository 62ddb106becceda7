"""A shard's replicas: one becomes the primary, others come and go."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from os import getpid
from typing import Final
from uuid import uuid4

import psycopg

from shardlib.catalog import Lease, publish_change
from shardlib.dsn import Dsn, scrub
from shardlib.errors import InvalidTopology, ShardUnavailable
from shardlib.topology import Shard, Topology
from shardlib_ops.manager.base import Base, refuse_busy, refuse_faults, same_server
from shardlib_ops.manager.promote import (
    Look,
    Promoter,
    Promotion,
    Rejoin,
    Stage,
    Wanted,
    add_replica,
    choose,
    look,
    reserved,
    without_replica,
)
from shardlib_ops.reshard.check import Fault

__all__ = ["Promotions", "Told"]

_LEASE_S: Final = 10.0
_LEASE_WAIT_S: Final = 1.0

Told = Callable[[str], Awaitable[None]]
"""Awaited with the name of each step when it is done."""


async def _unheard(step: str) -> None:
    """The step callback of who does not want to know."""


class Promotions(Base):
    """The calls of the manager that concern the servers of a shard."""

    async def promote_replica(
        self,
        shard: str,
        replica_endpoint: str | None = None,
        *,
        budget_s: float = 5.0,
        max_lag_bytes: int = 16 * 2**20,
        rejoin: Rejoin | None = None,
        on_step: Told | None = None,
        lease_ttl_s: float = 10.0,
    ) -> Shard:
        """Let a replica become the primary of its shard, while applications go on.

        Reads and writes of the shard wait for a fraction of a second, and then go to the new primary by themselves.
        Nothing that was committed is lost, since the replica has replayed all of it before it is promoted. When
        anything stands in the way, the shard is opened again and everything is as before.

        Args:
            shard: the shard.
            replica_endpoint: the replica's DSN, or `host:port`; None for the one that is the least behind.
            budget_s: seconds that the shard may be closed until the replica is promoted, 0.1 to 60.
            max_lag_bytes: WAL that the replica may be behind when it begins.
            rejoin: makes the old primary a replica of the new one, such as `LocalCluster.rejoin`. None leaves it fenced
                (its gates closed, its sessions read-only) and out of the topology: rebuild it, then `add_replica`.
            on_step: awaited with the name of each step when it is done.
            lease_ttl_s: seconds after which another manager may take over when this one does not answer, 2 to 120.

        Returns:
            the shard as it is now.

        Raises:
            InvalidTopology: it cannot be promoted now; the message tells everything that stands in the way. Or a
                promotion of this shard is still open: `resume_promotion`.
            InvalidArgument: a value that is not allowed.
            ShardUnavailable, CatalogUnavailable: somebody does not answer, and what was begun could not be taken back:
                `resume_promotion` when they are there again.
        """
        wanted = Wanted(budget_s=budget_s, max_lag_bytes=max_lag_bytes)
        topology = await self.topology()
        found = topology.shard(shard)
        async with self._promoting(found, lease_ttl_s) as lease:
            await self._refuse_open(found)
            seen = await self._fit(found, choose(found, replica_endpoint), wanted)
            record = await self._recorded(found, seen, lease)
            if on_step is not None:
                await on_step("recorded")
            promoter = Promoter(self._catalog, lease, record, rejoin=rejoin, step=on_step or _unheard)
            try:
                await promoter.run(budget_s=budget_s)
            finally:
                await promoter.close()
        return (await self.topology()).shard(found.id)

    async def check_promotion(
        self, shard: str, replica_endpoint: str | None = None, *, max_lag_bytes: int = 16 * 2**20
    ) -> list[Fault]:
        """What stands in the way of `promote_replica`; empty if nothing does. Nothing is changed."""
        found = (await self.topology()).shard(shard)
        wanted = Wanted(choose(found, replica_endpoint), max_lag_bytes=max_lag_bytes)
        _, faults = await look(found, wanted)
        return faults

    async def resume_promotion(
        self, shard: str, *, rejoin: Rejoin | None = None, on_step: Told | None = None
    ) -> Promotion:
        """Bring a promotion to its end whose manager is gone: forward if the replica was promoted, else back.

        Args:
            shard: the shard.
            rejoin: as for `promote_replica`.
            on_step: the same.

        Returns:
            Promotion: `done`, or `undone` with the reason; as it is, if it was over already.

        Raises:
            InvalidTopology: there was no promotion of this shard, or its manager still works on it.
            ShardUnavailable, CatalogUnavailable: who has to be asked does not answer; it stays open.
        """
        found = (await self.topology()).shard(shard)
        async with self._promoting(found) as lease:
            record = await asyncio.to_thread(self._promotions.load, found.id)
            if record is None:
                raise InvalidTopology(f"there was no promotion of shard {found.name!r}", "`promote_replica` begins one")
            if record.stage.over:
                return record
            promoter = Promoter(self._catalog, lease, record, rejoin=rejoin, step=on_step or _unheard)
            try:
                return await promoter.resume()
            finally:
                await promoter.close()

    async def get_promotion(self, shard: str) -> Promotion | None:
        """The last promotion of a shard, or None.

        Raises:
            InvalidTopology: there is no such shard.
        """
        found = (await self.topology()).shard(shard)
        return await asyncio.to_thread(self._promotions.load, found.id)

    async def add_replica(self, shard: str, endpoint: str) -> Shard:
        """Tell the cluster of a replica, after it is seen to follow the shard's primary.

        Raises:
            InvalidTopology: it is no replica of that primary, or a server of another shard, or a promotion is open.
            ShardUnavailable: it does not answer.
        """
        replica = await self._kept(Dsn(endpoint), "endpoint")
        found = (await self.topology()).shard(shard)
        async with self._promoting(found) as lease:
            await self._refuse_open(found)
            topology = await self.topology()
            for other in topology.shards:
                if any(same_server(replica, known) for known in (other.primary, *other.replicas)):
                    raise InvalidTopology(
                        f"{replica} is a server of shard {other.name!r} already", "nothing is to be done"
                    )
            try:
                return (await add_replica(self._catalog, topology, found.id, replica, lease=lease)).shard(found.id)
            except psycopg.Error as error:
                raise ShardUnavailable(found.name, scrub(str(error).strip(), replica.reveal())) from None

    async def remove_replica(self, shard: str, endpoint: str) -> Shard:
        """Take a replica off the cluster's list. The server is left as it is.

        Args:
            shard: the shard.
            endpoint: the replica's DSN, or `host:port`.

        Raises:
            InvalidTopology: it is none of the shard's replicas, or a promotion is open.
        """
        found = (await self.topology()).shard(shard)
        replica = choose(found, endpoint)
        async with self._promoting(found) as lease:
            await self._refuse_open(found)

            def change(now: Topology) -> Topology:
                return now if replica is None else without_replica(now, found.id, replica, nonce=uuid4().hex)

            return (await asyncio.to_thread(publish_change, self._catalog, change, lease=lease)).shard(found.id)

    # -- parts ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _promoting(self, shard: Shard, ttl_s: float = _LEASE_S) -> AsyncIterator[Lease]:
        lease = await asyncio.to_thread(
            self._catalog.acquire, f"promote-{shard.id}", ttl_s=ttl_s,
            holder=f"{socket.gethostname()}/{getpid()}", wait_s=_LEASE_WAIT_S,
        )  # fmt: skip
        if lease is None:
            raise InvalidTopology(
                f"another manager is at work on the servers of shard {shard.name!r}",
                f"wait for it; if it has died, its lease ends by itself, after {_LEASE_S:g} s unless it asked for more",
            )
        try:
            yield lease
        finally:
            await asyncio.to_thread(lease.release)

    async def _refuse_open(self, shard: Shard) -> None:
        record = await asyncio.to_thread(self._promotions.load, shard.id)
        if record is not None and not record.stage.over:
            raise InvalidTopology(
                f"a promotion of shard {shard.name!r} is open since {record.started_at} ({record.stage.value})",
                f"bring it to its end: `shard promote {shard.name} --resume`, or `resume_promotion`",
            )

    async def _fit(self, shard: Shard, replica: Dsn | None, wanted: Wanted) -> Look:
        topology = await self.topology()
        refuse_busy(await asyncio.to_thread(self._jobs.all), [shard], topology, moving=True)
        seen, faults = await look(shard, Wanted(replica, budget_s=wanted.budget_s, max_lag_bytes=wanted.max_lag_bytes))
        refuse_faults(faults)
        if seen is None:
            raise InvalidTopology(f"shard {shard.name!r} cannot be promoted", "`check_promotion` tells more")
        return seen

    async def _recorded(self, shard: Shard, seen: Look, lease: Lease) -> Promotion:
        """Write down what is meant, before anything is done; from here on no job takes this shard."""

        def reserve(now: Topology) -> Topology:
            return reserved(now, 2 * len(now.gates_of(shard.id)), nonce=uuid4().hex)

        topology = await asyncio.to_thread(publish_change, self._catalog, reserve, lease=lease)
        count = len(topology.gates_of(shard.id))
        first = topology.next_gate - 2 * count
        record = Promotion(
            shard=shard.id,
            name=shard.name,
            old=shard.primary,
            new=seen.new,
            others=seen.others,
            upstreams=seen.upstreams,
            forward=tuple(range(first, first + count)),
            back=tuple(range(first + count, first + 2 * count)),
            slots=seen.slots,
            synchronous=seen.synchronous,
            started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        store = self._promotions
        await asyncio.to_thread(store.save, record, lease)
        try:
            # Whoever makes a job looks for promotions after it has stored the job: one of the two sees the other.
            refuse_busy(await asyncio.to_thread(self._jobs.all), [shard], topology, moving=True)
            if topology.shard(shard.id) != shard:
                raise InvalidTopology(f"shard {shard.name!r} was changed meanwhile", "try again")
        except InvalidTopology as error:
            undone = record.changed(stage=Stage.UNDONE, error=str(error), ended_at=record.started_at)
            await asyncio.to_thread(store.save, undone, lease)
            raise
        return record
