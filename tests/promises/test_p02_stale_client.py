"""P2: a client with an old ring can neither lose nor misread data, whatever happens to gates and ranges meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shardlib.catalog import open_catalog
from shardlib_ops import LocalCluster
from tests.support.hammer import Hammer, Verdict, pause, soak_seconds
from tests.support.mover import Mover

pytestmark = [pytest.mark.promise("P2"), pytest.mark.fault, pytest.mark.timeout(300)]

CLIENTS = 8


def hammered(folder: Path, rng: random.Random, seconds: float, **settings: object) -> tuple[Verdict, Mover, Hammer]:
    keys = [f"key-{number}" for number in range(40)]
    with LocalCluster(shards=3) as cluster:
        hammer = Hammer(folder, [cluster.url], keys, rng)
        hammer.prepare(cluster.url)
        catalog = open_catalog(cluster.url)
        mover = Mover(catalog, keys, rng)
        try:
            with hammer.clients(CLIENTS, seconds, **settings):
                while hammer.running:
                    if rng.random() < 0.15:
                        with hammer.one_frozen():
                            for _ in range(rng.randint(1, 5)):
                                mover.step()
                    else:
                        mover.step()
                    pause(0.05)
            return hammer.verdict(catalog.load()), mover, hammer
        finally:
            mover.close()
            catalog.close()


def test_p2_stale_clients_neither_lose_nor_misread(tmp_path: Path, rng: random.Random) -> None:
    verdict, mover, hammer = hammered(tmp_path, rng, soak_seconds(25))
    print(verdict, mover.counts, f"{hammer.frozen} freezes")
    assert verdict.violations == []
    # A run in which nothing happened shows nothing.
    assert verdict.outcomes["ok"] > 500
    assert verdict.reads > 500
    assert mover.counts["moved"] >= 20
    assert mover.counts["closed"] >= 100
    assert hammer.frozen >= 3


def test_p2_without_the_gate_the_same_run_shows_the_harm(tmp_path: Path, rng: random.Random) -> None:
    """The gate taken away on purpose: if the checks did not see it, they would see nothing."""
    verdict, mover, _ = hammered(tmp_path, rng, 15, plant="no gate")
    print(verdict, mover.counts)
    assert mover.counts["moved"] >= 10
    assert verdict.violations
