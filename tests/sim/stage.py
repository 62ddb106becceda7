"""What a fact is played on: shards, a catalog and one job, simulated or real."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from shardlib_ops.reshard.job import Job, Leg
from shardlib_ops.reshard.world import World

__all__ = ["Client", "Fact", "Held", "Rows", "Stage", "play"]

Rows = Mapping[str, tuple[int, tuple[str, ...]]]
"""key -> how often it was counted up, and the unique ids in its bag, sorted."""


class Client(Protocol):
    """A transaction of the application, in progress."""

    async def enter(self, gate: int) -> None:
        """Come in through a gate. Raises Closed; the transaction is over then."""
        ...

    async def write(self, key: str, uid: str) -> None:
        """Count a key up and put an id into its bag. Raises Guarded; the transaction is over then."""
        ...

    async def commit(self) -> None:
        """Commit; returns when it is acknowledged."""
        ...

    async def rollback(self) -> None:
        """Give it up; idempotent."""
        ...


class Held(Protocol):
    """A lease as its holder sees it."""

    token: int

    def alive(self) -> bool:
        """Whether it is held, by the holder's clock."""
        ...

    async def release(self) -> None:
        """Give it up."""
        ...

    def cut(self) -> None:
        """From now on no renewal of it reaches the catalog."""
        ...


class Stage(Protocol):
    """Shards, a catalog and one job, on which a fact is played. Time is that of the running loop."""

    job: Job
    leg: Leg
    moving: list[str]
    """Keys of the leg."""
    staying: list[str]
    """Keys of its source that stay."""

    async def lease(self, ttl_s: float) -> Held | None:
        """Take the job's lease, if it is free at this moment."""
        ...

    def world(self, lease: Held) -> World:
        """The world of a runner that holds the lease."""
        ...

    async def stored(self) -> Job:
        """The job's record."""
        ...

    async def begin(self, shard_id: str, name: str) -> Client:
        """A transaction, through no gate yet."""
        ...

    async def rows(self, shard_id: str) -> Rows:
        """What a snapshot of a shard shows now of all keys that were ever written."""
        ...

    async def keys(self, shard_id: str) -> set[str]:
        """The job's key table at a shard."""
        ...

    def new_gate(self) -> int:
        """A number that no gate has had."""
        ...

    def sent_open(self, world: World, shard_id: str, number: int) -> Callable[[], Awaitable[None]]:
        """`open_gate` as the runner sends it now; it arrives when this is called."""
        ...

    def losing(
        self, world: World, what: Literal["question", "answer"]
    ) -> AbstractAsyncContextManager[Callable[[], Awaitable[None]]]:
        """Inside, the next change of the catalog loses that. Calling what it gives lets a lost question arrive."""
        ...

    def stalled(self, shard_id: str) -> AbstractAsyncContextManager[None]:
        """Inside, commits wait with their WAL written; they are acknowledged afterwards."""
        ...

    def lagging(self, shard_id: str) -> AbstractAsyncContextManager[None]:
        """Inside, the shard's replica replays nothing."""
        ...

    async def replica_gates(self, shard_id: str) -> tuple[int, ...]:
        """The gates that are open at the shard's replica."""
        ...

    async def lose_slot(self, leg: Leg) -> None:
        """The forward slot of a leg is gone."""
        ...

    async def set_back(self, leg: Leg) -> None:
        """The target forgets what its forward stream has applied last, as after a failover to one that was behind."""
        ...


Fact = Callable[[Stage], Awaitable[None]]


def play(stage: Stage, fact: Fact) -> Awaitable[None]:
    """Play a script; it has a minute."""
    return asyncio.wait_for(fact(stage), 60)
