"""The way to a switch, forward or back: both sides are compared, and attempts are made until one has switched."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.cutover import Cutover, Limits, Outcome, ready
from shardlib_ops.reshard.gates import sweep
from shardlib_ops.reshard.job import Leg, Status, Wish
from shardlib_ops.reshard.steered import Steered
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.world import Compared, Flow, World

__all__ = ["Attempts"]

_LOOK_S: Final = 0.25
_SWEEP_S: Final = 5.0
_ROUNDS_MAX: Final = 5
_PATIENCE_S: Final = 10.0
_SEQUENCE_MARGIN: Final = 1_000


class Attempts:
    """What a runner does between the copy and the switch, and for a rollback, while the streams run.

    Args:
        world: held by the runner.
        held: its job.
        limits: of the cutover.
    """

    def __init__(self, world: World, held: Steered, limits: Limits) -> None:
        self._world, self._held, self._limits = world, held, limits

    async def compare(self, flows: Mapping[int, Flow]) -> None:
        """The whole of each leg once, while it runs."""
        for leg in self._held.job.legs:
            if leg.number not in self._held.job.compared:
                result = await self._compared(leg, flows, since=None)
                await self._held.change(compared={**self._held.job.compared, leg.number: result.lsn})
                await self._held.step("leg_compared")

    async def until_switched(self, direction: Direction, flows: Mapping[int, Flow]) -> bool:
        """Attempt until one has switched; False if it was a rollback, and the operator has withdrawn it.

        Args:
            direction: `forward` is the switch, `reverse` the rollback.
            flows: leg number -> the running stream that leads to the side that takes over.

        Raises:
            Mismatch: the sides differ.
        """
        cutover = Cutover(
            self._world, self._held.job, direction, flows, self._limits, self._held.step, self._world.nonce
        )
        pause_s = self._limits.pause_s
        while True:
            await self._held.pause()
            if await self._withdrawn(cutover):
                return False
            if (waiting := ready([flow.lag_bytes for flow in flows.values()], self._limits)) is not None:
                await self._held.note(waiting)
                await self._world.sleep(_LOOK_S * (0.5 + self._world.jitter()))
                continue
            # Its snapshot waits for them too, and the stream stands still meanwhile.
            await self._wait_for_old_writers(cutover)
            if cutover.direction == "forward":
                await self._compare_changed(flows)
                for leg in self._held.job.legs:
                    await self._world.advance_sequences(leg, "forward", ahead=_SEQUENCE_MARGIN)
            if await self._wait_for_old_writers(cutover):
                continue  # much has changed meanwhile
            await sweep(self._world, cutover.serving, budget_s=_SWEEP_S)
            if await self._withdrawn(cutover):
                return False
            number = self._held.job.attempts + 1
            if cutover.direction == "forward" and self._held.job.status is Status.DELTASYNC:
                await self._held.to(Status.CUTOVER, attempts=number)
            else:
                await self._held.change(attempts=number)
            compared = self._held.job.compared if cutover.direction == "forward" else {}
            if await cutover.attempt(number, compared) is Outcome.SWITCHED:
                return True
            await self._held.note(f"attempt {number} gave way: {cutover.waiting_for}")
            await self._world.sleep(pause_s * (0.5 + self._world.jitter()))
            pause_s = min(self._limits.pause_max_s, pause_s * 2)

    async def _compare_changed(self, flows: Mapping[int, Flow]) -> None:
        """Rounds over what changed since, until little enough is left for the closed window."""
        for leg in self._held.job.legs:
            for _ in range(_ROUNDS_MAX):
                result = await self._compared(leg, flows, since=self._held.job.compared[leg.number])
                await self._held.change(compared={**self._held.job.compared, leg.number: result.lsn})
                if result.keys <= self._limits.changed_keys and result.left <= self._limits.changed_rows:
                    break

    async def _compared(self, leg: Leg, flows: Mapping[int, Flow], *, since: str | None) -> Compared:
        return await self._held.obeying(partial(self._world.compare, leg, flows[leg.number], since=since))

    async def _withdrawn(self, cutover: Cutover) -> bool:
        return cutover.direction == "reverse" and await self._world.wish() not in (Wish.ROLLBACK, Wish.PAUSE)

    async def _wait_for_old_writers(self, cutover: Cutover) -> bool:
        """While a transaction is older than an attempt may take, the ranges are not closed for it in vain.

        It is waited for until it has ended. Those that come one after the other, and are old by turns, may end in time
        all the same, so they are waited for a while only.

        Returns:
            whether one was waited for longer than that while.
        """
        began, long = self._world.now(), False
        while True:
            waited_s = self._world.now() - began
            # After the while, those that were old already when it began.
            older_s = self._limits.budget_s + (waited_s if waited_s > _PATIENCE_S else 0.0)
            found = await together(
                self._world.side(shard_id).old_writers(older_s=older_s) for shard_id in cutover.serving
            )
            if not (writers := [writer for some in found for writer in some]):
                return long
            long = waited_s > _PATIENCE_S
            await self._held.note(
                "the switch waits for transactions that write to sharded tables: " + "; ".join(writers)
            )
            await self._held.pause()
            if await self._withdrawn(cutover):
                return True
            await self._world.sleep(_LOOK_S * (0.5 + self._world.jitter()))
