"""Drives one job from phase to phase until it rests.

There is one way through a job, and it is the way a runner takes that finds the job half done: look at the topology and
the record, do the next thing, look again. A server that went away, a runner that was killed and a step that was blocked
all end in a second look. What counts as done is only what the topology and the shards themselves hold; the record may
lag behind them by one step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final

from shardlib.errors import InvalidTopology
from shardlib.topology import Topology
from shardlib.topology.model import MoveState
from shardlib.topology.moving import announce, finish, moves_of
from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.cutover import Cutover, Limits, Outcome, ready, reopen
from shardlib_ops.reshard.gates import change, sweep
from shardlib_ops.reshard.job import WAY_BACK_LOST, Job, Leg, Status, Wish
from shardlib_ops.reshard.steered import Cancelled, Steered
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.world import Blocked, Compared, Failure, Flow, Lost, Superseded, World

__all__ = ["JobRunner"]

_BACK_OFF_S: Final = (0.1, 0.3, 1.0, 3.0)
_NOT_UNDONE_S: Final = (3.0, 10.0, 30.0)
_LOOK_S: Final = 0.25
_SWEEP_S: Final = 5.0
_ROUNDS_MAX: Final = 5
_PATIENCE_S: Final = 10.0
_REPLICATED_S: Final = 10.0
_SEQUENCE_MARGIN: Final = 1_000


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
        self.world, self.limits = world, limits
        self._held = Steered(world, job.checked())
        self._complete, self._stay, self._told = complete, stay, step
        self._streams_broke = False
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
                await self._note(str(error) or "a step took too long")
                pause_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)]
                failures += 1
                await self.world.sleep(pause_s * (0.5 + self.world.jitter()))

    async def _step(self, name: str) -> None:
        await self._told(name)

    async def _to(self, status: Status, **changes: Any) -> None:
        await self._held.to(status, **changes)
        await self._step(f"status_{status.value}")

    async def _note(self, error: str | None) -> None:
        await self._held.note(error)

    async def _fail(self, reason: str) -> None:
        """Before the switch the job is undone; after it there is nothing to undo, and the operator decides."""
        try:
            if self.job.status in (Status.VALIDATION, Status.CLEANUP):
                await self._note(reason)
                await self.world.sleep(_BACK_OFF_S[-1])
                return
            await self._claim()
            state = self._state(await self.world.topology())
            if state is MoveState.SWITCHED:
                await self._note(reason)
            else:
                await self._undo(Status.FAILED, reason, announced=state is not None)
            self._not_undone = 0
        except (Failure, Lost, Blocked, TimeoutError) as error:
            also = str(error) or "a step took too long"
            await self._note(reason if also == reason else f"{reason}; and {also}")
            pause_s = _NOT_UNDONE_S[min(self._not_undone, len(_NOT_UNDONE_S) - 1)]
            self._not_undone += 1
            await self.world.sleep(pause_s * (0.5 + self.world.jitter()))

    async def _undo(self, outcome: Status, reason: str | None, *, announced: bool) -> None:
        """Go back, when it is certain that no swap of an earlier attempt can still switch the ranges."""
        if announced:
            await reopen(self.world, self.job, self.job.sources, self.world.nonce)
        await self._to(Status.CLEANUP, outcome=outcome, error=reason)

    def _state(self, topology: Topology) -> MoveState | None:
        """Where the rows are, by the one record that counts."""
        moves = moves_of(topology, self.job.id)
        return moves[0].state if moves else None

    async def _claim(self) -> None:
        """From here on nothing happens any more of what earlier rounds have sent, answered or not."""
        await self.world.anew()
        await together(self.world.side(shard_id).claim() for shard_id in self.job.shards)
        await self._step("claimed")

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
                await self._to(Status.VALIDATION, switched_at=self.world.stamp(), error=None)
            return await self._validate(servers)
        if self.job.status is Status.VALIDATION:
            await self._to(Status.CLEANUP, outcome=Status.ROLLED_BACK, error=None)
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

    def _replaced(self, servers: dict[str, str]) -> list[str]:
        """The shards that another server stands in for, since a failover."""
        return [shard_id for shard_id in self.job.shards if servers[shard_id] != self.job.servers[shard_id]]

    async def _start_over(self, servers: dict[str, str]) -> None:
        """What a replica was promoted without cannot be told from here: each leg that touches it is copied anew.

        A source has lost what its stream may have brought already, and its slot with it; a target, rows, indexes, or
        how far the stream was. The record follows last: who is killed before begins again.
        """
        await reopen(self.world, self.job, self.job.sources, self.world.nonce)
        replaced = self._replaced(servers)
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
        await self._step("schema_copied")
        await self._held.obeying(lambda: together(self.world.side(shard_id).prepare() for shard_id in self.job.shards))
        await self._step("sides_prepared")
        if not announced:
            await change(self.world, self._announced)
        await self._step("announced")
        # From here on every transaction knows of the moves, or is refused.
        await sweep(self.world, self.job.shards, budget_s=_SWEEP_S)
        await self._to(Status.PRECOPY, error=error, **changes)

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
                    await self._to(Status.PRECOPY, compared={}, error="the copy is made anew: its stream was lost")
                await self._held.obeying(partial(self.world.copy, leg, self._pause), stands_still=True)
                await self._step("leg_copied")
        if self.job.status is Status.PRECOPY:
            for leg in self.job.legs:
                await self._held.obeying(partial(self.world.schema_after_rows, leg))
            await self._step("schema_finished")
            await self._to(Status.DELTASYNC, error=None)
        flows = self._flows("forward")
        async with self.world.running(list(flows.values())):
            await self._compare(flows)
            for flow in self._flows("reverse").values():
                await self._held.obeying(flow.create_slot)
            await self._step("reverse_slots")
            cutover = Cutover(self.world, self.job, "forward", flows, self.limits, self._step, self.world.nonce)
            await self._attempts(cutover)
        await self._to(Status.VALIDATION, switched_at=self.world.stamp(), error=None)

    async def _compared(self, leg: Leg, flows: dict[int, Flow], *, since: str | None) -> Compared:
        return await self._held.obeying(partial(self.world.compare, leg, flows[leg.number], since=since))

    async def _compare(self, flows: dict[int, Flow]) -> None:
        """The whole of each leg once, while it runs."""
        for leg in self.job.legs:
            if leg.number not in self.job.compared:
                result = await self._compared(leg, flows, since=None)
                await self._held.change(compared={**self.job.compared, leg.number: result.lsn})
                await self._step("leg_compared")

    async def _compare_changed(self, flows: dict[int, Flow]) -> None:
        """Rounds over what changed since, until little enough is left for the closed window."""
        for leg in self.job.legs:
            for _ in range(_ROUNDS_MAX):
                result = await self._compared(leg, flows, since=self.job.compared[leg.number])
                await self._held.change(compared={**self.job.compared, leg.number: result.lsn})
                if result.keys <= self.limits.changed_keys and result.left <= self.limits.changed_rows:
                    break

    async def _attempts(self, cutover: Cutover) -> bool:
        """Until one attempt has switched; False if it was a rollback, and the operator has withdrawn it.

        Raises:
            Mismatch: the sides differ.
        """
        flows = dict(cutover.flows)
        pause_s = self.limits.pause_s
        while True:
            await self._pause()
            if await self._withdrawn(cutover):
                return False
            if (waiting := ready([flow.lag_bytes for flow in flows.values()], self.limits)) is not None:
                await self._note(waiting)
                await self.world.sleep(_LOOK_S * (0.5 + self.world.jitter()))
                continue
            # Its snapshot waits for them too, and the stream stands still meanwhile.
            await self._wait_for_old_writers(cutover)
            if cutover.direction == "forward":
                await self._compare_changed(flows)
                for leg in self.job.legs:
                    await self.world.advance_sequences(leg, "forward", ahead=_SEQUENCE_MARGIN)
            if await self._wait_for_old_writers(cutover):
                continue  # much has changed meanwhile
            await sweep(self.world, cutover.serving, budget_s=_SWEEP_S)
            if await self._withdrawn(cutover):
                return False
            number = self.job.attempts + 1
            if cutover.direction == "forward" and self.job.status is Status.DELTASYNC:
                await self._to(Status.CUTOVER, attempts=number)
            else:
                await self._held.change(attempts=number)
            compared = self.job.compared if cutover.direction == "forward" else {}
            if await cutover.attempt(number, compared) is Outcome.SWITCHED:
                return True
            await self._note(f"attempt {number} gave way: {cutover.waiting_for}")
            await self.world.sleep(pause_s * (0.5 + self.world.jitter()))
            pause_s = min(self.limits.pause_max_s, pause_s * 2)

    async def _withdrawn(self, cutover: Cutover) -> bool:
        return cutover.direction == "reverse" and await self.world.wish() not in (Wish.ROLLBACK, Wish.PAUSE)

    async def _wait_for_old_writers(self, cutover: Cutover) -> bool:
        """While a transaction is older than an attempt may take, the ranges are not closed for it in vain.

        It is waited for until it has ended. Those that come one after the other, and are old by turns, may end in time
        all the same, so they are waited for a while only.

        Returns:
            whether one was waited for longer than that while.
        """
        began, long = self.world.now(), False
        while True:
            waited_s = self.world.now() - began
            # After the while, those that were old already when it began.
            older_s = self.limits.budget_s + (waited_s if waited_s > _PATIENCE_S else 0.0)
            found = await together(
                self.world.side(shard_id).old_writers(older_s=older_s) for shard_id in cutover.serving
            )
            if not (writers := [writer for some in found for writer in some]):
                return long
            long = waited_s > _PATIENCE_S
            await self._note("the switch waits for transactions that write to sharded tables: " + "; ".join(writers))
            await self._pause()
            if await self._withdrawn(cutover):
                return True
            await self.world.sleep(_LOOK_S * (0.5 + self.world.jitter()))

    async def _validate(self, servers: dict[str, str]) -> bool:
        """Both sides in step, the targets serve; whether the job rests here."""
        replaced = self._replaced(servers)
        await together(self.world.side(shard_id).prepare() for shard_id in replaced)
        await together(self.world.side(shard_id).guard(active=True) for shard_id in self.job.sources)
        await reopen(self.world, self.job, self.job.targets, self.world.nonce)
        for flow in self._flows("forward").values():
            await flow.drop_slot()
        await self._step("forward_stopped")
        flows = self._flows("reverse")
        if replaced or not all([await flow.usable() for flow in flows.values()]):
            return await self._one_way(servers)
        if self._streams_broke and self._may_complete(await self.world.wish()):
            # They may break each time before the foreign keys are checked, and are not needed to complete.
            await self._check_foreign_keys()
            return await self._complete_now()
        try:
            return await self._keep_in_step(flows)
        except (Failure, Lost, Blocked, TimeoutError):
            self._streams_broke = True
            raise

    async def _keep_in_step(self, flows: dict[int, Flow]) -> bool:
        """Carry back what is written, until the operator decides or the retention is over; whether the job rests."""
        async with self.world.running(list(flows.values())), self._checking_foreign_keys() as checking:
            while True:
                wish = await self._held.heed()
                if wish is Wish.ROLLBACK:
                    await sweep(self.world, self.job.targets, budget_s=_SWEEP_S)
                    if await self._attempts(
                        Cutover(self.world, self.job, "reverse", flows, self.limits, self._step, self.world.nonce)
                    ):
                        await self._to(Status.CLEANUP, outcome=Status.ROLLED_BACK, error=None)
                        return False
                    await self._note(None)
                    continue
                if not checking.done():
                    await self.world.sleep(_LOOK_S)
                    continue
                checking.result()
                if self._may_complete(wish):
                    break
                if not self._stay and ready([flow.lag_bytes for flow in flows.values()], self.limits) is None:
                    return True
                await self.world.sleep(_LOOK_S)
        return await self._complete_now()

    async def _complete_now(self) -> bool:
        await self._to(Status.CLEANUP, outcome=Status.COMPLETED, purging=True, error=None)
        return False

    @asynccontextmanager
    async def _checking_foreign_keys(self) -> AsyncIterator[asyncio.Future[None]]:
        """Those that were made on the targets before their rows were there are checked, while clients go on."""
        checking = asyncio.ensure_future(self._check_foreign_keys())
        try:
            yield checking
        finally:
            checking.cancel()
            await asyncio.wait([checking])
            if not checking.cancelled():
                checking.exception()  # who waited for it has looked

    async def _check_foreign_keys(self) -> None:
        left = [name for leg in self.job.legs for name in await self._foreign_keys(leg)]
        if left:
            await self._note(f"foreign keys that hold on the source do not hold on the target: {', '.join(left)}")

    async def _foreign_keys(self, leg: Leg) -> tuple[str, ...]:
        return await self._held.obeying(partial(self.world.validate_foreign_keys, leg))

    def _may_complete(self, wish: Wish) -> bool:
        if wish in (Wish.PAUSE, Wish.ROLLBACK):
            return False  # the old copies are kept for it, however long that takes
        return wish is Wish.COMPLETE or self._complete or self._kept_long_enough()

    def _kept_long_enough(self) -> bool:
        """Whether the retention is over.

        By the wall clock, since it has to outlive the runner. That is harmless here: a wrong clock makes the window
        shorter or longer, and no decision about where the rows are looks at it.
        """
        if self.job.retention_s is None or self.job.switched_at is None:
            return False
        kept = datetime.fromisoformat(self.world.stamp()) - datetime.fromisoformat(self.job.switched_at)
        return kept.total_seconds() >= self.job.retention_s

    async def _one_way(self, servers: dict[str, str]) -> bool:
        """The way back is lost with its stream: only completing is left, and the operator is told.

        The old copies stay as long as they would with it: they are what an operator has if the new ones are bad.
        """
        for flow in self._flows("reverse").values():
            await flow.drop_slot()  # nobody reads it any more, and it would keep WAL
        if servers != self.job.servers:
            await self._held.change(servers=servers)
        if self._may_complete(await self._held.heed()):
            return await self._complete_now()
        if WAY_BACK_LOST not in (self.job.error or ""):
            await self._note(WAY_BACK_LOST)
        if not self._stay:
            return True
        await self.world.sleep(_LOOK_S * 4)
        return False

    async def _clean_up(self) -> None:
        """Remove what is not wanted any more, whichever way the job went."""
        outcome = self.job.outcome or Status.FAILED
        done = outcome is Status.COMPLETED
        serving = self.job.targets if done else self.job.sources
        if self._state(await self.world.topology()) is not None:
            await reopen(self.world, self.job, serving, self.world.nonce)
            await self._drop_slots()
            await self._step("slots_dropped")
            old = {leg.source if done else leg.target: leg for leg in self.job.legs}
            for shard_id, leg in old.items():
                await self.world.purge(leg, shard_id, self._pause)
                # Promoted without that, a replica would show the old rows again, which nothing hides any more.
                await self.world.side(shard_id).replicated(timeout_s=_REPLICATED_S)
                await self._step("shard_purged")
            await change(self.world, self._finished)
            await self._step("finished")
        await self._drop_slots()
        # Nobody's scans may look at the key tables any more when they are dropped.
        await sweep(self.world, self.job.shards, budget_s=_SWEEP_S)
        if self._state(await self.world.topology()) is not None:
            # The sweep has ended a swap that was still on its way; one that was faster is seen now.
            raise Blocked("the job's moves were announced after all")
        await together(self.world.side(shard_id).retire() for shard_id in self.job.shards)
        await self._step("retired")
        await self._to(outcome, completed_at=self.world.stamp(), error=self._held.reason)

    async def _drop_slots(self) -> None:
        flows: list[Flow] = [*self._flows("forward").values(), *self._flows("reverse").values()]
        await together(flow.drop_slot() for flow in flows)
