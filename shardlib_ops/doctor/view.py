"""The cluster as the catalog has it at one moment: what everything else is held against."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from shardlib.catalog import Catalog
from shardlib.topology import Topology
from shardlib_ops.doctor.finding import Limits
from shardlib_ops.manager.promote.record import Promotion, PromotionStore
from shardlib_ops.reshard.job import Job
from shardlib_ops.reshard.schema.change import CHANGE, Change, decode_change
from shardlib_ops.reshard.store import JobStore

__all__ = ["View", "age_s", "read_view"]


@dataclass(frozen=True)
class View:
    """One moment.

    Attributes:
        topology: as it is stored.
        jobs: every job, oldest first.
        worked_at: job id -> when its runner last wrote how far it is, UTC in ISO 8601.
        promotions: those that are open, by shard id.
        change: the last change of all shards' tables.
        limits: from where on something is a finding.
    """

    topology: Topology
    jobs: Sequence[Job]
    worked_at: Mapping[int, str]
    promotions: Mapping[str, Promotion]
    change: Change | None
    limits: Limits

    @property
    def open_jobs(self) -> list[Job]:
        """The jobs that are not over."""
        return [job for job in self.jobs if not job.status.over]

    def jobs_of(self, shard_id: str) -> list[Job]:
        """Those of them in which a shard takes part."""
        return [job for job in self.open_jobs if shard_id in job.shards]

    def busy(self, shard_id: str) -> bool:
        """Whether somebody is changing a shard's gates now."""
        return bool(self.jobs_of(shard_id)) or shard_id in self.promotions

    @property
    def mark(self) -> object:
        """Equal for two views between which nothing has changed that the shards are held against."""
        return self.topology.version, [(job.id, job.status) for job in self.jobs], sorted(self.promotions), self.change


async def read_view(catalog: Catalog, limits: Limits) -> View:
    """The cluster now.

    Raises:
        CatalogUnavailable: no answer.
        InvalidTopology: what is stored is damaged.
    """

    def read() -> View:
        jobs, promotions = JobStore(catalog), PromotionStore(catalog)
        every = jobs.all()
        worked = {}
        for job in every:
            if not job.status.over and (progress := jobs.progress(job.id)) is not None:
                worked[job.id] = progress.at
        change = catalog.read_document(CHANGE)
        return View(
            topology=catalog.load(),
            jobs=every,
            worked_at=worked,
            promotions=promotions.open(),
            change=None if change is None else decode_change(change.data),
            limits=limits,
        )

    return await asyncio.to_thread(read)


def age_s(stamp: str | None) -> float:
    """Seconds since a time that somebody wrote down, by this machine's clock; for ever, if nobody has."""
    if not stamp:
        return float("inf")
    try:
        then = datetime.fromisoformat(stamp)
    except ValueError:
        return float("inf")
    return (datetime.now(UTC) - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
