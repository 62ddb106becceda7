"""Facts of swaps, of the record and of leases."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from shardlib_ops.reshard.world import Lost, Superseded
from tests.sim.scripts import (
    LONG_S,
    TTL_S,
    runner_of,
    successor,
)
from tests.sim.stage import Stage

__all__ = [
    "a_late_swap_may_still_happen",
    "a_lease_has_one_holder",
    "a_lease_that_is_cut_off_runs_out",
    "a_lost_answer_hides_a_swap",
    "a_newer_version_ends_a_late_swap",
    "a_record_is_its_holders_alone",
    "a_swap_of_a_former_holder_is_refused",
    "a_swap_wants_the_version_it_expects",
]


async def a_swap_wants_the_version_it_expects(stage: Stage) -> None:
    """Of two changes of one version the second is refused; the same one again is not."""
    world, _ = await runner_of(stage)
    before = await world.topology()
    one, other = before.evolve(nonce=world.nonce()), before.evolve(nonce=world.nonce())
    assert await world.publish(one, expected=before.version)
    assert not await world.publish(other, expected=before.version)
    assert await world.publish(one, expected=before.version)
    assert (await world.topology()).nonce == one.nonce


async def a_lost_answer_hides_a_swap(stage: Stage) -> None:
    """A swap whose answer is lost has happened all the same, and asking for it again is right."""
    world, _ = await runner_of(stage)
    before = await world.topology()
    after = before.evolve(nonce=world.nonce())
    async with stage.losing(world, "answer"):
        with suppress(Lost):
            assert await world.publish(after, expected=before.version)
    assert (await world.topology()).nonce == after.nonce
    assert await world.publish(after, expected=before.version)


async def a_late_swap_may_still_happen(stage: Stage) -> None:
    """A swap that nobody answered has not happened, and happens when it arrives."""
    world, _ = await runner_of(stage)
    before = await world.topology()
    after = before.evolve(nonce=world.nonce())
    async with stage.losing(world, "question") as arrives:
        with pytest.raises(Lost):
            await world.publish(after, expected=before.version)
    assert (await world.topology()).nonce == before.nonce
    await arrives()
    assert (await world.topology()).nonce == after.nonce


async def a_newer_version_ends_a_late_swap(stage: Stage) -> None:
    """When another version was published meanwhile, a late swap is refused."""
    world, _ = await runner_of(stage)
    before = await world.topology()
    after, newer = before.evolve(nonce=world.nonce()), before.evolve(nonce=world.nonce())
    async with stage.losing(world, "question") as arrives:
        with pytest.raises(Lost):
            await world.publish(after, expected=before.version)
    assert await world.publish(newer, expected=before.version)
    await arrives()
    assert (await world.topology()).nonce == newer.nonce
    assert not await world.publish(after, expected=before.version)


async def a_swap_of_a_former_holder_is_refused(stage: Stage) -> None:
    """A swap that arrives when the lease has another holder does not happen, though the version is the same."""
    world, lease = await runner_of(stage)
    before = await world.topology()
    after = before.evolve(nonce=world.nonce())
    async with stage.losing(world, "question") as arrives:
        with pytest.raises(Lost):
            await world.publish(after, expected=before.version)
    later = await successor(stage, lease)
    await arrives()
    assert (await later.topology()).nonce == before.nonce
    with pytest.raises(Superseded):
        await world.publish(after, expected=before.version)
    assert await later.publish(before.evolve(nonce=later.nonce()), expected=before.version)


async def a_record_is_its_holders_alone(stage: Stage) -> None:
    """The record is saved under the lease; one whose answer is lost is saved again; who lost the lease saves none."""
    world, lease = await runner_of(stage)
    job = stage.job
    await world.save(job.changed(error="one"))
    async with stage.losing(world, "answer"):
        with suppress(Lost):
            await world.save(job.changed(error="two"))
    await world.save(job.changed(error="two"))
    assert (await stage.stored()).error == "two"
    later = await successor(stage, lease)
    with pytest.raises(Superseded):
        await world.save(job.changed(error="old"))
    assert (await stage.stored()).error == "two"
    await later.save(job.changed(error="three"))
    assert (await stage.stored()).error == "three"


async def a_lease_has_one_holder(stage: Stage) -> None:
    """While somebody holds it nobody else gets it; given up it is free at once; the token rises."""
    first = await stage.lease(TTL_S)
    assert first is not None
    assert await stage.lease(TTL_S) is None
    assert first.alive()
    await first.release()
    assert not first.alive()
    second = await stage.lease(TTL_S)
    assert second is not None
    assert second.token > first.token
    await first.release()
    assert await stage.lease(TTL_S) is None, "the first one's giving up takes nothing from the second"
    assert second.alive()


async def a_lease_that_is_cut_off_runs_out(stage: Stage) -> None:
    """Kept, it outlives its time; cut off, its holder knows when another can get it."""
    ttl_s, loop = 2.0, asyncio.get_running_loop()
    first = await stage.lease(ttl_s)
    assert first is not None
    await asyncio.sleep(ttl_s * 1.2)
    assert first.alive()
    assert await stage.lease(ttl_s) is None
    first.cut()
    began = loop.time()
    while (second := await stage.lease(ttl_s)) is None:
        assert loop.time() - began < LONG_S
        await asyncio.sleep(0.05)
    assert loop.time() - began > ttl_s / 2, "it was renewed no longer ago than a part of its time"
    await asyncio.sleep(ttl_s * 0.05)  # clocks that differ by a few parts in a hundred
    assert not first.alive()
    assert second.token > first.token
