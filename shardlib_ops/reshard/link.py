"""Two shards between which a leg's rows flow, seen from whoever lets them flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from psycopg import AsyncConnection

from shardlib.ring import TokenRange, merge_ranges
from shardlib.ring.ranges import ranges_contain
from shardlib.token import hash_of
from shardlib.topology import Shard, Table
from shardlib_ops.reshard.connect import Runner, connect
from shardlib_ops.reshard.control import Direction, slot

__all__ = ["Link"]


@dataclass(frozen=True)
class Link:
    """One leg in one direction: changes are read at `origin` and written at `sink`.

    Attributes:
        runner: who is at work.
        number: the leg's number in its job.
        direction: `forward` from the leg's source to its target, `reverse` back.
        origin: the shard that serves the ranges.
        sink: the shard that follows.
        ranges: the leg's token ranges.
        hash_function: the cluster's.
        tables: the cluster's sharded tables.
    """

    runner: Runner
    number: int
    direction: Direction
    origin: Shard
    sink: Shard
    ranges: tuple[TokenRange, ...]
    hash_function: str
    tables: tuple[Table, ...]

    @property
    def slot(self) -> str:
        """Name of the replication slot at the origin."""
        return slot(self.runner.job, self.number, self.direction)

    @cached_property
    def moves(self) -> Callable[[bytes], bool]:
        """Whether the row with these key bytes is of the leg's ranges."""
        token, ranges = hash_of(self.hash_function), merge_ranges(self.ranges)
        return lambda key: ranges_contain(ranges, token(key))

    @property
    def reversed(self) -> Link:
        """The same leg in the other direction."""
        other: Direction = "reverse" if self.direction == "forward" else "forward"
        return replace(self, direction=other, origin=self.sink, sink=self.origin)

    async def open_origin(self, what: str, *, replication: bool = False) -> AsyncConnection[Any]:
        """A connection to the origin's primary; the caller closes it. See `connect`."""
        return await self._open(self.origin, what, replication)

    async def open_sink(self, what: str) -> AsyncConnection[Any]:
        """A connection to the sink's primary; the caller closes it. See `connect`."""
        return await self._open(self.sink, what, replication=False)

    async def _open(self, shard: Shard, what: str, replication: bool) -> AsyncConnection[Any]:
        return await connect(
            shard.primary,
            shard=shard.name,
            application=self.runner.application(f"{what} {self.number}"),
            replication=replication,
        )
