"""Some schedules in one process, and what came of all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.support.schedules.arena import Arena
from tests.support.schedules.drive import Report, Run
from tests.support.schedules.plan import make

ARENA_RUNS = 25
"""Schedules until the servers are made anew: their logs and WAL would grow."""


def several(seeds: list[int], folder: Path, plant: str | None) -> list[Report]:
    """Some schedules, one after the other, on servers of their own."""
    reports: list[Report] = []
    with Arena() as arena:
        for seed in seeds:
            report = Run(arena, make(seed), folder / str(seed), plant).go()
            reports.append(report)
            print(report, flush=True)
            if plant is not None and report.violations:
                break
    return reports


def total(reports: list[Report], seconds: float) -> str:
    """The mix, in a few lines."""
    kinds, ends, struck, outcomes = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for report in reports:
        kinds.update(end.split()[0] for end in report.ends)
        ends.update(end.split(": ")[1].split()[0].rstrip(";") for end in report.ends)
        struck += report.struck
        outcomes += report.outcomes
    bad = [report.schedule.seed for report in reports if report.violations]
    refused = sum(report.refused for report in reports)
    return "\n".join(
        (
            f"{len(reports)} schedules in {seconds:.0f} s; {sum(kinds.values())} jobs: {dict(kinds)}; {dict(ends)}",
            f"faults {sum(struck.values())}: {dict(struck)}",
            f"operations: {dict(outcomes)}; {refused} writes without a gate refused",
            f"{len(bad)} failed" + (f": seeds {bad}" if bad else ""),
        )
    )
