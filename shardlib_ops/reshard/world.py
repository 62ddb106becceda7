"""All that a job's runner sees of the world: the catalog, the shards, the streams between them, and time.

The decisions of a job (`resharder.py`, `cutover/`) are written against these protocols alone; `servers.py` is the real
world. A verb either has happened when it returns, or raises; after an error it may have happened. Every verb may be
asked again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from shardlib.fence.gate import Closing
from shardlib.topology import Topology
from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.job import Job, Leg, Wish

__all__ = ["Blocked", "Failure", "Flow", "Lost", "Mismatch", "Side", "Superseded", "World"]


class Failure(Exception):  # noqa: N818 - the job fails, not the program
    """The job cannot go on and is undone. The message is for the operator: what is wrong, and the way out."""


class Mismatch(Failure):
    """The two sides of a leg differ where they must not."""


class Lost(Exception):  # noqa: N818 - an answer of the world
    """A server, or the catalog, does not answer now. The same is tried again later."""


class Superseded(Exception):  # noqa: N818 - an answer of the world
    """Another runner has taken the job: this one stops at once and touches nothing."""


class Blocked(Exception):  # noqa: N818 - an answer of the world
    """Somebody's transaction is in the way for now. The message names it."""


class Flow(Protocol):
    """The stream of a leg in one direction. See `stream.Stream`."""

    async def create_slot(self) -> None:
        """Make its slot at the origin, so that no change from now on is lost; idempotent.

        Raises:
            Blocked: a transaction at the origin stands in the way.
        """
        ...

    async def drop_slot(self) -> None:
        """Give its slot up; idempotent."""
        ...

    async def usable(self) -> bool:
        """Whether the slot is there and can go on from where the sink is."""
        ...

    async def run(self) -> None:
        """Carry changes until cancelled."""
        ...

    @property
    def lag_bytes(self) -> int | None:
        """Bytes of WAL of the origin that are not applied; None while unknown."""
        ...

    async def heard(self, message: str, *, timeout_s: float) -> None:
        """Wait until everything before a barrier message is committed at the sink, and its keys at both sides.

        Raises:
            TimeoutError: it was not heard in time.
        """
        ...


class Side(Protocol):
    """One shard of a job, at its primary. What changes something is refused unless this runner holds the job."""

    async def identity(self) -> str:
        """Which server this is: another text after a failover, the same one after a crash."""
        ...

    async def claim(self) -> None:
        """Take the job over here: runners before this one, and this one's own earlier rounds, are ended and refused.

        Raises:
            TimeoutError: something of theirs does not end.
        """
        ...

    async def prepare(self) -> None:
        """Make the job's key table, publication and inactive guard; idempotent."""
        ...

    async def retire(self) -> None:
        """Remove everything the job made here, its slots included; idempotent. The last verb on this side."""
        ...

    async def gates(self) -> tuple[int, ...]:
        """The numbers of the gates that are open."""
        ...

    async def open_gate(self, number: int) -> None:
        """Open a gate; idempotent."""
        ...

    async def close_gate(self, number: int, *, budget_s: float) -> Closing:
        """Close a gate within a budget; one that is closed counts as closed."""
        ...

    async def replayed(self, lsn: str, *, timeout_s: float) -> None:
        """Wait until every replica that may be promoted has replayed up to `lsn`.

        Raises:
            Blocked: one has not; it is named.
        """
        ...

    async def replicated(self, *, timeout_s: float) -> None:
        """Wait until every replica that may be promoted has replayed all that is committed here by now.

        Raises:
            Blocked: one has not; it is named.
        """
        ...

    async def guard(self, *, active: bool) -> None:
        """Let the database refuse, or not refuse any more, whoever writes moved rows here past the gates."""
        ...

    async def foreign_writers(self) -> tuple[str, ...]:
        """Transactions in flight that wrote to sharded tables before the guard was raised last.

        Also those behind a gate that is open: what they write to a table that they had written before does not meet
        the guard, whatever row it is.
        """
        ...

    async def old_writers(self, *, older_s: float) -> tuple[str, ...]:
        """Transactions in flight, older than so many seconds, that have written to sharded tables."""
        ...

    async def barrier(self, message: str) -> None:
        """Write a message into the WAL, after everything that has committed."""
        ...

    async def wal_position(self) -> str:
        """An LSN past everything that has committed here."""
        ...


