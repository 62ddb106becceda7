"""Changes of the topology by a job, made before the old ways are broken: open, publish, close.

A gate is opened in its shard's database before a topology names it, and closed after none does; but for a rollback,
whose gates wait until the guard is down (`cutover`). Its number is taken by a compare-and-swap of its own first:
whoever is slow, or heard no answer, holds numbers that nobody else gets, so that no gate which a topology has named is
ever made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from shardlib.catalog.publish import SWAPS_MAX, swap_pauses
from shardlib.fence.gate import Closing
from shardlib.topology import Topology
from shardlib_ops.reshard.world import Blocked, World

__all__ = ["change", "describe_holders", "open_named", "reserve", "sweep"]


async def change(world: World, make: Callable[[Topology], Topology]) -> Topology:
    """Publish what `make` makes of the stored topology, with its new gates opened first.

    Others may publish meanwhile; then it is made anew. `make` raises what it finds wrong.

    Returns:
        the published topology.

    Raises:
        Lost: the outcome is unknown: read the topology.
        Superseded: another runner has the job.
        Blocked: others publish without end.
    """
    for pause_s in swap_pauses(world.jitter):
        if pause_s:
            await world.sleep(pause_s)
        before = await world.topology()
        after = await reserve(world, before, make(before))
        if after is None:
            continue
        await open_named(world, before, after)
        if await world.publish(after, expected=after.version - 1):
            return after
        await _close_unpublished(world, before, after)
    raise Blocked(f"the topology was changed by others {SWAPS_MAX} times in a row")


async def reserve(world: World, before: Topology, after: Topology) -> Topology | None:
    """Take the numbers of the gates that `after` names and `before` does not, durably, for this caller alone.

    Args:
        world: where it happens.
        before: the stored topology.
        after: what is to follow it.

    Returns:
        `after`, to be published next; None if others changed the topology meanwhile, and nothing has happened.

    Raises:
        Lost: the outcome is unknown. The numbers are not given out again in any case.
        Superseded: another runner has the job.
    """
    if after.next_gate == before.next_gate:
        return after
    reserved = before.evolve(next_gate=after.next_gate, nonce=world.nonce())
    if not await world.publish(reserved, expected=before.version):
        return None
    return replace(after, version=reserved.version + 1)


async def open_named(world: World, before: Topology, after: Topology) -> None:
    """Open the gates that `after` names and `before` does not."""
    known = {gate.number for gate in before.gates}
    for gate in after.gates:
        if gate.number not in known:
            await world.side(gate.shard_id).open_gate(gate.number)


async def _close_unpublished(world: World, before: Topology, after: Topology) -> None:
    """Close gates that were opened for a topology that certainly never was: their numbers are this caller's."""
    known = {gate.number for gate in before.gates}
    for gate in after.gates:
        if gate.number not in known:
            await world.side(gate.shard_id).close_gate(gate.number, budget_s=1.0)


async def sweep(world: World, shard_ids: Iterable[str], *, budget_s: float) -> None:
    """Close every gate of these shards that no topology names any more.

    When this returns, no transaction of an older topology is in flight on them, and none will begin.

    Raises:
        Blocked: a transaction holds one; it is named.
    """
    open_now = {shard_id: await world.side(shard_id).gates() for shard_id in shard_ids}
    topology = await _settled(world, open_now)
    for shard_id, numbers in open_now.items():
        side, named = world.side(shard_id), set(topology.gates_of(shard_id))
        for number in numbers:
            if number in named or number >= topology.next_gate:
                continue
            closing = await side.close_gate(number, budget_s=budget_s)
            if not closing.closed:
                raise Blocked(
                    f"shard {topology.shard(shard_id).name!r}: waiting for transactions that began before the job: "
                    + describe_holders(closing)
                )


async def _settled(world: World, open_now: Mapping[str, Sequence[int]]) -> Topology:
    """The stored topology, when what it does not name of these gates will not be named by a later one either.

    A gate above all that are named may be another's, who has taken its number and is about to publish it. That is
    bound to the topology's version, so a new version ends it.
    """
    for pause_s in swap_pauses(world.jitter):
        if pause_s:
            await world.sleep(pause_s)
        topology = await world.topology()
        highest = max(gate.number for gate in topology.gates)
        if not any(highest < number < topology.next_gate for numbers in open_now.values() for number in numbers):
            return topology
        after = topology.evolve(nonce=world.nonce())
        if await world.publish(after, expected=topology.version):
            return after
    raise Blocked(f"the topology was changed by others {SWAPS_MAX} times in a row")


def describe_holders(closing: Closing) -> str:
    """Who holds a gate, for the operator."""
    return "; ".join(
        f"{'prepared transaction ' + holder.gid if holder.gid else f'process {holder.pid}'} of {holder.user}"
        f" ({holder.application or 'no application name'}, {holder.state}, for {holder.age_s:.1f} s)"
        for holder in closing.holders
    )
