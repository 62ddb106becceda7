"""A few hundred random schedules; `nox -s sim` runs twenty thousand."""

from __future__ import annotations

import os
from collections import Counter
from random import Random

import pytest

from tests.sim.schedule import SCENARIOS, Faults, Simulation, run

SCHEDULES = min(int(os.environ.get("SHARDLIB_SIM_SCHEDULES", "300")), 2_000)
PARTS = 3
"""Few enough that each has some of the jobs that are cancelled, which are the fewest."""


@pytest.mark.parametrize("part", range(PARTS))
def test_random_schedules_keep_every_promise(part: int, rng: Random) -> None:
    count = max(1, SCHEDULES // PARTS)
    first = rng.randrange(1 << 40)
    facts, ends = Counter[str](), Counter[str]()
    for seed in range(first, first + count):
        result = run(seed)
        assert result.violations == [], f"seed {seed}: python -m tests.sim --seed {seed}"
        facts.update(result.facts)
        ends[result.status.value] += 1
    if count >= 40:
        # A run in which nothing went wrong, or nobody wrote, says nothing.
        for what in ("kills", "pauses", "refused", "guarded", "switches", "gave_way", "others"):
            assert facts[what] > 0, (what, facts)
        assert facts["written"] > 50 * count
        assert facts["scans"] > 5 * count
        assert ends["completed"]
        assert ends["rolled_back"]
        assert ends["cancelled"]


@pytest.mark.parametrize("seed", [3, 85, 188, 1463])
def test_a_seed_gives_the_same_run_again(seed: int) -> None:
    assert run(seed).digest == run(seed).digest
    assert run(seed).digest != run(seed + 1).digest


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_faults_a_job_takes_its_straight_way(scenario: str) -> None:
    result = Simulation(1, scenario, Faults()).run()
    assert result.violations == []
    assert result.status.value == "completed"
    assert result.facts["takeovers"] == 2  # until it rests, and to complete it
    assert result.steps.count("switched") == 1
