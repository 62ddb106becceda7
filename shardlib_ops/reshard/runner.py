"""Drives one job from phase to phase until it rests.

There is one way through a job, and it is the way a runner takes that finds the job half done: look at the topology and
the record, do the next thing, look again. A server that went away, a runner that was killed and a step that was blocked
all end in a second look. What counts as done is only what the topology and the shards themselves hold; the record may
lag behind them by one step.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from shardlib.errors import InvalidTopology
from shardlib.topology import Topology
from shardlib.topology.model import MoveState
from shardlib.topology.moving import announce, finish, moves_of
from shardlib_ops.reshard.attempts import Attempts
from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.cutover import Limits, reopen
from shardlib_ops.reshard.gates import change, sweep
from shardlib_ops.reshard.job import Job, Status, Wish
from shardlib_ops.reshard.steered import Cancelled, Steered
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.validation import Validation, replaced_shards
from shardlib_ops.reshard.world import Blocked, Failure, Flow, Lost, Superseded, World

__all__ = ["JobRunner"]

_BACK_OFF_S: Final = (0.1, 0.3, 1.0, 3.0)
_NOT_UNDONE_S: Final = (3.0, 10.0, 30.0)
_SWEEP_S: Final = 5.0
_REPLICATED_S: Final = 10.0


class JobRunner:
    """One job in one world.

    Args:
        world: held by this runner under the job's lease.
        job: its record as it is stored.
        limits: of the cutover.
        complete: go through the validation window at once.
        stay: keep both sides in step until the operator decides; else the job rests there.
        step: told the name of each step when it is done.
    """

    def __init__(
        self,
        world: World,
        job: Job,
        *,
        limits: Limits,
        complete: bool = False,
        stay: bool = False,
        step: Callable[[str], Awaitable[None]],
    ) -> None:
        self.world = world
        self._held = Steered(world, job.checked(), step)
        self._attempts = Attempts(world, self._held, limits)
        self._validation = Validation(world, self._held, limits, complete=complete, stay=stay)
        self._not_undone = 0  # times in a row that undoing the job has not begun
        world.waits = self._held.note

    @property
    def job(self) -> Job:
        """Its record as it is stored."""
        return self._held.job

    async def go(self) -> Job:
        """Until the job is over, or rests in `validation`.

        Raises:
            Superseded: another runner has the job.
        """
        failures = 0
        while True:
            try:
                if await self._advance():
                    return self.job
                failures = 0
            except Cancelled:
                continue
            except Failure as failure:
                await self._fail(str(failure))
            except (Lost, Blocked, TimeoutError) as error:
                await self._held.note(str(error) or "a step took too long")
                pause_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)]
                failures += 1
                await self.world.sleep(pause_s * (0.5 + self.world.jitter()))

    async def _fail(self, reason: str) -> None:
        """Before the switch the job is undone; after it there is nothing to undo, and the operator decides."""
        try:
            if self.job.status in (Status.VALIDATION, Status.CLEANUP):
                await self._held.note(reason)
                await self.world.sleep(_BACK_OFF_S[-1])
                return
            await self._claim()
            state = self._state(await self.world.topology())
            if state is MoveState.SWITCHED:
                await self._held.note(reason)
            else:
                await self._undo(Status.FAILED, reason, announced=state is not None)
            self._not_undone = 0
        except (Failure, Lost, Blocked, TimeoutError) as error:
            also = str(error) or "a step took too long"
            await self._held.note(reason if also == reason else f"{reason}; and {also}")
            pause_s = _NOT_UNDONE_S[min(self._not_undone, len(_NOT_UNDONE_S) - 1)]
            self._not_undone += 1
            await self.world.sleep(pause_s * (0.5 + self.world.jitter()))

    async def _undo(self, outcome: Status, reason: str | None, *, announced: bool) -> None:
        """Go back, when it is certain that no swap of an earlier attempt can still switch the ranges."""
        if announced:
            await reopen(self.world, self.job, self.job.sources, self.world.nonce)
        await self._held.to(Status.CLEANUP, outcome=outcome, error=reason)

    def _state(self, topology: Topology) -> MoveState | None:
        """Where the rows are, by the one record that counts."""
        moves = moves_of(topology, self.job.id)
        return moves[0].state if moves else None

    async def _claim(self) -> None:
        """From here on nothing happens any more of what earlier rounds have sent, answered or not."""
        await self.world.anew()
        await together(self.world.side(shard_id).claim() for shard_id in self.job.shards)
        await self._held.step("claimed")

    async def _advance(self) -> bool:
        """Do the next thing; whether the job rests."""
        if self.job.status.over:
            return True
        await self._claim()
        servers = await self._servers()
        if self.job.started_at is None:
            await self._held.change(started_at=self.world.stamp(), servers=servers)
        state = self._state(await self.world.topology())
        if self.job.status is Status.CLEANUP:
            await self._clean_up()
            return True
        if not self.job.servers or (self.job.status is Status.PENDING and servers != self.job.servers):
            # Nothing is copied yet; or an earlier release has begun the job, which did not write this down.
            await self._held.change(servers=servers)
        if state is MoveState.SWITCHED:
            if self.job.status not in (Status.CUTOVER, Status.VALIDATION):
                raise Superseded(f"job {self.job.id} is switched, and was not that far when this runner read it")
            if self.job.status is not Status.VALIDATION:
                await self._held.to(Status.VALIDATION, switched_at=self.world.stamp(), error=None)
            return await self._validation.validate(servers)
        if self.job.status is Status.VALIDATION:
            await self._held.to(Status.CLEANUP, outcome=Status.ROLLED_BACK, error=None)
        elif await self.world.wish() is Wish.CANCEL:
            await self._undo(Status.CANCELLED, None, announced=state is not None)
        else:
            if self.job.status is Status.PENDING:
                await self._pause()
                await self._prepare(announced=state is not None)
            elif servers != self.job.servers:
                await self._start_over(servers)
            await self._copy_and_switch()
        return False

    async def _servers(self) -> dict[str, str]:
        found = await together(self.world.side(shard_id).identity() for shard_id in self.job.shards)
        return dict(zip(self.job.shards, found, strict=True))

    async def _start_over(self, servers: dict[str, str]) -> None:
        """What a replica was promoted without cannot be told from here: each leg that touches it is copied anew.

        A source has lost what its stream may have brought already, and its slot with it; a target, rows, indexes, or
        how far the stream was. The record follows last: who is killed before begins again.
        """
        await reopen(self.world, self.job, self.job.sources, self.world.nonce)
        replaced = replaced_shards(self.job, servers)
        compared = dict(self.job.compared)
        for leg in self.job.legs:
            if leg.source in replaced or leg.target in replaced:
                for flow in (self.world.flow(leg, "forward"), self.world.flow(leg, "reverse")):
                    await flow.drop_slot()
                compared.pop(leg.number, None)
        topology = await self.world.topology()
        names = ", ".join(topology.shard_by_id(shard_id).name for shard_id in replaced)
        told = f"the copy is made anew: after a failover, another server serves {names}"
        await self._prepare(announced=True, servers=servers, compared=compared, error=told)

    async def _prepare(self, *, announced: bool, error: str | None = None, **changes: Any) -> None:
        for leg in self.job.legs:
            await self._held.obeying(partial(self.world.schema_before_rows, leg))
        await self._held.step("schema_copied")
        await self._held.obeying(lambda: together(self.world.side(shard_id).prepare() for shard_id in self.job.shards))
        await self._held.step("sides_prepared")
        if not announced:
            await change(self.world, self._announced)
        await self._held.step("announced")
        # From here on every transaction knows of the moves, or is refused.
        await sweep(self.world, self.job.shards, budget_s=_SWEEP_S)
        await self._held.to(Status.PRECOPY, error=error, **changes)

    def _announced(self, found: Topology) -> Topology:
        if self._state(found) is not None:
            # A swap whose answer was lost has arrived after all, or another runner was faster.
            raise Blocked("the job's moves were announced meanwhile")
        self.world.check_tables(found)
        try:
            return announce(found, self.job.moves, nonce=self.world.nonce())
        except InvalidTopology as error:
            raise Failure(str(error)) from error

    def _finished(self, found: Topology) -> Topology:
        if self._state(found) is None:
            raise Blocked("the job's moves were taken away meanwhile")
        return finish(found, self.job.id, nonce=self.world.nonce())

    async def _pause(self) -> None:
        """Awaited between two pieces of long work: obeys the operator."""
        await self._held.pause()

    def _flows(self, direction: Direction) -> dict[int, Flow]:
        return {leg.number: self.world.flow(leg, direction) for leg in self.job.legs}

    async def _copy_and_switch(self) -> None:
        await reopen(self.world, self.job, self.job.sources, self.world.nonce)
        await sweep(self.world, self.job.shards, budget_s=_SWEEP_S)
        for leg in self.job.legs:
            if not await self.world.copied(leg):
                if self.job.status is not Status.PRECOPY:
                    await self._held.to(Status.PRECOPY, compared={}, error="the copy is made anew: its stream was lost")
                await self._held.obeying(partial(self.world.copy, leg, self._pause), stands_still=True)
                await self._held.step("leg_copied")
        if self.job.status is Status.PRECOPY:
            for leg in self.job.legs:
                await self._held.obeying(partial(self.world.schema_after_rows, leg))
            await self._held.step("schema_finished")
            await self._held.to(Status.DELTASYNC, error=None)
        flows = self._flows("forward")
        async with self.world.running(list(flows.values())):
            await self._attempts.compare(flows)
            for flow in self._flows("reverse").values():
                await self._held.obeying(flow.create_slot)
            await self._held.step("reverse_slots")
            await self._attempts.until_switched("forward", flows)
        await self._held.to(Status.VALIDATION, switched_at=self.world.stamp(), error=None)

    async def _clean_up(self) -> None:
        """Remove what is not wanted any more, whichever way the job went."""
        outcome = self.job.outcome or Status.FAILED
        done = outcome is Status.COMPLETED
        serving = self.job.targets if done else self.job.sources
        if self._state(await self.world.topology()) is not None:
            await reopen(self.world, self.job, serving, self.world.nonce)
            await self._drop_slots()
            await self._held.step("slots_dropped")
            old = {leg.source if done else leg.target: leg for leg in self.job.legs}
            for shard_id, leg in old.items():
                await self.world.purge(leg, shard_id, self._pause)
                # Promoted without that, a replica would show the old rows again, which nothing hides any more.
                await self.world.side(shard_id).replicated(timeout_s=_REPLICATED_S)
                await self._held.step("shard_purged")
            await change(self.world, self._finished)
            await self._held.step("finished")
        await self._drop_slots()
        # Nobody's scans may look at the key tables any more when they are dropped.
        await sweep(self.world, self.job.shards, budget_s=_SWEEP_S)
        if self._state(await self.world.topology()) is not None:
            # The sweep has ended a swap that was still on its way; one that was faster is seen now.
            raise Blocked("the job's moves were announced after all")
        await together(self.world.side(shard_id).retire() for shard_id in self.job.shards)
        await self._held.step("retired")
        await self._held.to(outcome, completed_at=self.world.stamp(), error=self._held.reason)

    async def _drop_slots(self) -> None:
        flows: list[Flow] = [*self._flows("forward").values(), *self._flows("reverse").values()]
        await together(flow.drop_slot() for flow in flows)
