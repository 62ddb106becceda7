"""Several things at once, and what becomes of a cancellation that comes as one of them fails."""

from __future__ import annotations

import asyncio

import pytest

from shardlib_ops.reshard.together import together


async def fails(after: int) -> None:
    for _ in range(after):
        await asyncio.sleep(0)
    raise ValueError("it failed")


@pytest.mark.parametrize("outer", range(8))
@pytest.mark.parametrize("inner", range(8))
async def test_an_outer_group_ends_whose_part_fails_at_the_same_moment(outer: int, inner: int) -> None:
    went_on = False

    async def body() -> None:
        nonlocal went_on
        async with asyncio.TaskGroup() as group:
            group.create_task(fails(outer))
            try:
                await together([fails(inner), asyncio.sleep(3600)])
            except ValueError:
                await asyncio.sleep(3600)
                went_on = True

    async with asyncio.timeout(10):
        with pytest.raises(ExceptionGroup):
            await body()
    assert not went_on


async def test_results_come_in_their_order() -> None:
    assert await together([asyncio.sleep(0.02, 1), asyncio.sleep(0, 2)]) == [1, 2]


async def test_the_first_error_is_raised_when_the_others_have_ended() -> None:
    ended: list[str] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            ended.append("slow")

    async def fails_at_its_end() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("failing")
            raise KeyError("later")

    async with asyncio.timeout(10):
        with pytest.raises(ValueError, match="it failed"):
            await together([slow_to_end(), fails(2), fails_at_its_end()])
    assert ended == ["failing", "slow"]


async def test_a_cancellation_ends_the_calls_before_it_is_raised() -> None:
    ended: list[int] = []

    async def slow_to_end(number: int) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.02)
            ended.append(number)

    task = asyncio.create_task(together([slow_to_end(1), slow_to_end(2)]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # again: what they do to end is not disturbed
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == [1, 2]


async def test_nothing_to_do() -> None:
    assert await together([]) == []
