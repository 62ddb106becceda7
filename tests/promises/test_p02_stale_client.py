"""P2: a client with an old ring can neither lose nor misread data, whatever happens to gates and ranges meanwhile."""

from __future__ import annotations

import random
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib_ops import LocalCluster
from tests.support.hammer import Hammer, Verdict, pause, soak_seconds
from tests.support.mover import Mover
from tests.support.pgbouncer import MISSING, PgBouncer, find_pgbouncer

pytestmark = [pytest.mark.promise("P2"), pytest.mark.fault, pytest.mark.timeout(300)]

CLIENTS = 8
FROZEN_TURN = 5
"""In which a client is frozen whatever the dice say: a slow machine has few turns."""


def hammered(
    folder: Path, rng: random.Random, seconds: float, *, pgbouncer: bool = False, **settings: Any
) -> tuple[Verdict, Mover, Hammer]:
    keys = [f"key-{number}" for number in range(40)]
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(shards=3))
        hammer = Hammer(folder, [cluster.url], keys, rng)
        hammer.prepare(cluster.url)
        catalog = open_catalog(cluster.url)
        stack.callback(catalog.close)
        if pgbouncer:
            pooler = stack.enter_context(PgBouncer(folder / "pgbouncer", cluster.servers))
            names = {Dsn(server.dsn): server.name for server in cluster.servers}
            through = {shard.id: pooler.dsns[names[shard.primary]] for shard in catalog.load().shards}
            settings |= {"pgbouncer": True, "endpoints": [through]}
        # A frozen client may hold a gate: an attempt to close it does not take up the whole run.
        mover = Mover(catalog, keys, rng, budget_s=1.0)
        stack.callback(mover.close)
        with hammer.clients(CLIENTS, seconds, **settings):
            for turn in count():
                if not hammer.running:
                    break
                if turn == FROZEN_TURN or rng.random() < 0.15:
                    with hammer.one_frozen():
                        for _ in range(rng.randint(1, 5)):
                            mover.step()
                else:
                    mover.step()
                pause(0.05)
        return hammer.verdict(catalog.load()), mover, hammer


@pytest.mark.parametrize(
    "pgbouncer",
    [
        pytest.param(False, id="direct"),
        pytest.param(True, id="pgbouncer", marks=pytest.mark.skipif(find_pgbouncer() is None, reason=MISSING)),
    ],
)
def test_p2_stale_clients_neither_lose_nor_misread(tmp_path: Path, rng: random.Random, pgbouncer: bool) -> None:
    (tmp_path / "pgbouncer").mkdir()
    seconds = soak_seconds(25)
    verdict, mover, hammer = hammered(tmp_path, rng, seconds, pgbouncer=pgbouncer)
    print(verdict, mover.counts, f"{hammer.frozen} freezes")
    assert verdict.violations == []
    # A run in which nothing happened shows nothing. Usual on two busy cores: two moves and five closings a second.
    assert verdict.outcomes["ok"] > 20 * seconds
    assert verdict.reads > 20 * seconds
    assert mover.counts["moved"] >= 0.3 * seconds
    assert mover.counts["closed"] >= 1.5 * seconds
    assert hammer.frozen >= 1


def test_p2_without_the_gate_the_same_run_shows_the_harm(tmp_path: Path, rng: random.Random) -> None:
    """The gate taken away on purpose: if the checks did not see it, they would see nothing."""
    verdict, mover, _ = hammered(tmp_path, rng, 15, plant="no gate")
    print(verdict, mover.counts)
    assert mover.counts["moved"] >= 5
    assert verdict.violations
