"""What the manager's calls answer. Endpoints are shown without passwords."""

from __future__ import annotations

import hashlib
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from shardlib.ring.ranges import TOKEN_COUNT
from shardlib.topology import Shard, Topology
from shardlib_ops.reshard.job import Job, Leg, Status, Wish
from shardlib_ops.reshard.plan import Plan
from shardlib_ops.reshard.progress.model import JobProgress

__all__ = [
    "JobAnswer", "JobPage", "LegAnswer", "PlanAnswer", "ProblemAnswer", "ProgressAnswer", "PromotionAnswer",
    "RingAnswer", "ShardAnswer", "ShardPage", "job_answer", "plan_answer", "shard_answer", "tag_of",
]  # fmt: skip

_SERVED_BY_TARGETS: Final = frozenset({Status.VALIDATION, Status.COMPLETED})


class Answer(BaseModel):
    """What every answer is."""

    model_config = ConfigDict(frozen=True)


class ShardAnswer(Answer):
    """A shard."""

    id: str = Field(examples=["s4"])
    name: str = Field(examples=["shard-04"])
    status: str = Field(description="`active`, `migrating`, `readonly` or `inactive`", examples=["active"])
    primary_endpoint: str = Field(
        description="of its primary, without the password", examples=["postgresql://shop@db-4:5432/shop"]
    )
    replicas: list[str] = Field(description="of its replicas, without passwords")
    vnode_count: int = Field(description="its weight when ranges are dealt", examples=[256])
    vnodes_owned: int = Field(description="virtual nodes that it owns now")
    share_of_all: float = Field(description="part of all tokens that it owns, 0 to 1")
    jobs: list[int] = Field(description="numbers of the jobs that move rows from it or to it now")


class ShardPage(Answer):
    """Shards in the order in which they were made."""

    items: list[ShardAnswer]
    next_cursor: str | None = Field(description="give it as `cursor` for what comes next; null at the end")
    topology_version: int
    cluster_id: str


class Party(Answer):
    """A shard that takes part in a job."""

    id: str
    name: str | None = Field(description="null for a shard that is deleted")


class LegAnswer(Answer):
    """Ranges on their way from one shard to another."""

    number: int
    source: Party
    target: Party
    ranges: int = Field(description="how many")
    share_of_all: float = Field(description="part of all tokens, 0 to 1")


class JobAnswer(Answer):
    """A resharding job."""

    id: int = Field(examples=[7])
    type: str = Field(description="`split`, `merge`, `rebalance`, `drain` or `move_keys`", examples=["split"])
    source_shards: list[str] = Field(description="ids of the shards that rows leave")
    target_shards: list[str] = Field(description="ids of the shards that rows arrive at")
    status: str = Field(
        description="`pending`, `precopy`, `deltasync`, `cutover`, `validation`, `cleanup`, `completed`, `failed`, "
        "`cancelled` or `rolled_back`",
        examples=["deltasync"],
    )
    outcome: str | None = Field(description="what it will be after `cleanup`, once that is decided")
    asked: str | None = Field(description="what was asked of it last (`run` if nothing); null when it is over")
    paused: bool
    progress: float = Field(description="of the whole job, 0 to 1")
    activity: str = Field(description="what its runner is at: `copy`, `stream`, `compare`, ...; or empty")
    keys_migrated: int | None = Field(
        description="distinct keys whose rows are at the targets: by the share of copied rows while they are copied; "
        "null while keys are not counted"
    )
    total_keys: int | None = Field(description="distinct keys that move; null until all are found")
    attempts: int = Field(description="attempts of cutover so far")
    waiting: list[str] = Field(description="what stands in the way of the switch")
    warnings: list[str]
    legs: list[LegAnswer]
    retention_s: float | None
    created_at: str
    started_at: str | None
    switched_at: str | None
    completed_at: str | None
    error_message: str | None = Field(description="what made it fail, or what it waits for")


class JobPage(Answer):
    """Jobs, oldest first."""

    items: list[JobAnswer]
    next_cursor: str | None = Field(description="give it as `cursor` for what comes next; null at the end")


class PlannedLegAnswer(LegAnswer):
    """Ranges that a job would move."""

    share_of_source: float = Field(description="part of the source's tokens, 0 to 1")


class PlanAnswer(Answer):
    """What a job would do, of a dry run."""

    dry_run: bool = True
    type: str
    legs: list[PlannedLegAnswer]
    in_the_way: list[str] = Field(description="what has to be mended first")
    notes: list[str] = Field(description="what is good to know")


class RingShareAnswer(Answer):
    """What one shard owns."""

    id: str
    name: str
    vnode_count: int
    vnodes_owned: int
    share_of_all: float = Field(description="part of all tokens, 0 to 1")
    ranges: list[tuple[str, str]] = Field(description="first and last token of each, in 16 hexadecimal digits")


class GateAnswer(Answer):
    """A gate of a shard."""

    number: int
    shard: str = Field(description="id of its shard")
    ranges: int = Field(description="how many of its own; 0: it is for everything else that the shard owns")
    share_of_all: float | None


class MoveAnswer(Answer):
    """Ranges on their way."""

    job: int
    source: str
    target: str
    state: str = Field(description="`copying`, or `switched`: the target serves them")
    ranges: int
    share_of_all: float


class RingAnswer(Answer):
    """The ring at one version of the topology."""

    cluster_id: str
    version: int
    hash_function: str
    virtual_nodes: int
    shards: list[RingShareAnswer]
    gates: list[GateAnswer]
    moves: list[MoveAnswer]


