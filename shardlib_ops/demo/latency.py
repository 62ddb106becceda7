"""How long one query takes through shardlib and straight to the server, measured side by side."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from shardlib import ShardedEngine
from shardlib_ops.demo.models import Plane

__all__ = ["Latency", "measure", "percentile"]

_WAYS: Final = {
    "direct": "plain SQLAlchemy, straight to the server",
    "pinned": "engine.session(key): pinned",
    "inferred": "engine.session(): shard found from the WHERE",
}


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one way to ask, in milliseconds."""

    name: str
    way: str
    p50_ms: float
    p99_ms: float


def measure(
    engine: ShardedEngine, tailnums: Sequence[str], rounds: int, progress: Callable[[int], None]
) -> list[Latency]:
    """Ask for one plane in a session of its own, by three ways in turn, so that all see the same machine.

    The ways are plain SQLAlchemy on the shard's own server, a session pinned to the key, and one that finds the
    shard from the statement. Each opens its session, selects, and closes it, which ends the transaction.

    Args:
        engine: the sharded engine.
        tailnums: keys to choose from; all must be there, and on one shard.
        rounds: number of queries by each way.
        progress: called now and then with the rounds that are done.
    """
    server = engine.shard_for(tailnums[0]).primary
    plain = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(server.conninfo()))

    def direct(tailnum: str) -> Plane:
        with Session(plain) as session:
            return session.scalars(select(Plane).where(Plane.tailnum == tailnum)).one()

    def pinned(tailnum: str) -> Plane:
        with engine.session(tailnum) as session:
            return session.scalars(select(Plane).where(Plane.tailnum == tailnum)).one()

    def inferred(tailnum: str) -> Plane:
        with engine.session() as session:
            return session.scalars(select(Plane).where(Plane.tailnum == tailnum)).one()

    ways: dict[str, Callable[[str], Plane]] = {"direct": direct, "pinned": pinned, "inferred": inferred}
    chooser = random.Random(2013)  # noqa: S311 - the same keys each time
    try:
        taken = _take_turns(ways, lambda: chooser.choice(tailnums), rounds, progress)
    finally:
        plain.dispose()
    return [Latency(name, _WAYS[name], percentile(times, 50), percentile(times, 99)) for name, times in taken.items()]


def _take_turns(
    ways: dict[str, Callable[[str], Plane]],
    next_key: Callable[[], str],
    rounds: int,
    progress: Callable[[int], None],
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {way: [] for way in ways}
    order = list(ways)
    warm_up = min(50, rounds)
    for number in range(warm_up + rounds):
        key = next_key()
        order.append(order.pop(0))  # none is always the first to find the page in the server's memory
        for way in order:
            began = time.perf_counter()
            plane = ways[way](key)
            elapsed_ms = (time.perf_counter() - began) * 1000
            if plane.tailnum != key:
                raise AssertionError(f"asked for {key}, got {plane.tailnum}")
            if number >= warm_up:
                taken[way].append(elapsed_ms)
        if number % 50 == 0:
            progress(max(0, number - warm_up))
    return taken


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that at least `percent` of 100 of them do not exceed (nearest rank).

    Args:
        values: at least one.
        percent: 1 to 100.
    """
    rank = -(-len(values) * percent // 100)
    return sorted(values)[rank - 1]
