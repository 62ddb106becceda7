"""A job whose shard was taken out of the cluster as the job was made: it ends before it has begun."""

from __future__ import annotations

from typing import Final

from shardlib.catalog import Lease
from shardlib.topology import Topology
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.job import Job, Status, Wish
from shardlib_ops.reshard.side import ShardSide
from shardlib_ops.reshard.world import Blocked, Lost

__all__ = ["end_without", "gone"]

_WHY: Final = "was taken out of the cluster as the job was made; nothing has moved"


def gone(job: Job, topology: Topology) -> list[str]:
    """The ids of a job's shards that are in the cluster no longer.

    A shard that a job uses is not taken out. Whoever takes one out may have looked for jobs just before this one was
    stored: then the topology does not take the job's moves, so that it is `pending` still.
    """
    known = {shard.id for shard in topology.shards}
    return [shard_id for shard_id in job.shards if shard_id not in known]


async def end_without(job: Job, topology: Topology, lease: Lease, wish: Wish) -> Job:
    """A pending job of which shards are gone is ended: what its other shards hold of it is removed.

    Args:
        job: as it is stored.
        topology: the present one.
        lease: the job's.
        wish: what the operator asked.

    Returns:
        its record, to be stored: it is over; or says why not yet, to be tried again.

    Raises:
        Superseded: another runner has the job.
    """
    why = f"shard {', '.join(gone(job, topology))} {_WHY}"
    try:
        for shard_id in job.shards:
            if any(shard.id == shard_id for shard in topology.shards):
                await _forget(job, topology, shard_id, Runner.of_lease(job.id, lease.token))
    except (Lost, Blocked, TimeoutError) as error:
        return job.changed(error=f"{why}; what it has made is removed, which waits: {error or 'a step took too long'}")
    if wish is Wish.CANCEL:
        return job.to(Status.CLEANUP, outcome=Status.CANCELLED).to(Status.CANCELLED, error=None)
    return job.to(Status.CLEANUP, outcome=Status.FAILED).to(Status.FAILED, error=why)


async def _forget(job: Job, topology: Topology, shard_id: str, runner: Runner) -> None:
    side = ShardSide(
        job,
        runner,
        topology.shard_by_id(shard_id),
        [table for table in topology.tables if not table.reference],
        hash_function=topology.hash_function,
        cluster_id=topology.cluster_id,
        waits=_untold,
    )
    try:
        await side.claim()
        await side.retire()
    finally:
        await side.close()


async def _untold(what: str | None) -> None:
    """Nobody is told who is waited for."""
