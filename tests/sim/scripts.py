"""Parts of which the scripts of the facts are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from shardlib_ops.reshard.world import Flow, Lost, Side, Superseded, World
from tests.sim.shard import Closed
from tests.sim.stage import Held, Rows, Stage

__all__ = [
    "LONG_S",
    "SOON_S",
    "TTL_S",
    "assert_same",
    "breaks",
    "drained",
    "nothing",
    "opened_gate",
    "part",
    "refused",
    "runner_of",
    "sides",
    "successor",
    "true",
    "until",
    "waits",
    "write",
    "writing",
]

TTL_S = 20.0
SOON_S = 0.3
"""Nothing happens for that long: what was to happen waits for something."""
LONG_S = 20.0


async def runner_of(stage: Stage) -> tuple[World, Held]:
    """A runner that has claimed and prepared both sides."""
    lease = await stage.lease(TTL_S)
    assert lease is not None
    world = stage.world(lease)
    await world.anew()
    for side in sides(stage, world):
        await side.claim()
        await side.prepare()
    return world, lease


async def successor(stage: Stage, lease: Held) -> World:
    """The runner after one that has lost its lease without knowing it."""
    await lease.release()
    world, _ = await runner_of(stage)
    return world


def sides(stage: Stage, world: World) -> tuple[Side, Side]:
    return world.side(stage.leg.source), world.side(stage.leg.target)


async def opened_gate(stage: Stage, world: World) -> int:
    """A new gate of the source, open."""
    number = stage.new_gate()
    await world.side(stage.leg.source).open_gate(number)
    return number


async def write(stage: Stage, shard_id: str, gate: int | None, keys: Sequence[str], uid: str) -> None:
    client = await stage.begin(shard_id, "writer")
    if gate is not None:
        await client.enter(gate)
    for key in keys:
        await client.write(key, f"{uid}-{key}")
    await client.commit()


@asynccontextmanager
async def writing(stage: Stage, gate: int, count: int = 3) -> AsyncIterator[dict[str, list[str]]]:
    """Writers through a gate until they are refused or the body ends: key -> acknowledged ids."""
    told: dict[str, list[str]] = {key: [] for key in stage.moving[:count]}
    over = False

    async def write(key: str) -> None:
        for number in range(10_000):
            if over:
                return
            uid = f"{gate}-{number}-{key}"
            client = await stage.begin(stage.leg.source, "writer")
            try:
                await client.enter(gate)
                await client.write(key, uid)
                await asyncio.sleep(0.002)
            except Closed:
                return
            await client.commit()
            told[key].append(uid)

    tasks = [asyncio.create_task(write(key)) for key in told]
    try:
        yield told
    finally:
        over = True
        await asyncio.gather(*tasks)


async def waits(task: asyncio.Task[object]) -> bool:
    """Whether something is not done soon."""
    done, _ = await asyncio.wait([task], timeout=SOON_S)
    return not done


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LONG_S):
        while not await true():  # noqa: ASYNC110 - servers, and virtual time
            await asyncio.sleep(0.02)


async def nothing() -> None:
    """No pause."""


def part(rows: Rows, keys: Sequence[str]) -> Rows:
    return {key: row for key, row in rows.items() if key in keys}


async def assert_same(stage: Stage) -> Rows:
    """Both sides hold the same of the moving keys, and nothing else has arrived."""
    here = part(await stage.rows(stage.leg.source), stage.moving)
    there = await stage.rows(stage.leg.target)
    assert there == here
    for key, (count, uids) in here.items():
        assert count == len(uids), f"{key} was counted {count} times, and has {uids}"
    return here


async def drained(stage: Stage, world: World, flow: Flow, message: str, shard_id: str | None = None) -> None:
    await world.side(shard_id or stage.leg.source).barrier(message)
    await flow.heard(message, timeout_s=LONG_S)


async def refused(name: str, verb: Callable[[], Awaitable[object]]) -> None:
    """It never happens: at first its connection may be gone."""
    for _ in range(3):
        try:
            await verb()
        except Lost:
            continue
        except Superseded:
            return
        raise AssertionError(f"{name} was not refused")
    raise AssertionError(f"{name} was lost again and again, and not refused")


async def true(value: bool) -> bool:
    """For `until`."""
    return value


async def breaks(world: World, flow: Flow) -> None:
    async with asyncio.timeout(LONG_S), world.running([flow]):
        await asyncio.Event().wait()
