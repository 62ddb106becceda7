"""Jobs are planned and made: split, merge, rebalance, drain, and the moving of single keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal, overload

from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError
from shardlib.key.encode import encode_key
from shardlib.token import hash_of
from shardlib.topology import Shard
from shardlib_ops.manager.absent import absent_notes, keys_without_rows
from shardlib_ops.manager.base import refuse_busy, refuse_faults, refuse_promoting
from shardlib_ops.manager.shards import Shards
from shardlib_ops.manager.targets import Parties, Target, with_targets
from shardlib_ops.reshard.check import check_job
from shardlib_ops.reshard.job import Job, Wish
from shardlib_ops.reshard.plan import (
    Plan,
    plan_drain,
    plan_merge,
    plan_move_keys,
    plan_rebalance,
    plan_split,
)

__all__ = ["Planning"]


class Planning(Shards):
    """The calls of the manager that make a job."""

    @overload
    async def split(
        self,
        source: str,
        *,
        targets: Sequence[Target],
        keep: int | None = None,
        retention_s: float | None = None,
        dry_run: Literal[False] = False,
    ) -> Job: ...
    @overload
    async def split(
        self,
        source: str,
        *,
        targets: Sequence[Target],
        keep: int | None = None,
        retention_s: float | None = None,
        dry_run: Literal[True],
    ) -> Plan: ...
    async def split(
        self,
        source: str,
        *,
        targets: Sequence[Target],
        keep: int | None = None,
        retention_s: float | None = None,
        dry_run: bool = False,
    ) -> Job | Plan:
        """Give a part of a shard's ranges to others, new or not.

        Args:
            source: the shard that is split.
            targets: who gets a part, each by its weight (`vnode_count`).
            keep: weight of what stays on the source; None: its own `vnode_count`; 0: nothing stays.
            retention_s: seconds after the switch until the job completes by itself; None: when `complete` is called.
            dry_run: only tell the plan, and what stands in its way.

        Returns:
            Job, or Plan for a dry run.

        Raises:
            InvalidArgument: a value that is not allowed.
            InvalidTopology: a shard that is unknown, busy, or not fit.
        """

        def plan(parties: Parties) -> Plan:
            weights = {shard.id: shard.vnode_count for shard in parties.targets}
            return plan_split(parties.topology, parties.topology.shard(source), weights, keep=keep)

        return await self._begin(targets, plan, retention_s, dry_run)

    @overload
    async def merge(
        self,
        sources: Sequence[str],
        *,
        target: Target,
        retention_s: float | None = None,
        dry_run: Literal[False] = False,
    ) -> Job: ...
    @overload
    async def merge(
        self, sources: Sequence[str], *, target: Target, retention_s: float | None = None, dry_run: Literal[True]
    ) -> Plan: ...
    async def merge(
        self, sources: Sequence[str], *, target: Target, retention_s: float | None = None, dry_run: bool = False
    ) -> Job | Plan:
        """Give everything that some shards own to one; see `split` for the arguments, answer and errors."""

        def plan(parties: Parties) -> Plan:
            topology = parties.topology
            return plan_merge(topology, [topology.shard(source) for source in sources], parties.targets[0])

        return await self._begin([target], plan, retention_s, dry_run)

    @overload
    async def rebalance(
        self, *, target: Target, retention_s: float | None = None, dry_run: Literal[False] = False
    ) -> Job: ...
    @overload
    async def rebalance(self, *, target: Target, retention_s: float | None = None, dry_run: Literal[True]) -> Plan: ...
    async def rebalance(self, *, target: Target, retention_s: float | None = None, dry_run: bool = False) -> Job | Plan:
        """Give a shard that owns nothing its fair part of everything; see `split`."""
        return await self._begin(
            [target], lambda parties: plan_rebalance(parties.topology, parties.targets[0]), retention_s, dry_run
        )

    @overload
    async def drain(self, shard: str, *, retention_s: float | None = None, dry_run: Literal[False] = False) -> Job: ...
    @overload
    async def drain(self, shard: str, *, retention_s: float | None = None, dry_run: Literal[True]) -> Plan: ...
    async def drain(self, shard: str, *, retention_s: float | None = None, dry_run: bool = False) -> Job | Plan:
        """Give everything that a shard owns to the others, evenly; see `split`."""
        return await self._begin(
            [], lambda parties: plan_drain(parties.topology, parties.topology.shard(shard)), retention_s, dry_run
        )

    @overload
    async def move_keys(
        self,
        keys: Sequence[object],
        *,
        target: Target,
        retention_s: float | None = None,
        dry_run: Literal[False] = False,
    ) -> Job: ...
    @overload
    async def move_keys(
        self, keys: Sequence[object], *, target: Target, retention_s: float | None = None, dry_run: Literal[True]
    ) -> Plan: ...
    async def move_keys(
        self, keys: Sequence[object], *, target: Target, retention_s: float | None = None, dry_run: bool = False
    ) -> Job | Plan:
        """Give some keys, such as one large tenant, to a shard; see `split`.

        A key need not have rows, so that a tenant can be placed before its first one. The notes of a dry run name the
        keys that have none; see also `keys_without_rows`.

        Raises:
            InvalidShardKey: a value that cannot be a shard key.
        """
        encoded = [encode_key(key) for key in keys]

        def plan(parties: Parties) -> Plan:
            token = hash_of(parties.topology.hash_function)
            return plan_move_keys(parties.topology, [token(key) for key in encoded], parties.targets[0])

        made = await self._begin([target], plan, retention_s, dry_run)
        if not isinstance(made, Plan):
            return made
        try:
            notes = absent_notes(await self.keys_without_rows(keys))
        except ShardlibError as error:
            notes = (f"whether rows have the keys is not known: {error}",)
        return replace(made, notes=(*made.notes, *notes))

    async def keys_without_rows(self, keys: Sequence[object]) -> list[object]:
        """Those of some shard keys that no row of any sharded table has, as far as the shard that owns each tells.

        Raises:
            InvalidShardKey: a value that cannot be a shard key.
            ShardUnavailable: such a shard did not answer in time.
        """
        return await keys_without_rows(await self.topology(), {encode_key(key): key for key in keys})

    async def _begin(
        self,
        targets: Sequence[Target],
        plan: Callable[[Parties], Plan],
        retention_s: float | None,
        dry_run: bool,
    ) -> Job | Plan:
        if retention_s is not None and not 0 <= retention_s <= 365 * 86400:
            raise InvalidArgument("retention_s", retention_s, "0 seconds to a year")
        topology = await self.topology()
        parties = with_targets(topology, targets)
        planned = plan(parties)
        jobs = await asyncio.to_thread(self._jobs.all)
        shards = [parties.topology.shard(s) for leg in planned.job_legs for s in (leg.source, leg.target)]
        refuse_busy(jobs, shards, topology, moving=True)
        refuse_promoting(await asyncio.to_thread(self._promotions.open), shards)
        # Before a new shard is made for it: what is refused leaves the topology as it was.
        faults = await check_job(parties.topology, Job(id=0, kind=planned.kind, legs=planned.job_legs).checked())
        if dry_run:
            return replace(
                planned,
                in_the_way=tuple(str(fault) for fault in faults if not fault.note),
                notes=tuple(str(fault) for fault in faults if fault.note),
            )
        refuse_faults(faults)
        for at, (target, shard) in enumerate(zip(targets, parties.targets, strict=True)):
            if "shard_id" not in target:
                made = await self.create_shard(
                    shard.name,
                    primary_endpoint=shard.primary.reveal(),
                    replicas=[replica.reveal() for replica in shard.replicas],
                    vnode_count=shard.vnode_count,
                )
                if made.id != shard.id:
                    there: list[Target] = [{"shard_id": one.id} for one in (*parties.targets[:at], made)]
                    return await self._begin([*there, *targets[at + 1 :]], plan, retention_s, dry_run)
        job = Job(
            id=0,
            kind=planned.kind,
            legs=planned.job_legs,
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            retention_s=retention_s,
        ).checked()
        if any("shard_id" not in target for target in targets):
            refuse_faults(await check_job(await self.topology(), job))
        job = await asyncio.to_thread(self._jobs.create, job)
        try:
            await self._refuse_overtaken(job, shards)
        except InvalidTopology:
            await asyncio.to_thread(self._jobs.ask, job.id, Wish.CANCEL)
            raise
        return job

    async def _refuse_overtaken(self, job: Job, shards: Sequence[Shard]) -> None:
        """What was looked at before the job was stored is still so.

        Whoever stores a job or a promotion looks for the others after it: one of the two sees the other. A job is
        stored under the number after the last, so of two jobs the later one sees the earlier, and is withdrawn.
        """
        earlier = [other for other in await asyncio.to_thread(self._jobs.all) if other.id < job.id]
        topology = await self.topology()
        for shard in shards:
            topology.shard(shard.id)  # it is there still
        refuse_busy(earlier, shards, topology, moving=True)
        refuse_promoting(await asyncio.to_thread(self._promotions.open), shards)
        for leg in job.legs:
            source, target = topology.shard_by_id(leg.source), topology.shard_by_id(leg.target)
            if not all(topology.ring.owns(source.id, part) for part in leg.ranges):
                raise InvalidTopology(
                    f"ranges that shard {source.name!r} was to give to {target.name!r} were moved meanwhile",
                    "try again",
                )
