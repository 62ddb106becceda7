"""Facts of slots, streams and replicas."""

from __future__ import annotations

import asyncio

import pytest

from shardlib_ops.reshard.world import Blocked, Failure, Lost, Superseded
from tests.sim.scripts import (
    LONG_S,
    SOON_S,
    assert_same,
    breaks,
    drained,
    nothing,
    opened_gate,
    runner_of,
    successor,
    true,
    until,
    waits,
    write,
    writing,
)
from tests.sim.stage import Stage

__all__ = [
    "a_barrier_follows_all_that_was_let_in",
    "a_commit_is_sent_before_it_is_seen",
    "a_copy_and_its_stream_are_exact",
    "a_lost_slot_is_noticed",
    "a_replica_that_lags_holds_the_switch",
    "a_sink_set_back_is_noticed",
    "a_slot_waits_for_writers",
    "a_taken_over_stream_goes_on_exactly",
    "the_way_back_begins_where_it_is_told",
]


async def a_slot_waits_for_writers(stage: Stage) -> None:
    """A new slot is not there before those who write have ended; who only reads is not waited for."""
    world, _ = await runner_of(stage)
    flow = world.flow(stage.leg, "forward")
    reader, writer = [await stage.begin(stage.leg.source, name) for name in ("reader", "writer")]
    await reader.enter(await opened_gate(stage, world))
    await writer.write(stage.moving[0], "a")
    making = asyncio.create_task(flow.create_slot())
    assert await waits(making)
    await writer.commit()
    await making
    await flow.create_slot()
    await reader.rollback()


async def a_copy_and_its_stream_are_exact(stage: Stage) -> None:
    """Snapshot and slot share one point: what commits before, during and after a copy is there once."""
    world, _ = await runner_of(stage)
    source, gate = stage.leg.source, await opened_gate(stage, world)
    flow = world.flow(stage.leg, "forward")
    await write(stage, source, gate, [*stage.moving[:8], *stage.staying[:2]], "before")
    open_then = await stage.begin(source, "slow")
    await open_then.write(stage.moving[4], "in flight")
    async with writing(stage, gate) as told:
        copying = asyncio.create_task(world.copy(stage.leg, nothing))
        assert await waits(copying)
        await open_then.commit()
        await copying
        assert await world.copied(stage.leg)
        async with world.running([flow]):
            written = {key: len(uids) for key, uids in told.items()}
            await until(lambda: true(all(len(told[key]) > written[key] for key in told)))
            compared = await world.compare(stage.leg, flow, since=None)
            assert compared.keys >= 8
            assert (await world.side(source).close_gate(gate, budget_s=10.0)).closed
            await drained(stage, world, flow, "exact")
    same = await assert_same(stage)
    assert set(same) == set(stage.moving[:8])
    assert same[stage.moving[4]][0] == 2
    for key, uids in told.items():
        assert set(uids) < set(same[key][1])


async def a_taken_over_stream_goes_on_exactly(stage: Stage) -> None:
    """A runner is cut off in the middle, by its own end or by the next one: the stream goes on with nothing twice."""
    world, lease = await runner_of(stage)
    gate = await opened_gate(stage, world)
    await world.copy(stage.leg, nothing)
    async with writing(stage, gate) as told:
        for number in range(3):
            async with world.running([world.flow(stage.leg, "forward")]):
                there = len(told[stage.moving[0]]) + 3
                await until(lambda: true(len(told[stage.moving[0]]) > there))  # noqa: B023 - called now
                if number == 1:
                    await drained(stage, world, world.flow(stage.leg, "forward"), "taken over")
        try:
            async with asyncio.timeout(LONG_S), world.running([world.flow(stage.leg, "forward")]):
                taking = asyncio.create_task(successor(stage, lease))
                await asyncio.Event().wait()
        except (Lost, Superseded):
            pass
        world = await taking
        flow = world.flow(stage.leg, "forward")
        async with world.running([flow]):
            assert (await world.side(stage.leg.source).close_gate(gate, budget_s=10.0)).closed
            await drained(stage, world, flow, "the end")
    same = await assert_same(stage)
    assert {key: row[1] for key, row in same.items()} == {key: tuple(sorted(uids)) for key, uids in told.items()}
    for shard_id in (stage.leg.source, stage.leg.target):
        assert await stage.keys(shard_id) >= set(same)


async def a_barrier_follows_all_that_was_let_in(stage: Stage) -> None:
    """All that was acknowledged before a gate was closed is applied when a barrier written after that is heard."""
    world, _ = await runner_of(stage)
    flow = world.flow(stage.leg, "forward")
    await world.copy(stage.leg, nothing)
    async with world.running([flow]):
        for number in range(4):
            gate = await opened_gate(stage, world)
            async with writing(stage, gate) as told:
                await until(lambda: true(all(told.values())))
                assert (await world.side(stage.leg.source).close_gate(gate, budget_s=10.0)).closed
                await drained(stage, world, flow, f"barrier {number}")
                there = await stage.rows(stage.leg.target)
            assert await assert_same(stage) == there
            for key, uids in told.items():
                assert set(uids) <= set(there[key][1])
            assert await stage.keys(stage.leg.source) >= set(told)
        with pytest.raises(TimeoutError):
            await flow.heard("never sent", timeout_s=0.1)


