"""A batch of schedules, in a module that the processes of a pool can import."""

from __future__ import annotations

from collections import Counter

from tests.sim.everywhere import awaits, crash
from tests.sim.schedule import run

__all__ = ["AT_ONCE", "batch", "crashes"]

AT_ONCE = 50


def batch(first: int) -> tuple[Counter[str], Counter[str], list[tuple[int, list[str]]]]:
    """Some schedules one after the other: how they ended, what happened, which seeds failed."""
    ends, facts, bad = Counter[str](), Counter[str](), list[tuple[int, list[str]]]()
    for seed in range(first, first + AT_ONCE):
        result = run(seed)
        ends[result.status.value] += 1
        facts.update(result.facts)
        if result.violations:
            bad.append((seed, result.violations))
    return ends, facts, bad


def crashes(kind: str) -> tuple[int, list[str]]:
    """A crash at each await of a kind of job: how many there are, and what is wrong after which."""
    count = awaits(kind)
    bad = [
        f"{kind}, a crash at await {at}: {'; '.join(found)}" for at in range(1, count + 1) if (found := crash(kind, at))
    ]
    return count, bad
