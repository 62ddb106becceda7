"""One attempt of a cutover, forward or back. Everything before the swap can be taken back; nothing after it.

The order is what makes it safe, and each step leans on the one before::

    close the gates          nobody comes in any more, and those who were in have committed
    raise the guard          who never takes that gate (psql, a trigger) is refused from here on
    wait for foreign writers those of them who wrote before the guard have committed, behind other gates also
    barrier, heard           all of that is applied at the side that takes over, and its keys are known at both
    compare                  what changed since the last comparison is equal on both sides
    replayed                 no replica of the old side can be promoted with an open gate
    sequences, reverse start the new side gives fresh numbers; the way back has no gap
    replicated               replicas of both sides have replayed all of that: none is promoted without rows of the move
    swap                     one compare-and-swap of the topology: the only step that counts

The gates of the side that takes over are open before a switch. Those of a rollback open after it, when the guard of
that side is down, which may not be before the swap is certain.

The closed gate counts only when replicas that may be promoted have replayed its drop, and the barrier is written after
the drop has committed and the guard stands: a position taken earlier would miss writes that were let in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from shardlib.topology import Topology
from shardlib.topology.model import MoveState
from shardlib.topology.moving import give_back, moves_of, moving_gates, renew_moving, switch
from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.cutover.decide import Limits
from shardlib_ops.reshard.gates import change, describe_holders, open_named, reserve
from shardlib_ops.reshard.job import Job, Leg
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.world import Blocked, Flow, Lost, World

__all__ = ["Cutover", "Outcome", "reopen"]

_FOREIGN_PAUSE_S: Final = 0.005
_OTHERS: Final = "somebody else changed the topology meanwhile"


class Outcome(Enum):
    """How an attempt ended, when it did not raise."""

    SWITCHED = auto()
    GAVE_WAY = auto()
    """Nothing has changed, and the ranges are open again."""


@dataclass
class Cutover:
    """The attempts of one job in one direction.

    Attributes:
        world: where it happens.
        job: what moves.
        direction: `forward` is the switch, `reverse` the rollback.
        flows: leg number -> the stream that leads to the side that takes over.
        limits: how long it may take.
        step: told the name of each step as it is done.
        nonce: a new unique text for each topology.
        waiting_for: why the last attempt gave way.
    """

    world: World
    job: Job
    direction: Direction
    flows: Mapping[int, Flow]
    limits: Limits
    step: Callable[[str], Awaitable[None]]
    nonce: Callable[[], str]
    waiting_for: str = ""

    @property
    def serving(self) -> tuple[str, ...]:
        """The shards that serve the ranges until the swap."""
        return self.job.sources if self.direction == "forward" else self.job.targets

    async def attempt(self, number: int, compared: Mapping[int, str]) -> Outcome:
        """Try once.

        Args:
            number: of the attempt; names its barrier.
            compared: leg number -> LSN up to which the leg was compared; for the rollback, none.

        Raises:
            Failure: the cluster's tables are not those that were copied.
            Mismatch: the sides differ. The ranges are open again on the old side.
            Lost: the outcome of the swap is unknown, or a server is away and the ranges may still be closed: whoever
                looks at the topology next finds out, and opens them.
            Superseded: another runner has the job.
        """
        topology = await self.world.topology()
        if moves_of(topology, self.job.id) != self._expected(topology):
            raise Blocked("the job's moves are not where this attempt expects them")
        if self.direction == "forward":
            self.world.check_tables(topology)
        # Before anything is closed: writers do not wait for it.
        try:
            await self._replicated(self.limits.budget_s)
        except Blocked as error:
            self.waiting_for = str(error)
            return Outcome.GAVE_WAY
        make = switch if self.direction == "forward" else give_back
        after = await reserve(self.world, topology, make(topology, self.job.id, nonce=self.nonce()))
        if after is None:
            self.waiting_for = _OTHERS
            return Outcome.GAVE_WAY
        until = self.world.now() + self.limits.budget_s
        whole = asyncio.timeout(self.limits.budget_s * 4)
        try:
            async with whole:
                await self._close(topology, until)
                await self._drain(number, until)
                await self._compare(compared, until)
                await self._hand_over(until)
                if self.direction == "forward":
                    await self._open(topology, after)
                    self._refuse_late(until)
        except (Blocked, TimeoutError) as error:
            self.waiting_for = str(error) or "the attempt took too long"
            await self._take_back()
            if whole.expired():
                # Something did not answer, and may still be under way there: only a new round ends it.
                raise Lost(self.waiting_for) from error
            return Outcome.GAVE_WAY
        except BaseException:
            await self._take_back()
            raise
        if not await self.world.publish(after, expected=after.version - 1):
            self.waiting_for = _OTHERS
            await self._take_back()
            return Outcome.GAVE_WAY
        await self.step("switched")
        if self.direction == "reverse":
            # The sources' guard stands until the swap is certain: what somebody without a gate wrote there before a
            # swap that fails would be lost. Who comes by the new topology waits for its gates until the guard is down.
            await together(self.world.side(shard_id).guard(active=False) for shard_id in self.job.sources)
            await self._open(topology, after)
        return Outcome.SWITCHED

    async def _open(self, before: Topology, after: Topology) -> None:
        await open_named(self.world, before, after)
        await self.step("gates_opened")

    def _expected(self, topology: Topology) -> tuple[object, ...]:
        moves = moves_of(topology, self.job.id)
        wanted = "copying" if self.direction == "forward" else "switched"
        return moves if moves and all(move.state.value == wanted for move in moves) else ()

    async def _close(self, topology: Topology, until: float) -> None:
        gates = moving_gates(topology, self.job.id)
        budget_s = min(self.limits.close_s, until - self.world.now())
        closings = await together(
            self.world.side(gate.shard_id).close_gate(gate.number, budget_s=budget_s) for gate in gates
        )
        if held := [closing for closing in closings if not closing.closed]:
            raise Blocked("transactions hold the moving ranges: " + describe_holders(held[0]))
        self._closed_at = {
            gate.shard_id: closing.lsn for gate, closing in zip(gates, closings, strict=True) if closing.lsn
        }
        for shard_id in self.serving:
            named = set(topology.gates_of(shard_id))
            stale = [n for n in await self.world.side(shard_id).gates() if n not in named and n < topology.next_gate]
            if stale:
                # Somebody with an older topology may come through it, whatever range it covered.
                raise Blocked(f"shard {shard_id}: gate {stale[0]} of an older topology is not closed yet")
        await self.step("gates_closed")

    async def _drain(self, number: int, until: float) -> None:
        sides = [self.world.side(shard_id) for shard_id in self.serving]
        await together(side.guard(active=True) for side in sides)
        await self.step("guarded")
        for side in sides:
            while writers := await side.foreign_writers():
                if self.world.now() > until:
                    raise Blocked("transactions write to sharded tables past the closed gates: " + "; ".join(writers))
                await self.world.sleep(_FOREIGN_PAUSE_S)
        message = f"{self.job.id}/{self.direction}/{number}/{self.nonce()}"
        await together(side.barrier(message) for side in sides)
        left_s = max(0.05, until - self.world.now())
        replayed = [
            self.world.side(shard_id).replayed(lsn, timeout_s=left_s) for shard_id, lsn in self._closed_at.items()
        ]
        await together([*(flow.heard(message, timeout_s=left_s) for flow in self.flows.values()), *replayed])
        await self.step("drained")

    async def _compare(self, compared: Mapping[int, str], until: float) -> None:
        limit = asyncio.timeout(max(0.05, until - self.world.now()))
        try:
            async with limit:
                await together(
                    self.world.compare_closed(leg, since=compared[leg.number])
                    for leg in self.job.legs
                    if leg.number in compared
                )
        except TimeoutError:
            if not limit.expired():
                raise
            raise Blocked(
                f"what changed lately was not compared within {self.limits.budget_s:g} s: it is tried again; too many "
                "rows need more, or a quieter time (Resharder(limits=Limits(budget_s=...)))"
            ) from None
        await self.step("compared")

    async def _hand_over(self, until: float) -> None:
        await together(self.world.advance_sequences(leg, self.direction, ahead=0) for leg in self.job.legs)
        if self.direction == "forward":
            await together(self._start_reverse(leg) for leg in self.job.legs)
        await self._replicated(max(0.05, until - self.world.now()))
        self._refuse_late(until)
        await self.step("handed_over")

    def _refuse_late(self, until: float) -> None:
        if self.world.now() > until:
            raise Blocked(f"the ranges were closed for {self.limits.budget_s:g} s, which is all an attempt may take")

    async def _replicated(self, timeout_s: float) -> None:
        """Whoever is promoted next, of either side, has what this attempt leans on: the rows, the keys, the guard."""
        await together(self.world.side(shard_id).replicated(timeout_s=timeout_s) for shard_id in self.job.shards)

    async def _start_reverse(self, leg: Leg) -> None:
        await self.world.start_reverse(leg, await self.world.side(leg.target).wal_position())

    async def _take_back(self) -> None:
        """The ranges are open again on the side that has served them."""
        # Cancelled or not: writers wait for this.
        opening = asyncio.ensure_future(reopen(self.world, self.job, self.serving, self.nonce, certain=True))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            # Left to itself it could lower the guard of the next attempt.
            await asyncio.wait([opening])
            if not opening.cancelled():
                opening.exception()  # looked at; whoever looks at the topology next opens what is closed
            raise
        await self.step("given_way")


async def reopen(
    world: World, job: Job, serving: Sequence[str], nonce: Callable[[], str], *, certain: bool = False
) -> None:
    """Lower the guard on the shards that serve the moving ranges, and give the ranges new gates where one is closed.

    Before that it makes sure that no swap of an earlier attempt, whose outcome nobody heard, can still happen: a swap
    is bound to the topology's version, so a new version ends it. The guard goes first: whoever comes through the new
    gates must not meet it.

    Args:
        world: where it happens.
        job: what moves.
        serving: the shards that serve the ranges.
        nonce: a new unique text for each topology.
        certain: no swap is under way, so that no version is needed against it.

    Raises:
        Lost: a server or the catalog does not answer; to be tried again.
        Blocked: other shards serve the ranges, or the job's moves changed meanwhile; to be looked at again.
    """
    topology = await world.topology()
    moves = moves_of(topology, job.id)
    if any((move.source if move.state is MoveState.COPYING else move.target) not in serving for move in moves):
        # Nothing that was meant for the side that has served them may follow, least of all deleting on the other.
        raise Blocked("an attempt whose outcome was unknown has moved the ranges after all")

    def unmoved(found: Topology) -> Topology:
        if moves_of(found, job.id) != moves:
            raise Blocked("the job's moves changed while their gates were to be opened again")
        return found

    closed = [
        gate for gate in moving_gates(topology, job.id) if gate.number not in await world.side(gate.shard_id).gates()
    ]
    if closed and not certain:
        await change(world, lambda found: unmoved(found).evolve(nonce=nonce()))
    for shard_id in serving:
        await world.side(shard_id).guard(active=False)
    if closed:
        await change(world, lambda found: renew_moving(unmoved(found), job.id, nonce=nonce()))