class PromotionAnswer(Answer):
    """The last promotion of a shard."""

    id: str
    name: str
    stage: str = Field(description="`prepared`, `closing`, `promoting`, `switched`, `done` or `undone`")
    old: str = Field(description="the primary that steps down, without its password")
    new: str = Field(description="the replica that takes over, without its password")
    pause_s: float | None = Field(description="seconds that the shard was closed")
    error: str | None = Field(description="why it came to nothing, or what is left to do by hand")


class ProgressAnswer(Answer):
    """How far a job is."""

    progress: dict[str, Any] | None = Field(
        description="`tables`, `streams`, `waiting`, `warnings` and more; null while no runner has told"
    )


class Fault(Answer):
    """A value that is not valid."""

    model_config = ConfigDict(populate_by_name=True)

    where: str = Field(alias="in", description="such as `body.vnode_count`")
    message: str


class ProblemAnswer(Answer):
    """An error (RFC 9457)."""

    type: str = Field(examples=["urn:shardlib:problem:conflict"])
    title: str
    status: int
    detail: str
    instance: str | None = Field(default=None, description="names the request; its id is also in `X-Request-Id`")
    errors: list[Fault] = Field(default=[], description="of a request that is not valid: each fault that was found")
    error_id: str | None = Field(default=None, description="by which the server's log tells of the same error")


def shard_answer(topology: Topology, shard: Shard) -> ShardAnswer:
    """A shard as it is in a topology."""
    owned = topology.ring.ranges_of(shard.id) if shard.id in topology.ring.shard_ids else ()
    return ShardAnswer(
        id=shard.id,
        name=shard.name,
        status=shard.status.value,
        primary_endpoint=shard.primary.safe(),
        replicas=[each.safe() for each in shard.replicas],
        vnode_count=shard.vnode_count,
        vnodes_owned=topology.ring.weights().get(shard.id, 0),
        share_of_all=sum(one.last - one.first + 1 for one in owned) / TOKEN_COUNT,
        jobs=sorted({move.job for move in topology.moves if shard.id in (move.source, move.target)}),
    )


def job_answer(topology: Topology, job: Job, wish: Wish = Wish.RUN, progress: JobProgress | None = None) -> JobAnswer:
    """A job, with what was asked of it and how far its runner says that it is."""
    return JobAnswer(
        id=job.id,
        type=job.kind.value,
        source_shards=list(job.sources),
        target_shards=list(job.targets),
        status=job.status.value,
        outcome=None if job.outcome is None else job.outcome.value,
        asked=None if job.status.over else wish.value,
        paused=job.paused,
        progress=_fraction(job, progress),
        activity="" if progress is None or job.status.over else progress.activity,
        keys_migrated=_migrated(job, progress),
        total_keys=progress.keys if progress is not None and progress.keys_exact else None,
        attempts=job.attempts,
        waiting=[] if progress is None or job.status.over else [each.text for each in progress.waiting],
        warnings=[] if progress is None else list(progress.warnings),
        legs=[_leg(topology, leg) for leg in job.legs],
        retention_s=job.retention_s,
        created_at=job.created_at,
        started_at=job.started_at,
        switched_at=job.switched_at,
        completed_at=job.completed_at,
        error_message=job.error,
    )


def plan_answer(topology: Topology, plan: Plan, names: dict[str, str]) -> PlanAnswer:
    """A plan; `names` are those of the shards that it would make, by the ids that they would get."""
    return PlanAnswer(
        type=plan.kind.value,
        legs=[
            PlannedLegAnswer(**dict(_leg(topology, one.leg, names)), share_of_source=one.share_of_source)
            for one in plan.legs
        ],
        in_the_way=list(plan.in_the_way),
        notes=list(plan.notes),
    )


def tag_of(content: BaseModel | Any) -> str:
    """The entity tag of an answer: another one as soon as anything in it is different."""
    data = content.model_dump_json() if isinstance(content, BaseModel) else str(content)
    return f'"{hashlib.sha256(data.encode()).hexdigest()[:24]}"'


def _leg(topology: Topology, leg: Leg, names: dict[str, str] | None = None) -> LegAnswer:
    known = {**(names or {}), **{shard.id: shard.name for shard in topology.shards}}
    return LegAnswer(
        number=leg.number,
        source=Party(id=leg.source, name=known.get(leg.source)),
        target=Party(id=leg.target, name=known.get(leg.target)),
        ranges=len(leg.ranges),
        share_of_all=sum(one.last - one.first + 1 for one in leg.ranges) / TOKEN_COUNT,
    )


def _fraction(job: Job, progress: JobProgress | None) -> float:
    if job.status is Status.COMPLETED:
        return 1.0
    return 0.0 if progress is None else min(1.0, max(0.0, progress.fraction))


def _migrated(job: Job, progress: JobProgress | None) -> int | None:
    if progress is None or progress.keys is None:
        return None
    if job.status in (Status.CANCELLED, Status.ROLLED_BACK):
        return 0
    if job.status in _SERVED_BY_TARGETS:
        return progress.keys
    total = sum(one.rows_total or 0 for one in progress.tables)
    if not total:
        return progress.keys if progress.tables and all(one.done for one in progress.tables) else 0
    return min(progress.keys, int(progress.keys * sum(one.rows for one in progress.tables) / total))
