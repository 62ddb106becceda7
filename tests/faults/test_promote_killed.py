"""P4: the manager is killed at each step of a promotion, and another one brings it to its end, forward or back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator

import pytest

from shardlib.catalog import open_catalog
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.promote import Promotion, Stage
from tests.support.eventually import eventually
from tests.support.promote_runner import asleep_at, die_at
from tests.support.writers import writing

pytestmark = [pytest.mark.promise("P4"), pytest.mark.fault, pytest.mark.timeout(240)]

SHARD = "shard-01"
BACK = ["recorded", "claimed", "cascaded", "closing", "gates_closed", "read_only", "drained", "replayed", "promoting"]
FORWARD = ["promoted", "gates_opened", "swapped", "switched", "fenced"]
UNDOING = ["writable", "opened_again", "followed_back"]
MATRIX = [
    *((step, None, Stage.UNDONE) for step in BACK),
    *((step, None, Stage.DONE) for step in FORWARD),
    *(("read_only", step, Stage.UNDONE) for step in UNDOING),
    *(("promoted", step, Stage.DONE) for step in ("gates_opened", "swapped", "fenced")),
]
EVERY = os.environ.get("SHARDLIB_KILL_MATRIX") == "all"
IN_CI = 4


def chosen() -> list[tuple[str, str | None, Stage]]:
    """All of it when asked for, else some by the seed of the run."""
    from tests.conftest import SEED

    return MATRIX if EVERY else random.Random(SEED).sample(MATRIX, IN_CI)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=1, replicas=2) as made:
        yield made


async def resumed(cluster: LocalCluster) -> Promotion:
    async with Manager(cluster.url) as manager, asyncio.timeout(90):
        while True:
            try:
                return await manager.resume_promotion(SHARD, rejoin=cluster.rejoin)
            except Exception as error:
                if "another manager is at work" not in str(error):  # the lease of the dead one
                    raise


def check_at_rest(cluster: LocalCluster) -> None:
    """One primary with exactly the gates of the topology, two replicas that follow it, nothing read-only, no claim."""
    shard = (topology := topology_of(cluster)).shard(SHARD)
    by_port = {str(server.port): server for server in cluster.servers}
    primary = by_port[shard.primary.port]
    assert len(shard.replicas) == 2, "a server was lost on the way"
    with primary.connect() as conn:
        gates = conn.execute(
            "SELECT substring(relname FROM 6)::int FROM pg_class"
            " WHERE relnamespace = 'shardlib'::regnamespace AND relname ~ '^gate_[0-9]+$'"
        ).fetchall()
        assert {number for (number,) in gates} == set(topology.gates_of(shard.id))
        assert conn.execute("SELECT id FROM shardlib.job").fetchall() == []
        assert conn.execute("SHOW default_transaction_read_only").fetchone() == ("off",)

        def streaming() -> bool:
            rows = conn.execute("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'").fetchall()
            return len(rows) == 2

        eventually(streaming, within_s=30, what="the replicas do not follow the primary")
    for dsn in shard.replicas:
        with by_port[dsn.port].connect() as conn:
            assert conn.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
            assert conn.execute("SHOW default_transaction_read_only").fetchone() == ("off",)


@pytest.mark.parametrize(("step", "then", "end"), chosen())
async def test_p4_a_killed_manager_is_followed_by_another(
    cluster: LocalCluster, step: str, then: str | None, end: Stage
) -> None:
    keys = [f"key-{number}" for number in range(8)]

    def killed() -> None:
        with writing(cluster.url, keys) as told:
            eventually(lambda: len(told.acknowledged) > 20, within_s=30, what="nothing is written")
            die_at(cluster.url, SHARD, step)
            if then is not None:
                die_at_resuming(cluster.url, then)
            record = asyncio.run(resumed(cluster))
            seen = len(told.acknowledged)
            eventually(lambda: len(told.acknowledged) > seen + 20, within_s=30, what="nothing is written after it")
        assert record.stage is end, record.error
        assert told.errors == []
        check_at_rest(cluster)
        assert told.missing_on([topology_of(cluster).shard(SHARD).primary]) == set()
        print(f"killed at {step}, {then}: {len(told.acknowledged)} writes, the longest took {told.longest_s:.2f} s")

    await asyncio.to_thread(killed)


def die_at_resuming(url: str, step: str) -> None:
    """The second manager dies as well; it may have to wait for the lease of the first."""

    def died() -> bool:
        die_at(url, SHARD, step, resume=True)
        return True

    eventually(died, within_s=60, what=f"the second manager does not reach {step}", ignore=AssertionError)


@pytest.mark.parametrize(("step", "end"), [("drained", Stage.UNDONE), ("promoting", Stage.UNDONE),
                                           ("gates_opened", Stage.DONE)])  # fmt: skip
def test_a_manager_that_sleeps_and_wakes_up_too_late_changes_nothing(
    cluster: LocalCluster, step: str, end: Stage
) -> None:
    with writing(cluster.url, ["a", "b"]) as told:
        with asleep_at(cluster.url, SHARD, step) as sleeper:
            record = asyncio.run(resumed(cluster))
            assert record.stage is end, record.error
            check_at_rest(cluster)
            before = topology_of(cluster)
            sleeper.send_signal(signal.SIGCONT)
            said, _ = sleeper.communicate(timeout=60)
            assert sleeper.returncode == 1
            assert "is no longer this manager's" in said
        seen = len(told.acknowledged)
        eventually(lambda: len(told.acknowledged) > seen + 20, within_s=30, what="nothing is written after it")
    assert topology_of(cluster).version == before.version
    check_at_rest(cluster)
    assert told.errors == []
    assert told.missing_on([before.shard(SHARD).primary]) == set()


def topology_of(cluster: LocalCluster) -> Topology:
    """The stored one."""
    catalog = open_catalog(cluster.url)
    try:
        return catalog.load()
    finally:
        catalog.close()
