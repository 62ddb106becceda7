"""What the demo does with the shards. The body of each function is shown as it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sqlalchemy import Row, func, select
from sqlalchemy.orm import selectinload

from shardlib import AsyncShardedEngine, ShardedEngine, ShardedSession
from shardlib_ops.demo.models import Airport, Flight, Plane

__all__ = [
    "count_flights",
    "favourite_destinations",
    "longest_delays",
    "longest_delays_of_each_shard",
    "move_seats",
    "plane_with_flights",
    "planes_made_by",
    "several_planes",
]


def plane_with_flights(engine: ShardedEngine, tailnum: str) -> Plane:
    """The ORM: a plane, its flights and their airlines. The shard is found from the WHERE."""
    with engine.session() as session:
        flights = selectinload(Plane.flights)
        query = select(Plane).where(Plane.tailnum == tailnum)
        query = query.options(flights.joinedload(Flight.airline))
        return session.scalars(query).one()


def favourite_destinations(engine: ShardedEngine, tailnum: str) -> Sequence[Row[str, int]]:
    """Core, on the key's shard: all of SQL is there. Airports are a reference table, so the join is local."""
    with engine.connect(tailnum) as connection:
        flights = func.count().label("flights")
        query = (
            select(Airport.name, flights)
            .join(Flight, Flight.dest == Airport.faa)
            .where(Flight.tailnum == tailnum)
            .group_by(Airport.name)
            .order_by(flights.desc(), Airport.name)
            .limit(3)
        )
        return connection.execute(query).all()


def several_planes(engine: ShardedEngine, tailnums: Sequence[str]) -> Sequence[Plane]:
    """Several keys: only the shards that have them are asked, side by side."""
    with engine.session() as session:
        query = select(Plane).where(Plane.tailnum.in_(tailnums))
        return session.scalars(query).all()


def planes_made_by(engine: ShardedEngine, manufacturer: str) -> Sequence[Plane]:
    """No key: all shards are asked, side by side."""
    with engine.session() as session:
        query = select(Plane).where(Plane.manufacturer == manufacturer)
        return session.scalars(query).all()


def longest_delays(engine: ShardedEngine) -> Sequence[int | None]:
    """The first rows of all shards in one order would have to be merged: refused, not answered wrongly."""
    with engine.session() as session:
        longest_first = Flight.delay.desc().nulls_last()
        query = select(Flight.delay).order_by(longest_first)
        return session.scalars(query.limit(3)).all()


def longest_delays_of_each_shard(engine: ShardedEngine, one_key_each: Sequence[str]) -> list[int]:
    """What to write instead: ask each shard in a session pinned to it, and put the parts together."""
    delays: list[int] = []
    for key in one_key_each:
        with engine.session(key) as session:
            longest_first = Flight.delay.desc().nulls_last()
            query = select(Flight.delay).order_by(longest_first)
            part = session.scalars(query.limit(3))
            delays += [delay for delay in part if delay is not None]
    return sorted(delays, reverse=True)[:3]


def move_seats(session: ShardedSession, source: str, target: str) -> None:
    """Two planes on two shards, changed in one transaction."""
    session.get_one(Plane, source).seats -= 2
    session.get_one(Plane, target).seats += 2
    session.commit()


async def count_flights(url: str, tailnums: Sequence[str]) -> list[int]:
    """asyncio: the same names, awaited. One task a plane, all at once."""
    async with await AsyncShardedEngine.open(url, pool_size=8) as engine:

        async def count(tailnum: str) -> int:
            async with engine.session(tailnum) as session:
                query = select(func.count()).where(Flight.tailnum == tailnum)
                return await session.scalar(query) or 0

        return await asyncio.gather(*map(count, tailnums))
