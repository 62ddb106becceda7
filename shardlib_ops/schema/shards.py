"""What the shards say of their tables, asked side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import psycopg
from psycopg import AsyncConnection

from shardlib.dsn import scrub
from shardlib.errors import ShardlibError, ShardUnavailable
from shardlib.topology import Shard
from shardlib_ops.reshard.connect import connect

__all__ = ["asked", "each"]

T = TypeVar("T")

_LOOK_S: Final = 30.0
_SIDE_BY_SIDE: Final = 16


async def asked(shard: Shard, question: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
    """What a shard's primary answers.

    Raises:
        ShardUnavailable: nothing within 30 s, or it refused.
    """
    try:
        async with (
            asyncio.timeout(_LOOK_S),
            await connect(shard.primary, shard=shard.name, application="shardlib schema") as conn,
        ):
            return await question(conn)
    except TimeoutError:
        raise ShardUnavailable(shard.name, f"no answer within {_LOOK_S:g} s") from None
    except psycopg.Error as error:
        raise ShardUnavailable(shard.name, scrub(str(error).strip(), shard.primary.reveal())) from None


async def each(
    shards: Sequence[Shard], question: Callable[[AsyncConnection[Any]], Awaitable[T]]
) -> dict[str, T | ShardlibError]:
    """What each shard answers, or why it does not, by the shard's id."""
    few = asyncio.Semaphore(_SIDE_BY_SIDE)

    async def one(shard: Shard) -> T | ShardlibError:
        async with few:
            try:
                return await asked(shard, question)
            except ShardlibError as error:
                return error

    answers = await asyncio.gather(*map(one, shards))
    return {shard.id: answer for shard, answer in zip(shards, answers, strict=True)}
