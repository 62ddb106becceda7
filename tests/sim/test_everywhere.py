"""Some of the crashes of `everywhere`, by the seed of the run; `nox -s sim` does all of them."""

from __future__ import annotations

from random import Random

import pytest

from tests.sim.everywhere import KINDS, awaits, crash

EVERY = 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_runner_may_crash_at_any_await(kind: str, rng: Random) -> None:
    for at in range(rng.randint(1, EVERY), awaits(kind) + 1, EVERY):
        assert crash(kind, at) == [], f"{kind}: a crash at await {at}"
