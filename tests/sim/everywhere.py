"""A crash at each await of a runner in turn, each followed by a take-over: exhaustive, one crash deep."""

from __future__ import annotations

from functools import cache

from shardlib_ops.reshard.job import Status, Wish
from tests.sim.process import Process
from tests.sim.schedule import Faults, Result, Simulation, Strike

__all__ = ["KINDS", "awaits", "crash"]

KINDS = {
    "split": ("split", Status.COMPLETED),
    "rollback": ("split", Status.ROLLED_BACK),
    "cancel": ("split_two", Status.CANCELLED),
    "merge": ("merge", Status.COMPLETED),
}
_SEED = 20


def _run(kind: str, at_tick: dict[int, Strike]) -> Result:
    scenario, _ = KINDS[kind]
    final = Wish.ROLLBACK if kind == "rollback" else Wish.COMPLETE
    at_step: dict[tuple[str, int], Strike] = {("reverse_slots", 1): _cancel} if kind == "cancel" else {}
    return Simulation(_SEED, scenario, Faults(at_tick=at_tick, at_step=at_step, heal_s=15.0, final=final)).run()


def _cancel(sim: Simulation, process: Process) -> None:
    sim.catalog.ask(Wish.CANCEL)
    process.pause(0.3)  # longer than a wish is kept


@cache
def awaits(kind: str) -> int:
    """How many awaits the runners have when nothing goes wrong."""
    result = _run(kind, {})
    if result.violations or result.status is not KINDS[kind][1]:
        raise AssertionError(f"{kind} ended as {result.status.value}: {result.violations}")
    return result.ticks


def crash(kind: str, at: int) -> list[str]:
    """What is wrong after a crash at one await."""
    result = _run(kind, {at: "kill"})
    wanted = {KINDS[kind][1]}
    if kind == "cancel":
        wanted |= {Status.COMPLETED}  # the wish came when it was switched
    found = list(result.violations)
    if result.status not in wanted:
        found.append(f"ended as {result.status.value}")
    if not result.facts["kills"] and at < awaits(kind) // 2:
        found.append("nobody was killed")
    return found
