"""Changes of the topology by a job, made before the old ways are broken: open, publish, close.

A gate is opened in its shard's database before a topology names it, and closed after none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shardlib.fence.gate import Closing
from shardlib.topology import Topology
from shardlib_ops.reshard.world import Blocked, World

__all__ = ["change", "describe_holders", "open_named", "sweep"]

_TRIES: int = 20


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
    for _ in range(_TRIES):
        before = await world.topology()
        after = make(before)
        await open_named(world, before, after)
        if await world.publish(after, expected=before.version):
            return after
        await _close_unpublished(world, before, after)
    raise Blocked(f"the topology was changed by others {_TRIES} times in a row")


async def open_named(world: World, before: Topology, after: Topology) -> None:
    """Open the gates that `after` names and `before` does not."""
    known = {gate.number for gate in before.gates}
    for gate in after.gates:
        if gate.number not in known:
            await world.side(gate.shard_id).open_gate(gate.number)


async def _close_unpublished(world: World, before: Topology, after: Topology) -> None:
    """Close gates that were opened for a topology that certainly never was."""
    known = {gate.number for gate in before.gates}
    found = await world.topology()
    taken = {(gate.shard_id, gate.number) for gate in found.gates}
    for gate in after.gates:
        # Below the next free number and not named: no topology will ever name it here.
        if gate.number not in known and gate.number < found.next_gate and (gate.shard_id, gate.number) not in taken:
            await world.side(gate.shard_id).close_gate(gate.number, budget_s=1.0)


async def sweep(world: World, shard_ids: Iterable[str], *, budget_s: float) -> None:
    """Close every gate of these shards that no topology names any more.

    When this returns, no transaction of an older topology is in flight on them, and none will begin.

    Raises:
        Blocked: a transaction holds one; it is named.
    """
    topology = await world.topology()
    for shard_id in shard_ids:
        side, named = world.side(shard_id), set(topology.gates_of(shard_id))
        for number in await side.gates():
            if number in named or number >= topology.next_gate:
                continue  # a number not yet given out is another's, who is about to publish it
            closing = await side.close_gate(number, budget_s=budget_s)
            if not closing.closed:
                raise Blocked(
                    f"shard {topology.shard(shard_id).name!r}: waiting for transactions that began before the job: "
                    + describe_holders(closing)
                )


def describe_holders(closing: Closing) -> str:
    """Who holds a gate, for the operator."""
    return "; ".join(
        f"{'prepared transaction ' + holder.gid if holder.gid else f'process {holder.pid}'} of {holder.user}"
        f" ({holder.application or 'no application name'}, {holder.state}, for {holder.age_s:.1f} s)"
        for holder in closing.holders
    )
