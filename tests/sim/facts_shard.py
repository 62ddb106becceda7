"""Facts of gates, of runners that follow each other, and of the guard."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from shardlib_ops.reshard.world import Superseded
from tests.sim.scripts import (
    assert_same,
    breaks,
    drained,
    nothing,
    opened_gate,
    part,
    refused,
    runner_of,
    successor,
    true,
    until,
    write,
    writing,
)
from tests.sim.shard import Closed, Guarded
from tests.sim.stage import Stage

__all__ = [
    "a_gate_number_can_be_made_again",
    "a_lower_token_is_refused",
    "a_retired_job_is_refused",
    "an_earlier_round_is_refused",
    "closing_gives_way",
    "newcomers_pass_between_attempts",
    "nothing_commits_after_the_closing",
    "old_writers_are_found_by_age",
    "the_guard_refuses_moved_keys_alone",
    "who_is_late_is_refused",
    "who_wrote_before_the_guard_may_pass",
]

# Gates


async def closing_gives_way(stage: Stage) -> None:
    """Who holds a gate keeps it from closing; after the budget it is open as before, and the holder is named."""
    world, _ = await runner_of(stage)
    side, gate = world.side(stage.leg.source), await opened_gate(stage, world)
    holder = await stage.begin(stage.leg.source, "slowpoke")
    await holder.enter(gate)
    began = world.now()
    closing = await side.close_gate(gate, budget_s=0.4)
    assert not closing.closed
    assert world.now() - began < 5
    assert ["slowpoke" in one.application + one.user for one in closing.holders] == [True]
    assert gate in await side.gates()
    await write(stage, stage.leg.source, gate, stage.moving[:1], "meanwhile")
    await holder.write(stage.moving[1], "a")
    await holder.commit()
    closing = await side.close_gate(gate, budget_s=5.0)
    assert closing.closed
    assert closing.lsn is not None
    assert gate not in await side.gates()


async def newcomers_pass_between_attempts(stage: Stage) -> None:
    """While a closing waits for somebody, others wait for an attempt at a time, and come in."""
    world, _ = await runner_of(stage)
    side, gate = world.side(stage.leg.source), await opened_gate(stage, world)
    holder = await stage.begin(stage.leg.source, "slowpoke")
    await holder.enter(gate)
    closing = asyncio.create_task(side.close_gate(gate, budget_s=12.0))
    for number in range(5):
        await write(stage, stage.leg.source, gate, stage.moving[:1], f"n{number}")
    assert not closing.done(), "the newcomers waited until the closing had given up"
    await holder.rollback()
    assert (await closing).closed
    assert (await stage.rows(stage.leg.source))[stage.moving[0]][0] == 5


async def nothing_commits_after_the_closing(stage: Stage) -> None:
    """What a snapshot shows when a closing has returned is all that ever came through that gate."""
    world, _ = await runner_of(stage)
    side, gate = world.side(stage.leg.source), await opened_gate(stage, world)
    async with writing(stage, gate) as told:
        await until(lambda: true(all(told.values())))
        closing = await side.close_gate(gate, budget_s=10.0)
        assert closing.closed
        then = await stage.rows(stage.leg.source)
    assert await stage.rows(stage.leg.source) == then
    assert {key: tuple(sorted(uids)) for key, uids in told.items()} == {key: row[1] for key, row in then.items()}


async def who_is_late_is_refused(stage: Stage) -> None:
    """A closed gate lets nobody in, whenever the transaction began; closing and opening again change nothing."""
    world, _ = await runner_of(stage)
    side, gate, other = world.side(stage.leg.source), await opened_gate(stage, world), await opened_gate(stage, world)
    early = await stage.begin(stage.leg.source, "early")
    await early.enter(other)
    await side.open_gate(gate)
    for _ in range(2):
        assert (await side.close_gate(gate, budget_s=1.0)).closed
    for client in (early, await stage.begin(stage.leg.source, "late")):
        with pytest.raises(Closed):
            await client.enter(gate)
    assert other in await side.gates()
    assert (await side.close_gate(other, budget_s=5.0)).closed, "who was refused holds nothing"


async def a_gate_number_can_be_made_again(stage: Stage) -> None:
    """A shard does not remember its closed gates: one that is opened again lets in who learned of it long ago."""
    world, _ = await runner_of(stage)
    side, gate = world.side(stage.leg.source), await opened_gate(stage, world)
    assert (await side.close_gate(gate, budget_s=1.0)).closed
    await side.open_gate(gate)
    await write(stage, stage.leg.source, gate, stage.moving[:1], "again")
    assert (await side.close_gate(gate, budget_s=1.0)).closed


# Runners


async def a_lower_token_is_refused(stage: Stage) -> None:
    """When a later runner has claimed a shard, nothing of the earlier one has an effect there, its claim included."""
    world, lease = await runner_of(stage)
    await write(stage, stage.leg.source, None, stage.moving[:1], "copied")
    await world.copy(stage.leg, nothing)
    later, gate = await successor(stage, lease), stage.new_gate()
    side, flow = world.side(stage.leg.source), world.flow(stage.leg, "forward")
    before = await later.side(stage.leg.source).gates()
    verbs: dict[str, Callable[[], Awaitable[object]]] = {
        "open_gate": lambda: side.open_gate(gate),
        "close_gate": lambda: side.close_gate(before[0], budget_s=1.0),
        "prepare": side.prepare,
        "guard": lambda: side.guard(active=True),
        "barrier": lambda: side.barrier("old"),
        "drop_slot": flow.drop_slot,
        "create_slot": lambda: world.flow(stage.leg, "reverse").create_slot(),
        "start_reverse": lambda: world.start_reverse(stage.leg, "0"),
        "advance_sequences": lambda: world.advance_sequences(stage.leg, "reverse", ahead=100),
        "copy": lambda: world.copy(stage.leg, nothing),
        "run": lambda: breaks(world, flow),
        "purge": lambda: world.purge(stage.leg, stage.leg.source, nothing),
        "claim": side.claim,
        "retire": side.retire,
    }
    for name, verb in verbs.items():
        await refused(name, verb)
    assert await later.side(stage.leg.source).gates() == before
    await assert_same(stage)
    assert await later.flow(stage.leg, "forward").usable()
    assert not await later.flow(stage.leg, "reverse").usable()
    await later.side(stage.leg.source).open_gate(gate)


async def an_earlier_round_is_refused(stage: Stage) -> None:
    """What was sent before a round and arrives after its claim has no effect; before the claim it has."""
    world, _ = await runner_of(stage)
    source, first, second = stage.leg.source, stage.new_gate(), stage.new_gate()
    arrives = stage.sent_open(world, source, first)
    late = stage.sent_open(world, source, second)
    await world.anew()
    await arrives()
    await world.side(source).claim()
    with pytest.raises(Superseded):
        await late()
    gates = await world.side(source).gates()
    assert first in gates
    assert second not in gates
    await world.side(source).open_gate(second)


async def a_retired_job_is_refused(stage: Stage) -> None:
    """After `retire` the same runner changes nothing any more; retiring again is nothing; a claim begins anew."""
    world, _ = await runner_of(stage)
    await world.copy(stage.leg, nothing)
    side, gate = world.side(stage.leg.source), stage.new_gate()
    late = stage.sent_open(world, stage.leg.source, gate)
    await side.retire()
    assert not await world.flow(stage.leg, "forward").usable()
    with pytest.raises(Superseded):
        await late()
    await refused("open_gate", lambda: side.open_gate(gate))
    assert gate not in await side.gates()
    await world.anew()
    await side.claim()
    await side.open_gate(gate)


# The guard


async def the_guard_refuses_moved_keys_alone(stage: Stage) -> None:
    """Everybody's writes of moved keys are refused, those of others pass, and the job's own stream and purge pass."""
    world, _ = await runner_of(stage)
    source, target = stage.leg.source, stage.leg.target
    await write(stage, source, None, [*stage.moving[:2], stage.staying[0]], "old")
    await world.copy(stage.leg, nothing)
    await world.side(target).guard(active=True)
    flow = world.flow(stage.leg, "forward")
    async with world.running([flow]):
        await write(stage, source, None, stage.moving[:3], "new")
        await drained(stage, world, flow, "guarded")
        client = await stage.begin(target, "psql")
        with pytest.raises(Guarded):
            await client.write(stage.moving[0], "foreign")
    same = await assert_same(stage)
    assert same[stage.moving[0]][0] == 2
    await world.side(source).guard(active=True)
    client = await stage.begin(source, "psql")
    await client.write(stage.staying[0], "stays")
    with pytest.raises(Guarded):
        await client.write(stage.moving[0], "moved")
    await world.purge(stage.leg, source, nothing)
    left = await stage.rows(source)
    assert part(left, stage.moving) == {}
    assert left[stage.staying[0]][0] == 1, "the refusal has undone its transaction"
    await world.side(source).guard(active=False)
    await write(stage, source, None, stage.moving[:1], "again")


async def who_wrote_before_the_guard_may_pass(stage: Stage) -> None:
    """Such a writer is named until it ends, gate or no gate: it may go on past the guard. Who comes later is refused.

    Whether it meets the guard is up to the server. The simulation has the worse of both.
    """
    world, _ = await runner_of(stage)
    source, side, gate = stage.leg.source, world.side(stage.leg.source), await opened_gate(stage, world)
    await write(stage, source, None, [stage.moving[0], stage.staying[2]], "first")
    psql = await stage.begin(source, "psql")
    for number in range(8):  # it has its plans, locks and the guard as it was at hand
        await psql.write(stage.staying[2], f"before {number}")
    gated = await stage.begin(source, "gated")
    await gated.enter(gate)
    await gated.write(stage.staying[0], "before")
    idle = await stage.begin(source, "idle")
    await idle.enter(gate)
    await side.guard(active=True)
    assert _named(await side.foreign_writers()) == ["gated", "psql"]
    with pytest.raises(Guarded):
        await idle.write(stage.moving[1], "refused")
    later = await stage.begin(source, "later")
    await later.write(stage.staying[1], "stays")
    assert _named(await side.foreign_writers()) == ["gated", "psql"], "newcomers are not waited for"
    passed = True
    try:
        await psql.write(stage.moving[0], "past")
    except Guarded:
        passed = False
    else:
        assert _named(await side.foreign_writers()) == ["gated", "psql"]
        await psql.commit()
    assert _named(await side.foreign_writers()) == ["gated"]
    await gated.commit()
    assert await side.foreign_writers() == ()
    await later.commit()
    rows = await stage.rows(source)
    assert rows[stage.moving[0]][0] == 1 + passed
    assert rows[stage.staying[2]][0] == 1 + 8 * passed
    assert stage.moving[1] not in rows


def _named(found: Sequence[str]) -> list[str]:
    """The applications among these writers: a real one tells more than its name."""
    return sorted(one.partition(" (")[2].partition(",")[0] or one for one in found)


async def old_writers_are_found_by_age(stage: Stage) -> None:
    """Transactions that have written and are older than so long; readers are none."""
    world, _ = await runner_of(stage)
    side = world.side(stage.leg.source)
    old = await stage.begin(stage.leg.source, "old")
    await old.write(stage.moving[0], "a")
    idle = await stage.begin(stage.leg.source, "idle")
    await asyncio.sleep(1.2)
    new = await stage.begin(stage.leg.source, "new")
    await new.write(stage.moving[1], "a")
    assert _named(await side.old_writers(older_s=1.2)) == ["old"]
    assert _named(await side.old_writers(older_s=0.0)) == ["new", "old"]
    for client in (old, idle, new):
        await client.rollback()
    assert await side.old_writers(older_s=0.0) == ()
