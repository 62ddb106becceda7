"""A job whose shard was taken out of the cluster as the job was made: it ends before it has begun."""

from __future__ import annotations

from typing import Final

from shardlib.catalog import Lease
from shardlib.topology import Topology
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.job import Job, Status, Wish
from shardlib_ops.reshard.side import ShardSide

__all__ = ["end_without", "gone"]

_WHY: Final = "taken out of the cluster as the job was made; nothing has moved"


def gone(job: Job, topology: Topology) -> list[str]:
    """The ids of a job's shards that are in the cluster no longer.

    A shard that a job uses is not taken out. Whoever takes one out may have looked for jobs just before this one was
    stored: then the topology does not take the job's moves, so that it is `pending` still.
    """
    known = {shard.id for shard in topology.shards}
    return [shard_id for shard_id in job.shards if shard_id not in known]


async def end_without(job: Job, topology: Topology, lease: Lease, wish: Wish) -> Job:
    """The record of a pending job of which shards are gone, as it is to be stored; the others hold nothing of it.

    Args:
        job: as it is stored.
        topology: the present one.
        lease: the job's.
        wish: what the operator asked.

    Raises:
        Lost, Blocked: a shard does not answer, or is in the way; to be tried again.
        Superseded: another runner has the job.
    """
    lost = gone(job, topology)
    tables = tuple(table for table in topology.tables if not table.reference)
    for shard_id in job.shards:
        if shard_id in lost:
            continue
        side = ShardSide(
            job,
            Runner.of_lease(job.id, lease.token),
            topology.shard_by_id(shard_id),
            tables,
            hash_function=topology.hash_function,
            cluster_id=topology.cluster_id,
            waits=_untold,
        )
        try:
            await side.claim()
            await side.retire()
        finally:
            await side.close()
    outcome = Status.CANCELLED if wish is Wish.CANCEL else Status.FAILED
    ended = job.to(Status.CLEANUP, outcome=outcome).to(outcome)
    return ended.changed(error=None if outcome is Status.CANCELLED else f"shard {', '.join(lost)} was {_WHY}")


async def _untold(what: str | None) -> None:
    """Nobody is told who is waited for."""
