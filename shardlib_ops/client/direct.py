"""The cluster by its catalog: the `Manager` in this process, and an entry of the audit log around each change."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import ShardlibError
from shardlib_ops.audit import Actor, Attempt, Audit, open_audit
from shardlib_ops.client.base import Begun, Told
from shardlib_ops.client.views import (
    FaultView,
    JobView,
    PlanView,
    PromotionView,
    ShardsView,
    ShardView,
    job_view,
    names_of,
    plan_view,
    promotion_view,
    shard_view,
)
from shardlib_ops.manager.absent import absent_notes
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.promote import Rejoin
from shardlib_ops.manager.ring import RingView, ring_view
from shardlib_ops.reshard.job import Job, Wish
from shardlib_ops.reshard.progress.model import JobProgress
from shardlib_ops.reshard.store import JobStore

__all__ = ["DirectClient", "os_user"]

_KEYS_SHOWN: Final = 20


def os_user() -> str:
    """The user that this process runs as, by the operating system; variables of the environment do not count."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"


class DirectClient:
    """See `Client`. Changes are written to the audit log before they are made, and what came of them after it.

    Args:
        catalog: URL of the catalog.
        audit: URL of the audit log, see `open_audit`.
        timeout_s: limit for one answer of the catalog, in seconds.

    Raises:
        InvalidArgument: one of the URLs is none.
    """

    look_s = 0.5

    def __init__(self, catalog: str, *, audit: str = "catalog:", timeout_s: float = 5.0) -> None:
        self._manager = Manager(catalog, timeout_s=timeout_s)
        self._catalog = open_catalog(catalog, timeout_s=timeout_s)
        self._store = JobStore(self._catalog)
        self._audit = Audit(open_audit(audit, self._catalog))
        self._actor = Actor(subject=os_user(), via="cli")

    async def close(self) -> None:
        """See `Client`."""
        await self._audit.close()
        await self._manager.close()
        await asyncio.to_thread(self._catalog.close)

    def _attempt(self, action: str, target: str, **details: object) -> AbstractAsyncContextManager[Attempt]:
        return self._audit.attempt(self._actor, action, target, details)

    # -- shards ---------------------------------------------------------------------------------------------------

    async def shards(self) -> ShardsView:
        """See `Client`."""
        topology = await self._manager.topology()
        return ShardsView(
            cluster_id=topology.cluster_id,
            version=topology.version,
            shards=tuple(shard_view(topology, shard) for shard in topology.shards),
        )

    async def shard(self, shard: str) -> ShardView:
        """See `Client`."""
        topology = await self._manager.topology()
        return shard_view(topology, topology.shard(shard))

    async def ring(self) -> RingView:
        """See `Client`."""
        return ring_view(await self._manager.topology())

    async def create_shard(
        self, name: str, *, primary_endpoint: str, replicas: Sequence[str], vnode_count: int
    ) -> ShardView:
        """See `Client`."""
        shown = ", ".join(Dsn(each).safe() for each in replicas)
        details: dict[str, object] = {"replicas": shown, "vnode_count": vnode_count}
        async with self._attempt("shard.create", name, primary_endpoint=Dsn(primary_endpoint), **details) as attempt:
            made = await self._manager.create_shard(
                name, primary_endpoint=primary_endpoint, replicas=replicas, vnode_count=vnode_count
            )
            attempt.result(shard_id=made.id)
        return await self.shard(made.id)

    async def delete_shard(self, shard: str) -> None:
        """See `Client`."""
        async with self._attempt("shard.delete", shard):
            await self._manager.delete_shard(shard)

    async def promote(
        self,
        shard: str,
        replica: str | None,
        *,
        budget_s: float,
        max_lag_bytes: int,
        rejoin: Rejoin | None,
        on_step: Told | None,
    ) -> PromotionView | None:
        """See `Client`."""
        details = {"replica_endpoint": _server(replica), "budget_s": budget_s, "max_lag_bytes": max_lag_bytes}
        async with self._attempt("shard.promote", shard, **details) as attempt:
            promoted = await self._manager.promote_replica(
                shard, replica, budget_s=budget_s, max_lag_bytes=max_lag_bytes, rejoin=rejoin, on_step=on_step
            )
            attempt.result(shard_id=promoted.id, primary_endpoint=promoted.primary)
        record = await self._manager.get_promotion(promoted.id)
        return None if record is None else promotion_view(record)

    async def check_promotion(self, shard: str, replica: str | None, *, max_lag_bytes: int) -> list[FaultView]:
        """See `Client`."""
        faults = await self._manager.check_promotion(shard, replica, max_lag_bytes=max_lag_bytes)
        return [FaultView(problem=one.problem, way_out=one.way_out) for one in faults]

    async def resume_promotion(self, shard: str, *, rejoin: Rejoin | None, on_step: Told | None) -> PromotionView:
        """See `Client`."""
        async with self._attempt("shard.promote.resume", shard) as attempt:
            record = await self._manager.resume_promotion(shard, rejoin=rejoin, on_step=on_step)
            attempt.result(shard_id=record.shard, stage=record.stage.value)
        return promotion_view(record)

    async def add_replica(self, shard: str, endpoint: str) -> ShardView:
        """See `Client`."""
        async with self._attempt("shard.add_replica", shard, endpoint=Dsn(endpoint)):
            found = await self._manager.add_replica(shard, endpoint)
        return await self.shard(found.id)

    async def remove_replica(self, shard: str, endpoint: str) -> ShardView:
        """See `Client`."""
        async with self._attempt("shard.remove_replica", shard, endpoint=_server(endpoint)):
            found = await self._manager.remove_replica(shard, endpoint)
        return await self.shard(found.id)

    # -- jobs -----------------------------------------------------------------------------------------------------

    async def plan(self, kind: str, arguments: Mapping[str, Any]) -> PlanView:
        """See `Client`."""
        new = [target["name"] for target in _targets(arguments) if "name" in target]
        names = names_of(await self._manager.topology(), new)
        return plan_view(await getattr(self._manager, kind)(**arguments, dry_run=True), names)

    async def begin(self, kind: str, arguments: Mapping[str, Any]) -> Begun:
        """See `Client`."""
        target, details = _told(arguments)
        async with self._attempt(f"reshard.{kind}", target, **details) as attempt:
            job: Job = await getattr(self._manager, kind)(**arguments)
            attempt.result(job=job.id)
        notes: tuple[str, ...] = ()
        if kind == "move_keys":
            try:
                notes = absent_notes(await self._manager.keys_without_rows(arguments["keys"]))
            except ShardlibError as error:
                notes = (f"whether rows have the keys is not known: {error}",)
        return Begun(await self.job(job.id), notes)

    async def jobs(self) -> list[JobView]:
        """See `Client`."""
        names = names_of(await self._manager.topology())
        return [job_view(job, names, await self._wish(job)) for job in await self._manager.list_jobs()]

    async def job(self, job_id: int) -> JobView:
        """See `Client`."""
        job = await self._manager.get_job(job_id)
        return job_view(job, names_of(await self._manager.topology()), await self._wish(job))

    async def progress(self, job_id: int) -> JobProgress | None:
        """See `Client`."""
        return await asyncio.to_thread(self._store.progress, job_id)

    async def steer(self, job_id: int, verb: str) -> JobView:
        """See `Client`."""
        async with self._attempt(f"job.{verb}", f"job {job_id}") as attempt:
            job: Job = await getattr(self._manager, verb)(job_id)
            attempt.result(status=job.status.value)
        return await self.job(job_id)

    async def _wish(self, job: Job) -> Wish | None:
        return None if job.status.over else await asyncio.to_thread(self._store.wish, job.id)


def _server(text: str | None) -> str:
    """A server as the audit log may show it: `host:port`, or a DSN without its password."""
    if text is None:
        return "the least behind"
    return Dsn(text).safe() if "://" in text or "=" in text else text


def _targets(arguments: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(arguments.get("targets") or [one for one in [arguments.get("target")] if one])


def _told(arguments: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
    """On what a job is asked for, and the details, as they stand in the audit log of a manager."""
    targets = _targets(arguments)
    names = [str(target.get("shard_id") or target.get("name")) for target in targets]
    keys = list(arguments.get("keys") or ())
    one = arguments.get("source") or arguments.get("shard")
    sources = [str(one)] if one else [str(each) for each in arguments.get("sources") or ()]
    details: dict[str, object] = {
        "targets": ", ".join(names),
        "endpoints": ", ".join(
            Dsn(target["primary_endpoint"]).safe() for target in targets if "primary_endpoint" in target
        ),
        "retention_s": arguments.get("retention_s"),
        "keys": len(keys),
    }
    return ", ".join([*sources, *map(str, keys)][:_KEYS_SHOWN]) or ", ".join(names), details
