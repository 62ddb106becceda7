"""The simulation sees each planted fault: a check that cannot fail shows nothing."""

from __future__ import annotations

import pytest

from tests.sim.plants import PLANTS, planted
from tests.sim.schedule import SCENARIOS, Faults, Result, Simulation, run

pytestmark = pytest.mark.timeout(300)

WITHIN = 5_000
SLOW = 0.15  # streams that are behind show sooner who does not wait for them
FIRST = {"statements of an earlier round": 1_600}
"""The first seed that is tried, where the fault shows late: what comes before would take minutes."""
LOSSY = ("statements of an earlier round",)
"""What shows only where answers are lost again and again."""


def worst(name: str, seed: int) -> Result:
    """The run of a seed under the weather in which a fault shows soonest."""
    if name in LOSSY:
        return Simulation(seed, SCENARIOS[seed % len(SCENARIOS)], Faults(lost=0.06, slow=0.05, heal_s=25.0)).run()
    return run(seed, slow=SLOW)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_caught(name: str) -> None:
    with planted(name):
        first = FIRST.get(name, 0)
        seen = any(worst(name, seed).violations for seed in range(first, first + WITHIN))
    assert seen, f"{name}: not seen in {WITHIN} schedules"


def test_a_plant_is_gone_afterwards() -> None:
    with planted("unowned copies visible"):
        assert run(0).violations
    assert not run(0).violations
