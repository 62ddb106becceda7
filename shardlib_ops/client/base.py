"""The calls that commands make: one contract, for the catalog and for a manager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from shardlib_ops.client.views import (
    FaultView,
    JobView,
    PlanView,
    PromotionView,
    ShardsView,
    ShardView,
)
from shardlib_ops.manager.promote import Rejoin
from shardlib_ops.manager.promotions import Told
from shardlib_ops.manager.ring import RingView
from shardlib_ops.reshard.progress.model import JobProgress

__all__ = ["Begun", "Client", "Told"]


class Begun(NamedTuple):
    """A job that was made, and what its operator should know of it."""

    job: JobView
    notes: tuple[str, ...]


class Client(Protocol):
    """A cluster, as commands see it. Arguments, effects and errors are those of the `Manager`'s methods.

    Whoever has made it closes it.
    """

    look_s: float
    """Seconds between two looks at a job that is followed."""

    async def close(self) -> None:
        """Close what was opened; idempotent."""
        ...

    async def shards(self) -> ShardsView:
        """Every shard, in the order in which they were made."""
        ...

    async def shard(self, shard: str) -> ShardView:
        """One shard, by its name or id."""
        ...

    async def ring(self) -> RingView:
        """Who owns how much, which gates there are, and what is moving."""
        ...

    async def create_shard(
        self, name: str, *, primary_endpoint: str, replicas: Sequence[str], vnode_count: int
    ) -> ShardView:
        """See `Manager.create_shard`."""
        ...

    async def delete_shard(self, shard: str) -> None:
        """See `Manager.delete_shard`."""
        ...

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
        """See `Manager.promote_replica`."""
        ...

    async def check_promotion(self, shard: str, replica: str | None, *, max_lag_bytes: int) -> list[FaultView]:
        """See `Manager.check_promotion`."""
        ...

    async def resume_promotion(self, shard: str, *, rejoin: Rejoin | None, on_step: Told | None) -> PromotionView:
        """See `Manager.resume_promotion`."""
        ...

    async def add_replica(self, shard: str, endpoint: str) -> ShardView:
        """See `Manager.add_replica`."""
        ...

    async def remove_replica(self, shard: str, endpoint: str) -> ShardView:
        """See `Manager.remove_replica`."""
        ...

    async def plan(self, kind: str, arguments: Mapping[str, Any]) -> PlanView:
        """What the method `kind` of the `Manager` would move."""
        ...

    async def begin(self, kind: str, arguments: Mapping[str, Any]) -> Begun:
        """Make a job by the method `kind` of the `Manager`."""
        ...

    async def jobs(self) -> list[JobView]:
        """Every job, oldest first."""
        ...

    async def job(self, job_id: int) -> JobView:
        """One job."""
        ...

    async def progress(self, job_id: int) -> JobProgress | None:
        """How far a job was when its runner wrote that down last; None if none has."""
        ...

    async def steer(self, job_id: int, verb: str) -> JobView:
        """The method `verb` of the `Manager`: `pause`, `resume`, `cancel`, `rollback` or `complete`."""
        ...
