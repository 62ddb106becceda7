"""A switched job: the targets serve, and what is written is carried back until the operator decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Final

from shardlib_ops.reshard.attempts import Attempts
from shardlib_ops.reshard.control import Direction
from shardlib_ops.reshard.cutover import Limits, ready, reopen
from shardlib_ops.reshard.gates import sweep
from shardlib_ops.reshard.job import WAY_BACK_LOST, Job, Leg, Status, Wish
from shardlib_ops.reshard.steered import Steered
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.world import Blocked, Failure, Flow, Lost, World

__all__ = ["Validation", "replaced_shards"]

_LOOK_S: Final = 0.25
_SWEEP_S: Final = 5.0
_TOO_LATE: Final = "it had switched before it could be cancelled: `rollback` takes it back, `complete` ends it"


def replaced_shards(job: Job, servers: Mapping[str, str]) -> list[str]:
    """The shards of a job that another server stands in for, since a failover."""
    return [shard_id for shard_id in job.shards if servers[shard_id] != job.servers[shard_id]]


class Validation:
    """What a runner does from the switch on, until it is certain which way the job ends.

    Args:
        world: held by the runner.
        held: its job.
        limits: of the cutover.
        complete: end it at once.
        stay: keep both sides in step until the operator decides; else the job rests.
    """

    def __init__(self, world: World, held: Steered, limits: Limits, *, complete: bool, stay: bool) -> None:
        self._world, self._held, self._limits = world, held, limits
        self._complete, self._stay = complete, stay
        self._attempts = Attempts(world, held, limits)
        self._streams_broke = False
        self._orphans: str | None = None

    def _flows(self, direction: Direction) -> dict[int, Flow]:
        return {leg.number: self._world.flow(leg, direction) for leg in self._held.job.legs}

    async def validate(self, servers: dict[str, str]) -> bool:
        """Both sides in step, the targets serve; whether the job rests here.

        Args:
            servers: shard id -> the server that is there now.

        Raises:
            Failure: the old side refuses what the stream back brings.
            Lost, Blocked, TimeoutError: to be tried again.
        """
        replaced = replaced_shards(self._held.job, servers)
        await together(self._world.side(shard_id).prepare() for shard_id in replaced)
        await together(self._world.side(shard_id).guard(active=True) for shard_id in self._held.job.sources)
        await reopen(self._world, self._held.job, self._held.job.targets, self._world.nonce)
        for flow in self._flows("forward").values():
            await flow.drop_slot()
        await self._held.step("forward_stopped")
        flows = self._flows("reverse")
        if replaced or not all([await flow.usable() for flow in flows.values()]):
            return await self._one_way(servers)
        if self._streams_broke and self._may_complete(await self._world.wish()):
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
        async with self._world.running(list(flows.values())), self._checking_foreign_keys() as checking:
            while True:
                wish = await self._held.heed()
                if wish is Wish.CANCEL:
                    await self._held.note(_TOO_LATE)
                elif self._held.job.error == _TOO_LATE:
                    await self._held.note(self._orphans)
                if wish is Wish.ROLLBACK:
                    await sweep(self._world, self._held.job.targets, budget_s=_SWEEP_S)
                    if await self._attempts.until_switched("reverse", flows):
                        await self._held.to(Status.CLEANUP, outcome=Status.ROLLED_BACK, error=None)
                        return False
                    await self._held.note(self._orphans)
                    continue
                if not checking.done():
                    await self._world.sleep(_LOOK_S)
                    continue
                checking.result()
                if self._may_complete(wish):
                    break
                if ready([flow.lag_bytes for flow in flows.values()], self._limits) is None:
                    if wish is not Wish.CANCEL:
                        await self._held.note(self._orphans)  # what had broken the streams is over
                    if not self._stay:
                        return True
                await self._world.sleep(_LOOK_S)
        return await self._complete_now()

    async def _complete_now(self) -> bool:
        await self._held.to(Status.CLEANUP, outcome=Status.COMPLETED, purging=True, error=None)
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
        left = [name for leg in self._held.job.legs for name in await self._foreign_keys(leg)]
        if left:
            self._orphans = f"foreign keys that hold on the source do not hold on the target: {', '.join(left)}"
            await self._held.note(self._orphans)

    async def _foreign_keys(self, leg: Leg) -> tuple[str, ...]:
        return await self._held.obeying(partial(self._world.validate_foreign_keys, leg))

    def _may_complete(self, wish: Wish) -> bool:
        if wish in (Wish.PAUSE, Wish.ROLLBACK, Wish.CANCEL):
            return False  # the old copies are kept for it, however long that takes; or until the operator decides anew
        return wish is Wish.COMPLETE or self._complete or self._kept_long_enough()

    def _kept_long_enough(self) -> bool:
        """Whether the retention is over.

        By the wall clock, since it has to outlive the runner. That is harmless here: a wrong clock makes the window
        shorter or longer, and no decision about where the rows are looks at it.
        """
        if self._held.job.retention_s is None or self._held.job.switched_at is None:
            return False
        kept = datetime.fromisoformat(self._world.stamp()) - datetime.fromisoformat(self._held.job.switched_at)
        return kept.total_seconds() >= self._held.job.retention_s

    async def _one_way(self, servers: dict[str, str]) -> bool:
        """The way back is lost with its stream: only completing is left, and the operator is told.

        The old copies stay as long as they would with it: they are what an operator has if the new ones are bad.
        """
        for flow in self._flows("reverse").values():
            await flow.drop_slot()  # nobody reads it any more, and it would keep WAL
        if servers != self._held.job.servers:
            await self._held.change(servers=servers)
        if self._may_complete(await self._held.heed()):
            return await self._complete_now()
        if WAY_BACK_LOST not in (self._held.job.error or ""):
            await self._held.note(WAY_BACK_LOST)
        if not self._stay:
            return True
        await self._world.sleep(_LOOK_S * 4)
        return False