async def a_commit_is_sent_before_it_is_seen(stage: Stage) -> None:
    """A commit that waits is in the stream already, not visible, and holds its gate until it is."""
    world, _ = await runner_of(stage)
    source, side, gate = stage.leg.source, world.side(stage.leg.source), await opened_gate(stage, world)
    flow, key = world.flow(stage.leg, "forward"), stage.moving[0]
    await world.copy(stage.leg, nothing)
    async with world.running([flow]):
        async with stage.stalled(source):
            writing = asyncio.create_task(write(stage, source, gate, [key], "a"))

            async def arrived() -> bool:
                return key in await stage.rows(stage.leg.target)

            await until(arrived)
            assert not writing.done()
            assert key not in await stage.rows(source)
            assert not (await side.close_gate(gate, budget_s=0.2)).closed
        await writing
        assert (await side.close_gate(gate, budget_s=5.0)).closed
    await assert_same(stage)


async def the_way_back_begins_where_it_is_told(stage: Stage) -> None:
    """The reverse slot is older than its start: what the forward stream had applied does not come back."""
    world, _ = await runner_of(stage)
    forward, back = world.flow(stage.leg, "forward"), world.flow(stage.leg, "reverse")
    source, target = stage.leg.source, stage.leg.target
    await write(stage, source, None, stage.moving[:3], "copied")
    await world.copy(stage.leg, nothing)
    await back.create_slot()
    assert not await back.usable(), "no start is written down"
    async with world.running([forward]):
        await write(stage, source, None, stage.moving[:4], "streamed")
        await drained(stage, world, forward, "there")
    await world.start_reverse(stage.leg, await world.side(target).wal_position())
    assert await back.usable()
    await world.side(source).guard(active=True)
    async with world.running([back]):
        await write(stage, target, None, stage.moving[1:6], "back")
        await drained(stage, world, back, "here", target)
    same = await assert_same(stage)
    assert [same[key][0] for key in stage.moving[:6]] == [2, 3, 3, 2, 1, 1]


async def a_lost_slot_is_noticed(stage: Stage) -> None:
    """A slot that is gone is not usable, and a stream does not start from it; a new copy makes all of it good."""
    world, _ = await runner_of(stage)
    flow = world.flow(stage.leg, "forward")
    await write(stage, stage.leg.source, None, stage.moving[:3], "a")
    await world.copy(stage.leg, nothing)
    assert await flow.usable()
    await stage.lose_slot(stage.leg)
    assert not await flow.usable()
    assert not await world.copied(stage.leg)
    await write(stage, stage.leg.source, None, stage.moving[2:5], "unseen")
    with pytest.raises((Lost, Failure)):
        await breaks(world, flow)
    await world.copy(stage.leg, nothing)
    async with world.running([flow]):
        await drained(stage, world, flow, "anew")
    await assert_same(stage)


async def a_sink_set_back_is_noticed(stage: Stage) -> None:
    """A stream does not go on from a position before what its slot was told of; a new copy makes all of it good."""
    world, _ = await runner_of(stage)
    flow = world.flow(stage.leg, "forward")
    await world.copy(stage.leg, nothing)
    async with world.running([flow]):
        await write(stage, stage.leg.source, None, stage.moving[:3], "a")
        await drained(stage, world, flow, "confirmed")
        await asyncio.sleep(0.6)
    await stage.set_back(stage.leg)
    assert not await flow.usable()
    with pytest.raises(Lost, match="lost transactions"):
        await breaks(world, flow)
    await world.copy(stage.leg, nothing)
    async with world.running([flow]):
        await drained(stage, world, flow, "anew")
    await assert_same(stage)


async def a_replica_that_lags_holds_the_switch(stage: Stage) -> None:
    """Until a replica has replayed the closing, its gate is open there, and `replayed` says so."""
    world, _ = await runner_of(stage)
    source, gate = stage.leg.source, await opened_gate(stage, world)
    side = world.side(source)

    async def there() -> bool:
        return gate in await stage.replica_gates(source)

    await until(there)
    async with stage.lagging(source):
        closing = await side.close_gate(gate, budget_s=5.0)
        assert closing.lsn is not None
        with pytest.raises(Blocked):
            await side.replayed(closing.lsn, timeout_s=SOON_S)
        assert await there()
        waiting = asyncio.create_task(side.replayed(closing.lsn, timeout_s=LONG_S))
        assert await waits(waiting)
    await waiting
    assert not await there()
