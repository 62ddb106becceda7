"""What an operator asks is done within seconds, whatever long work is under way; and no range is closed in vain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from shardlib_ops.reshard.job import Job, Leg, Status, Wish
from tests.sim.clients import Client
from tests.sim.flow import FakeFlow
from tests.sim.process import Process
from tests.sim.schedule import Faults, Result, Simulation
from tests.sim.world import FakeSide, FakeWorld

_SOON_S = 15.0
_HOURS_S = 3 * 3600.0


class _Slow(FakeWorld):
    """One of its verbs takes hours when it is asked for the first time; the operator's wish comes a second later.

    Class attributes, set for each run by `_slow`: `verb`, `asks`, and what happened: when it was asked, how often the
    verb has begun, and the records that were stored after it.
    """

    verb = ""
    asks: Wish
    after_s = 0.0
    asked_at: list[float]
    begun: list[float]
    stored: list[tuple[float, Job]]

    async def takes_long(self, verb: str) -> None:
        if verb != self.verb:
            return
        self.begun.append(self.sim.loop.time())
        if len(self.begun) > 1:
            return

        def ask(wish: Wish) -> None:
            self.asked_at.append(self.sim.loop.time())
            self.sim.catalog.ask(wish)

        self.sim.loop.call_later(1.0, ask, self.asks)
        if self.asks is Wish.PAUSE:
            self.sim.loop.call_later(21.0, ask, Wish.RUN)
        await asyncio.sleep(_HOURS_S if self.after_s == 0.0 else self.after_s)

    async def save(self, job: Job) -> None:
        await super().save(job)
        self.stored.append((self.sim.loop.time(), job))

    async def schema_before_rows(self, leg: Leg) -> None:
        await self.takes_long("schema_before_rows")
        await super().schema_before_rows(leg)

    async def schema_after_rows(self, leg: Leg) -> None:
        await self.takes_long("schema_after_rows")
        await super().schema_after_rows(leg)

    async def copy(self, leg: Leg, pause: Callable[[], Awaitable[None]]) -> None:
        await self.takes_long("copy")
        await super().copy(leg, pause)

    async def compare(self, leg: Leg, flow: Any, *, since: str | None) -> Any:
        await self.takes_long("compare" if since is None else "compare_changed")
        return await super().compare(leg, flow, since=since)

    async def validate_foreign_keys(self, leg: Leg) -> tuple[str, ...]:
        await self.takes_long("validate_foreign_keys")
        return await super().validate_foreign_keys(leg)

    async def purge(self, leg: Leg, shard_id: str, pause: Callable[[], Awaitable[None]]) -> None:
        await self.takes_long("purge")
        await pause()
        await super().purge(leg, shard_id, pause)


class _SlowFlow(FakeFlow):
    async def create_slot(self) -> None:
        assert isinstance(self.world, _Slow)
        await self.world.takes_long("create_slot")
        await super().create_slot()


class _SlowSide(FakeSide):
    async def prepare(self) -> None:
        assert isinstance(self.world, _Slow)
        await self.world.takes_long("prepare")
        await super().prepare()


def _run(verb: str, wish: Wish, **more: Any) -> tuple[Result, type[_Slow]]:
    own: dict[str, Any] = {"verb": verb, "asks": wish, "asked_at": [], "begun": [], "stored": []}
    types = {"flow_type": _SlowFlow, "side_type": _SlowSide}
    world = type("Slow", (_Slow,), {**own, **types, **more})
    result = Simulation(1, "split", Faults(heal_s=90.0), world_type=world).run()
    assert result.violations == []
    return result, world


BEFORE = (
    "schema_before_rows",
    "prepare",
    "copy",
    "schema_after_rows",
    "compare",
    "create_slot",
    "compare_changed",
)


@pytest.mark.parametrize("verb", BEFORE)
def test_a_job_is_cancelled_in_the_midst_of_long_work(verb: str) -> None:
    result, world = _run(verb, Wish.CANCEL)
    assert result.status is Status.CANCELLED
    (asked_at,) = world.asked_at
    ended_at, last = world.stored[-1]
    assert last.status is Status.CANCELLED
    assert ended_at - asked_at < _SOON_S


@pytest.mark.parametrize("verb", [*(verb for verb in BEFORE if verb != "copy"), "validate_foreign_keys"])
def test_a_pause_ends_long_work_which_begins_anew_when_the_job_is_resumed(verb: str) -> None:
    result, world = _run(verb, Wish.PAUSE)
    assert result.status is Status.COMPLETED
    paused_at, resumed_at = world.asked_at
    said = [at for at, job in world.stored if job.paused]
    assert said, "the record never said that the job was paused"
    assert said[0] - paused_at < _SOON_S
    assert not [at for at in world.begun if paused_at < at < resumed_at], "it went on while it was paused"
    assert world.begun[-1] > resumed_at
    assert not world.stored[-1][1].paused


def test_a_pause_while_old_rows_are_deleted_is_told_until_the_job_is_resumed() -> None:
    result, world = _run("purge", Wish.PAUSE, after_s=2.0)
    assert result.status is Status.COMPLETED
    paused_at, resumed_at = world.asked_at
    paused = [(at, job.paused) for at, job in world.stored if at > paused_at]
    assert [told for _, told in paused][:2] == [True, False]
    assert paused[0][0] - paused_at < _SOON_S
    assert 0 <= paused[1][0] - resumed_at < _SOON_S
    assert len(world.begun) == 1, "a purge stands still where it is"


def test_a_pause_in_validation_is_told_until_the_job_is_resumed() -> None:
    told: list[tuple[str, bool]] = []

    class World(FakeWorld):
        async def save(self, job: Job) -> None:
            await super().save(job)
            told.append((job.status.value, job.paused))

    def pause(sim: Simulation, _: Process) -> None:
        sim.catalog.ask(Wish.PAUSE)

    faults = Faults(stay=True, at_step={("status_validation", 1): pause}, heal_s=60.0)
    sim = Simulation(1, "split", faults, world_type=World)
    sim.catalog.job = sim.catalog.job.changed(retention_s=5.0)
    result = sim.run()
    assert result.violations == []
    assert result.status is Status.COMPLETED
    in_validation = [paused for status, paused in told if status == "validation"]
    assert in_validation[0] is False
    assert True in in_validation
    assert in_validation[-1] is False, "it is told when it is resumed"
    assert told[-1] == ("completed", False)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("final", [Wish.COMPLETE, Wish.ROLLBACK])
def test_a_transaction_of_minutes_closes_the_ranges_while_it_is_young_only(final: Wish, foreign: bool) -> None:
    """Nobody knows yet that it is not a short one, so an attempt or two are in vain; then none before it has ended."""
    open_s = 300.0
    began: list[tuple[float, int]] = []
    ended: list[int] = []

    def linger(sim: Simulation, _: Process) -> None:
        if began or (final is Wish.ROLLBACK and sim.catalog.job.status is not Status.VALIDATION):
            return
        client = Client(sim, "lingering", watches=False)
        owner = sim.shards["s1" if final is Wish.COMPLETE else "s3"]
        key = next(key for key in sim.leg_of if key in owner.seen["register"] and owner.free(key))

        async def think() -> None:
            began.append((sim.loop.time(), sim.catalog.job.attempts))
            await asyncio.sleep(open_s)
            ended.append(sim.catalog.job.attempts)

        client._think = think  # type: ignore[method-assign]
        act = client.write_without_gate(key) if foreign else client.write([key], values=lambda _: None)
        sim.loop.create_task(act)

    step = "status_cutover" if final is Wish.COMPLETE else "forward_stopped"
    faults = Faults(at_step={(step, 1): linger}, final=final, heal_s=60.0)
    sim = Simulation(1, "split", faults)
    result = sim.run()
    assert result.violations == []
    assert result.status is (Status.COMPLETED if final is Wish.COMPLETE else Status.ROLLED_BACK)
    assert began
    assert ended
    assert ended[0] - began[0][1] <= 2, "the ranges were closed again and again for a transaction that goes on"