class World(Protocol):
    """The world of one job, held by this runner under a lease."""

    now: Callable[[], float]
    """Monotonic seconds."""
    sleep: Callable[[float], Awaitable[None]]
    jitter: Callable[[], float]
    """A number in 0..1 at random."""
    stamp: Callable[[], str]
    """The wall clock as UTC in ISO 8601: a label for people, which decides nothing but when a retention is over."""
    nonce: Callable[[], str]
    """A text that no other call gives."""
    waits: Callable[[str | None], Awaitable[None]]
    """Told while a verb waits for others: for whom, in words for the operator, and None when it goes on."""

    async def anew(self) -> None:
        """Begin a round: after the next `Side.claim`, nothing that was sent before has an effect there any more.

        The sides are those servers that the topology names now.

        Raises:
            Lost: the catalog does not answer.
            Superseded: there were too many rounds under this lease.
        """
        ...

    async def topology(self) -> Topology:
        """The stored topology, read now. It names the servers that the sides are.

        Raises:
            Lost: no answer, or a shard of the job has got another primary in this round.
        """
        ...

    def check_tables(self, found: Topology) -> None:
        """The cluster's tables are those that this runner moves.

        Raises:
            Failure: they are not: rows of the others would stay behind.
        """
        ...

    async def publish(self, after: Topology, *, expected: int) -> bool:
        """Swap the topology while the lease is held; False if another version is stored.

        Raises:
            Lost: the outcome is unknown.
            Superseded: the lease is lost.
        """
        ...

    async def save(self, job: Job) -> None:
        """Store the job's record while the lease is held.

        Raises:
            Lost: the outcome is unknown; saving the same again is right.
            Superseded: the lease is lost.
        """
        ...

    async def wish(self) -> Wish:
        """What the operator asks of the job now."""
        ...

    def side(self, shard_id: str) -> Side:
        """One shard of the job."""
        ...

    def flow(self, leg: Leg, direction: Direction) -> Flow:
        """One stream of the job."""
        ...

    async def schema_before_rows(self, leg: Leg) -> None:
        """The target has the source's tables, empty or equal in shape, and the reference tables' rows.

        Raises:
            Failure: tables differ, or the target holds rows of the ranges already.
        """
        ...

    async def schema_after_rows(self, leg: Leg) -> None:
        """The target has the source's indexes and constraints."""
        ...

    async def validate_foreign_keys(self, leg: Leg) -> tuple[str, ...]:
        """Check the target's foreign keys that were made before its rows were there; no writer waits for it.

        Returns:
            those that do not hold, as `table.constraint`; they stay as they are.

        Raises:
            Blocked: a lock could not be had.
        """
        ...

    async def copied(self, leg: Leg) -> bool:
        """Whether the leg's copy is whole, its slot included."""
        ...

    async def copy(self, leg: Leg, pause: Callable[[], Awaitable[None]]) -> None:
        """Copy what is not copied yet. `pause` is awaited between chunks, and may raise."""
        ...

    async def compare(self, leg: Leg, flow: Flow, *, since: str | None) -> Compared:
        """Compare both sides while they run: all rows, or those of keys changed after LSN `since`.

        Raises:
            Mismatch: they differ.
        """
        ...

    async def compare_closed(self, leg: Leg, *, since: str) -> int:
        """Compare the keys changed after `since`, on a leg that is closed and drained; how many.

        Raises:
            Mismatch: they differ.
        """
        ...

    async def advance_sequences(self, leg: Leg, direction: Direction, *, ahead: int) -> None:
        """The side that takes over gives no number that the other has given, plus `ahead`."""
        ...

    async def start_reverse(self, leg: Leg, lsn: str) -> None:
        """Write down that the reverse flow starts past this LSN of the target."""
        ...

    async def purge(self, leg: Leg, shard_id: str, pause: Callable[[], Awaitable[None]]) -> None:
        """Delete the job's rows, of this leg and its others, from a shard that does not serve them."""
        ...

    def running(self, flows: Sequence[Flow]) -> AbstractAsyncContextManager[None]:
        """Run streams for as long as the body runs; what breaks one ends the body."""
        ...


@dataclass(frozen=True, slots=True)
class Compared:
    """Both sides are equal.

    Attributes:
        lsn: up to which changes of the source are covered.
        keys: how many keys were looked at.
        left: how many rows have changed meanwhile, as far as that is known.
    """

    lsn: str
    keys: int
    left: int = 0
