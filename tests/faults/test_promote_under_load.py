"""P2 and P3: a replica becomes the primary while clients write and read, and they see nothing but a short wait."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from pathlib import Path

import pytest

from shardlib.catalog import open_catalog
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.promote import Stage
from tests.support.eventually import eventually
from tests.support.hammer import Hammer, soak_seconds

pytestmark = [pytest.mark.promise("P2"), pytest.mark.promise("P3"), pytest.mark.fault, pytest.mark.timeout(300)]

CLIENTS = 2
PAUSE_MAX_S = 1.0
BUDGET_S = 5.0
"""For so long a promotion may close the shard, if nothing else is said."""
SLACK = 3.0
"""The machine of a test is shared: what takes 0.2 s alone may take this many times the limit."""


async def back_and_forth(cluster: LocalCluster, hammer: Hammer, pauses: list[float], synchronous: bool) -> None:
    began = time.monotonic()

    async def told(step: str) -> None:
        print(f"{time.monotonic() - began:7.3f} s {step}")
        assert step != "swapped" or hammer.running, "the clients had ended before: nothing is shown"

    async with Manager(cluster.url) as manager:
        for _ in range(2):
            before = await manager.get_shard("shard-01")
            after = await manager.promote_replica("shard-01", rejoin=cluster.rejoin, on_step=told)
            assert after.primary in before.replicas
            assert set(after.replicas) == {before.primary, *before.replicas} - {after.primary}
            record = await manager.get_promotion("shard-01")
            assert record is not None
            assert (record.stage, record.error) == (Stage.DONE, None)
            assert record.pause_s is not None
            pauses.append(record.pause_s)
            if synchronous:
                with cluster.primary("shard-01").connect() as conn:
                    states = conn.execute("SELECT sync_state FROM pg_stat_replication").fetchall()
                assert ("quorum",) in states, "the new primary waits for nobody"


@pytest.mark.parametrize(("replicas", "synchronous"), [(1, False), (1, True), (2, True)])
def test_a_promotion_under_load_loses_and_fails_nothing(
    tmp_path: Path, rng: random.Random, replicas: int, synchronous: bool
) -> None:
    keys = [f"key-{number}" for number in range(40)]
    seconds = soak_seconds(90)  # or until both promotions are over
    with LocalCluster(shards=2, replicas=replicas, synchronous=synchronous) as cluster:
        hammer = Hammer(tmp_path, [cluster.url], keys, rng)
        hammer.prepare(cluster.url)
        pauses: list[float] = []
        failed: list[BaseException] = []

        def promote() -> None:
            try:
                eventually(lambda: hammer.working, within_s=40, what="no client works")
                asyncio.run(back_and_forth(cluster, hammer, pauses, synchronous=synchronous))
            except BaseException as error:
                failed.append(error)
                raise

        thread = threading.Thread(target=promote)
        with hammer.clients(CLIENTS, seconds):
            thread.start()
            began = time.monotonic()
            thread.join(timeout=seconds + 120)
            worked_s = time.monotonic() - began
            hammer.end()
        assert not failed, failed
        assert not thread.is_alive(), "the promotions do not end"
        catalog = open_catalog(cluster.url)
        topology = catalog.load()
        catalog.close()
        verdict = hammer.verdict(topology)
        print(f"{verdict}; closed for {pauses} s")
        assert verdict.violations == []
        assert verdict.outcomes["ok"] > 5 * worked_s
        assert verdict.outcomes["failed"] == 0, verdict
        assert verdict.outcomes["unknown"] == 0, verdict
        assert min(pauses) < PAUSE_MAX_S * SLACK
        assert max(pauses) < BUDGET_S * SLACK
