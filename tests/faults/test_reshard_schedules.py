"""P2, P3, P4 and P8 under random faults: a few schedules; `nox -s schedules` runs more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.schedules.arena import Arena
from tests.support.schedules.drive import Run
from tests.support.schedules.plan import make

pytestmark = [
    pytest.mark.promise("P2"),
    pytest.mark.promise("P3"),
    pytest.mark.promise("P4"),
    pytest.mark.promise("P8"),
    pytest.mark.fault,
    pytest.mark.timeout(300),
]

SEEDS = (4, 100, 327)
"""With each ending of a job; the last one found a fault once."""


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with Arena() as made:
        yield made


@pytest.mark.parametrize("seed", SEEDS)
def test_p3_a_schedule_of_faults_leaves_a_right_history(arena: Arena, tmp_path: Path, seed: int) -> None:
    report = Run(arena, make(seed), tmp_path).go()
    print(report)
    assert report.violations == []
    # A run in which nothing happened shows nothing.
    assert report.outcomes["ok"] > 100
    assert report.outcomes["read"] > 100
    assert sum(report.struck.values()) > 0


def test_the_schedule_of_a_seed_is_always_the_same() -> None:
    assert [make(seed) for seed in range(50)] == [make(seed) for seed in range(50)]
    assert len({str(make(seed)) for seed in range(50)}) == 50
