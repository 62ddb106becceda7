"""The simulation sees each planted fault: a check that cannot fail shows nothing."""

from __future__ import annotations

import pytest

from tests.sim.plants import PLANTS, planted
from tests.sim.schedule import run

WITHIN = 5_000
SLOW = 0.15  # streams that are behind show sooner who does not wait for them


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_caught(name: str) -> None:
    with planted(name):
        assert any(run(seed, slow=SLOW).violations for seed in range(WITHIN)), f"{name}: not seen in {WITHIN} schedules"


def test_a_plant_is_gone_afterwards() -> None:
    with planted("unowned copies visible"):
        assert run(0).violations
    assert not run(0).violations
