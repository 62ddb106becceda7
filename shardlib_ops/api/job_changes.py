"""Changes that make a job or steer one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology, ShardlibError
from shardlib.key.encode import encode_key
from shardlib.token import hash_of
from shardlib.topology import Topology
from shardlib_ops.api.answers import plan_answer
from shardlib_ops.api.change import Done
from shardlib_ops.api.cluster import Cluster
from shardlib_ops.api.models import (
    DrainBody,
    ExistingTarget,
    MergeBody,
    MoveKeysBody,
    NewTarget,
    RebalanceBody,
    ReshardBody,
    SplitBody,
    Steps,
)
from shardlib_ops.api.shard_changes import made_since
from shardlib_ops.manager.absent import absent_notes
from shardlib_ops.manager.manager import Target
from shardlib_ops.reshard.job import Job, Kind, Wish
from shardlib_ops.reshard.plan import Plan
from shardlib_ops.serving.problem import problem, public_text

__all__ = ["MakeJob", "SteerJob"]

_WISHES: Final[Mapping[str, Wish]] = {
    "pause": Wish.PAUSE,
    "resume": Wish.RUN,
    "cancel": Wish.CANCEL,
    "rollback": Wish.ROLLBACK,
    "complete": Wish.COMPLETE,
}
_SHOWN: Final = 20


class MakeJob:
    """`POST /reshard/split` and the other calls that make a job.

    Args:
        cluster: what it works on.
        body: which job.
    """

    def __init__(self, cluster: Cluster, body: ReshardBody) -> None:
        self._cluster, self._body = cluster, body
        self._kind, self._sources, self._places = _parts(body)
        self._targets: list[Target] = [each.as_target() for _, each in self._places]
        self.action = f"reshard.{self._kind.value}" + (".plan" if body.dry_run else "")
        names = [str(target.get("shard_id") or target.get("name")) for target in self._targets]
        keys = body.keys if isinstance(body, MoveKeysBody) else []
        self.target = ", ".join([*self._sources, *map(str, keys[:_SHOWN])][:_SHOWN]) or ", ".join(names[:_SHOWN])
        self.details: Mapping[str, object] = {
            "targets": ", ".join(names),
            "endpoints": ", ".join(
                Dsn(each.primary_endpoint.get_secret_value()).safe()
                for _, each in self._places
                if isinstance(each, NewTarget)
            ),
            "retention_s": body.retention_s,
            "keys": len(keys),
        }

    async def check(self) -> None:
        """See `Change.check`."""
        await self._cluster.check_endpoints(
            [(f"{place}.{field}", text) for place, target in self._places for field, text in target.endpoints()]
        )

    async def before(self) -> dict[str, Any]:
        """See `Change.before`."""
        jobs = await self._cluster.manager.list_jobs()
        return {
            "last_job": max((job.id for job in jobs), default=0),
            "next_shard": (await self._cluster.manager.topology()).next_shard,
        }

    async def apply(self) -> Done:
        """See `Change.apply`."""
        made = await self._make(self._targets)
        if isinstance(made, Job):
            return await self._made(made, await self._without_rows())
        topology = await self._cluster.manager.topology()
        new = [target["name"] for target in self._targets if "shard_id" not in target]
        names = {f"s{number}": name for number, name in enumerate(new, topology.next_shard)}
        return Done(200, plan_answer(topology, made, names), told={"legs": len(made.legs)})

    async def settle(self, before: Mapping[str, Any]) -> Done | None:
        """The first job since then that moves the same from the same shards to the same; else it is made.

        Shards that were made for a job that was not stored are taken as they are.
        """
        if self._body.dry_run:
            return None
        topology = await self._cluster.manager.topology()
        for number, target in enumerate(self._targets):
            if "shard_id" not in target:
                made = made_since(topology, before["next_shard"], target["name"], target["primary_endpoint"])
                if made is not None:
                    self._targets[number] = {"shard_id": made.id}
        for job in await self._cluster.manager.list_jobs():
            if job.id > before["last_job"] and self._is(job, topology):
                return await self._made(job)
        return None

    def _is(self, job: Job, topology: Topology) -> bool:
        if job.kind is not self._kind:
            return False
        try:
            sources = {topology.shard(source).id for source in self._sources}
            targets = {topology.shard(target["shard_id"]).id for target in self._targets if "shard_id" in target}
        except InvalidTopology:
            return False
        if len(targets) != len(self._targets) or (sources and sources != set(job.sources)):
            return False
        if targets and targets != set(job.targets):
            return False
        if not isinstance(self._body, MoveKeysBody):
            return True
        token = hash_of(topology.hash_function)
        tokens = {token(encode_key(key)) for key in self._body.keys}
        moved = [part for leg in job.legs for part in leg.ranges]
        return any(part.first <= each <= part.last for each in tokens for part in moved)

    async def _make(self, targets: Sequence[Target]) -> Job | Plan:
        manager, body = self._cluster.manager, self._body
        more: dict[str, Any] = {"retention_s": body.retention_s, "dry_run": body.dry_run}
        made: Job | Plan
        match body:
            case SplitBody():
                made = await manager.split(body.source_shard_id, targets=targets, keep=body.keep, **more)
            case MergeBody():
                made = await manager.merge(body.source_shard_ids, target=targets[0], **more)
            case RebalanceBody():
                made = await manager.rebalance(target=targets[0], **more)
            case DrainBody():
                made = await manager.drain(body.source_shard_id, **more)
            case MoveKeysBody():
                made = await manager.move_keys(body.keys, target=targets[0], **more)
            case _:
                raise TypeError(type(body).__name__)
        return made

    async def _without_rows(self) -> list[str]:
        """Warnings of keys that no row has: they are moved, and may be mistyped."""
        if not isinstance(self._body, MoveKeysBody):
            return []
        try:
            return list(absent_notes(await self._cluster.manager.keys_without_rows(self._body.keys)))
        except ShardlibError as error:
            return [public_text(f"whether rows have the keys is not known: {error}")]

    async def _made(self, job: Job, warnings: Sequence[str] = ()) -> Done:
        answer = await self._cluster.job(job)
        if warnings:
            answer = answer.model_copy(update={"warnings": [*answer.warnings, *warnings]})
        return Done(202, answer, path=f"/reshard/jobs/{job.id}", told={"job": job.id})


def _parts(body: ReshardBody) -> tuple[Kind, list[str], list[tuple[str, NewTarget | ExistingTarget]]]:
    """The kind of job, its sources as they are named, and its targets with their places in the body."""
    if isinstance(body, SplitBody):
        targets = [(f"target_shards.{number}", each) for number, each in enumerate(body.target_shards)]
        return Kind.SPLIT, [body.source_shard_id], targets
    if isinstance(body, MergeBody):
        return Kind.MERGE, list(body.source_shard_ids), [("target_shard", body.target_shard)]
    if isinstance(body, RebalanceBody):
        return Kind.REBALANCE, [], [("target_shard", body.target_shard)]
    if isinstance(body, DrainBody):
        return Kind.DRAIN, [body.source_shard_id], []
    if isinstance(body, MoveKeysBody):
        return Kind.MOVE_KEYS, [], [("target_shard", body.target_shard)]
    raise TypeError(type(body).__name__)


class SteerJob:
    """`POST /reshard/jobs/{id}/pause` and the other steps.

    Args:
        cluster: what it works on.
        job_id: number of the job.
        step: what is asked of it.
    """

    def __init__(self, cluster: Cluster, job_id: int, step: Steps) -> None:
        self._cluster, self._job_id, self._step = cluster, job_id, step
        self.action, self.target = f"job.{step}", f"job {job_id}"
        self.details: Mapping[str, object] = {}

    async def check(self) -> None:
        """Nothing is named that could lead anywhere."""

    async def before(self) -> dict[str, Any]:
        """See `Change.before`."""
        return {"revision": (await self._cluster.wish(self._job_id))[1]}

    async def apply(self) -> Done:
        """See `Change.apply`."""
        manager = self._cluster.manager
        steps: Mapping[str, Callable[[int], Awaitable[Job]]] = {
            "pause": manager.pause,
            "resume": manager.resume,
            "cancel": manager.cancel,
            "rollback": manager.rollback,
            "complete": manager.complete,
        }
        job = await steps[self._step](self._job_id)
        return Done(200, await self._cluster.job(job), told={"status": job.status.value})

    async def settle(self, before: Mapping[str, Any]) -> Done | None:
        """It was asked, unless nothing was asked since; what others have asked after it is not overridden."""
        wish, revision = await self._cluster.wish(self._job_id)
        if revision == before["revision"]:
            return None
        wanted = _WISHES[self._step]
        if wish is wanted or (wanted is Wish.RUN and wish is not Wish.PAUSE):
            return Done(200, await self._cluster.job(await self._cluster.manager.get_job(self._job_id)))
        raise problem(
            "conflict",
            f"the request was interrupted, and job {self._job_id} was asked to {wish.value} since; look at it, and ask "
            "again with a new Idempotency-Key",
        )
