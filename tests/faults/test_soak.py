"""Everything at once: ranges move and gates close under clients, while servers, wires and clients are broken."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.errors import CatalogUnavailable
from shardlib_ops import LocalCluster
from tests.conftest import SEED
from tests.support.faults import Proxy
from tests.support.hammer import Hammer, pause, soak_seconds
from tests.support.mover import Mover
from tests.support.nemesis import Nemesis

pytestmark = [pytest.mark.fault, pytest.mark.soak, pytest.mark.timeout(900)]

CLIENTS = 8
KEYS = [f"key-{number}" for number in range(40)]
DEBIAN_ETCD = Path("/usr/bin/etcd")
"""Of release 3.4; some releases of 3.5 lose data when they are killed (etcd's issue 13766)."""


def test_soak(tmp_path: Path, rng: random.Random) -> None:
    seconds = soak_seconds(30)
    with ExitStack() as stack:
        etcd = DEBIAN_ETCD if DEBIAN_ETCD.exists() else None
        cluster = stack.enter_context(LocalCluster(shards=3, etcd_program=etcd))
        proxies = [stack.enter_context(Proxy(server.dsn)) for server in cluster.servers]
        hammer = Hammer(tmp_path, [cluster.url], KEYS, rng)
        hammer.prepare(cluster.url)
        catalog = open_catalog(cluster.url)
        stack.callback(catalog.close)
        by_dsn = {Dsn(server.dsn): proxy.dsn for server, proxy in zip(cluster.servers, proxies, strict=True)}
        through = {shard.id: by_dsn[shard.primary] for shard in catalog.load().shards}
        mover = Mover(catalog, KEYS, rng, budget_s=2.0)
        stack.callback(mover.close)
        held_up = 0
        with hammer.clients(CLIENTS, seconds, endpoints=[{}, through]):
            while not hammer.working and hammer.running:
                pause(0.05)
            with Nemesis(cluster, proxies, hammer, random.Random(rng.random())) as nemesis:
                while hammer.running and nemesis.failure is None:
                    try:
                        mover.step()
                    except (psycopg.OperationalError, CatalogUnavailable):
                        held_up += 1
                    pause(0.03)
        mover.finish()
        mover.topology = catalog.load(mover.topology)
        mover.sweep()
        verdict = hammer.verdict(catalog.load())
    print(f"seed {SEED}, {seconds:g} s: {verdict}")
    print(f"mover {mover.counts}, held up {held_up} times; {hammer.frozen} freezes; struck {dict(nemesis.struck)}")
    print(f"cut {sum(p.cuts for p in proxies)}, replies lost {sum(p.replies_lost for p in proxies)}")
    assert verdict.violations == []
    # A run in which nothing happened shows nothing.
    assert verdict.outcomes["ok"] > 10 * seconds
    assert verdict.reads > 10 * seconds
    assert verdict.outcomes["unknown"] > 0
    assert mover.counts["moved"] >= seconds / 5
    assert mover.counts["closed"] >= seconds
    assert hammer.frozen > 0
    if seconds >= 60:
        for fault in nemesis._faults:
            assert nemesis.struck[fault] >= 2, fault
    else:
        assert sum(nemesis.struck.values()) >= seconds / 4
