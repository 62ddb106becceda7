"""What commands show: the same, wherever it was looked up. No view holds a password."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from shardlib.topology import Shard, Topology
from shardlib_ops.manager.promote.record import Promotion
from shardlib_ops.manager.ring import share_of
from shardlib_ops.reshard.job import Job, Leg, Wish
from shardlib_ops.reshard.plan import Plan

__all__ = [
    "FaultView", "JobView", "LegView", "Party", "PlanView", "PlannedLegView", "PromotionView", "ShardView",
    "ShardsView", "job_view", "names_of", "plan_view", "promotion_view", "shard_view",
]  # fmt: skip

Names = Mapping[str, str]
"""Shard id -> name."""


class ShardView(msgspec.Struct, frozen=True, kw_only=True):
    """A shard."""

    id: str
    name: str
    state: str
    primary: str
    replicas: tuple[str, ...]
    vnode_count: int
    vnodes_owned: int
    share_of_all: float
    jobs: tuple[int, ...]


class ShardsView(msgspec.Struct, frozen=True, kw_only=True):
    """Every shard, at one version of the topology."""

    cluster_id: str
    version: int
    shards: tuple[ShardView, ...]


class Party(msgspec.Struct, frozen=True):
    """A shard that takes part in a job; without a name if it is deleted."""

    id: str
    name: str | None

    @property
    def shown(self) -> str:
        """What people know it by."""
        return self.name or self.id


class LegView(msgspec.Struct, frozen=True, kw_only=True):
    """Ranges on their way from one shard to another."""

    number: int
    source: Party
    target: Party
    ranges: int
    share_of_all: float


class PlannedLegView(LegView, frozen=True, kw_only=True):
    """The same, of a plan."""

    share_of_source: float


class PlanView(msgspec.Struct, frozen=True, kw_only=True):
    """What a job would move."""

    dry_run: bool = True
    kind: str
    legs: tuple[PlannedLegView, ...]
    in_the_way: tuple[str, ...]
    notes: tuple[str, ...]


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job. `asked` is what an operator asked of it last; None: it is over, or that is not known."""

    id: int
    kind: str
    status: str
    outcome: str | None
    asked: str | None
    paused: bool
    error: str | None
    attempts: int
    legs: tuple[LegView, ...]
    created_at: str
    started_at: str | None
    switched_at: str | None
    completed_at: str | None
    retention_s: float | None


class FaultView(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the way of a promotion, and the way out."""

    problem: str
    way_out: str


class PromotionView(msgspec.Struct, frozen=True, kw_only=True):
    """The last promotion of a shard."""

    id: str
    name: str
    stage: str
    old: str
    new: str
    pause_s: float | None
    error: str | None


def shard_view(topology: Topology, shard: Shard) -> ShardView:
    """A shard as it is in a topology."""
    owned = topology.ring.ranges_of(shard.id) if shard.id in topology.ring.shard_ids else ()
    return ShardView(
        id=shard.id,
        name=shard.name,
        state=shard.status.value,
        primary=shard.primary.safe(),
        replicas=tuple(each.safe() for each in shard.replicas),
        vnode_count=shard.vnode_count,
        vnodes_owned=topology.ring.weights().get(shard.id, 0),
        share_of_all=share_of(owned),
        jobs=tuple(sorted({move.job for move in topology.moves if shard.id in (move.source, move.target)})),
    )


def names_of(topology: Topology, new: Sequence[str] = ()) -> Names:
    """The names of the shards; those to be made get the ids that come next, in their order."""
    coming = {f"s{number}": name for number, name in enumerate(new, topology.next_shard)}
    return {**coming, **{shard.id: shard.name for shard in topology.shards}}


def job_view(job: Job, names: Names, wish: Wish | None = None) -> JobView:
    """A job, with the names of its shards and what was asked of it last."""
    return JobView(
        id=job.id,
        kind=job.kind.value,
        status=job.status.value,
        outcome=None if job.outcome is None else job.outcome.value,
        asked=None if wish is None or job.status.over else wish.value,
        paused=job.paused,
        error=job.error,
        attempts=job.attempts,
        legs=tuple(
            LegView(
                number=leg.number,
                source=_party(names, leg.source),
                target=_party(names, leg.target),
                ranges=len(leg.ranges),
                share_of_all=share_of(leg.ranges),
            )
            for leg in job.legs
        ),
        created_at=job.created_at,
        started_at=job.started_at,
        switched_at=job.switched_at,
        completed_at=job.completed_at,
        retention_s=job.retention_s,
    )


def plan_view(plan: Plan, names: Names) -> PlanView:
    """A plan; `names` has those of the shards that it would make, too."""

    def planned(leg: Leg, share_of_source: float) -> PlannedLegView:
        return PlannedLegView(
            number=leg.number,
            source=_party(names, leg.source),
            target=_party(names, leg.target),
            ranges=len(leg.ranges),
            share_of_all=share_of(leg.ranges),
            share_of_source=share_of_source,
        )

    return PlanView(
        kind=plan.kind.value,
        legs=tuple(planned(one.leg, one.share_of_source) for one in plan.legs),
        in_the_way=plan.in_the_way,
        notes=plan.notes,
    )


def promotion_view(record: Promotion) -> PromotionView:
    """A promotion's record without what only its manager needs."""
    return PromotionView(
        id=record.shard,
        name=record.name,
        stage=record.stage.value,
        old=record.old.safe(),
        new=record.new.safe(),
        pause_s=record.pause_s,
        error=record.error,
    )


def _party(names: Names, shard_id: str) -> Party:
    return Party(shard_id, names.get(shard_id))
