"""A two-phase commit that loses a connection at each of its steps: all or nothing, and no false answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from shardlib import ShardedEngine, errors
from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn
from shardlib.session import settling, twophase
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.faults import Proxy
from tests.support.models import Base, Customer
from tests.support.shop import one_key_a_shard

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def proxied() -> Iterator[tuple[LocalCluster, list[Proxy]]]:
    """Two shards, each behind a proxy."""
    with (
        LocalCluster(shards=2) as cluster,
        Proxy(cluster.servers[0].dsn) as first,
        Proxy(cluster.servers[1].dsn) as second,
    ):
        proxies = [first, second]
        catalog = open_catalog(cluster.url)
        before = catalog.load()
        shards = tuple(
            replace(shard, primary=Dsn(proxy.dsn)) for shard, proxy in zip(before.shards, proxies, strict=True)
        )
        catalog.publish(before.evolve(shards=shards, nonce="through proxies"), expected=before.version)
        catalog.close()
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(Base.metadata)
        yield cluster, proxies


@pytest.fixture(params=[SyncFacade, AsyncFacade], ids=["sync", "asyncio"])
def facade(request: pytest.FixtureRequest, proxied: tuple[LocalCluster, list[Proxy]]) -> Iterator[Any]:
    cluster, proxies = proxied
    for server, proxy in zip(cluster.servers, proxies, strict=True):
        proxy.heal()
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            for (gid,) in conn.execute("SELECT gid FROM pg_prepared_xacts").fetchall():
                conn.execute(f"ROLLBACK PREPARED '{gid}'")
            conn.execute("TRUNCATE customer CASCADE")
            conn.execute("TRUNCATE shardlib.decision")
    made = request.param(cluster.url)
    yield made
    made.close()


@pytest.fixture
def keys(facade: Any) -> list[str]:
    """A tenant of each shard, in the order of the shards: the second one decides."""
    return [key for _, key in sorted(one_key_a_shard(facade.core).items())]


def rows(cluster: LocalCluster) -> list[int]:
    counts = []
    for server in cluster.servers:
        with psycopg.connect(server.dsn) as conn:
            (count,) = conn.execute("SELECT count(*) FROM customer").fetchone() or (0,)
        counts.append(count)
    return counts


def prepared(cluster: LocalCluster) -> int:
    with psycopg.connect(cluster.servers[0].dsn) as conn:
        (count,) = conn.execute("SELECT count(*) FROM pg_prepared_xacts").fetchone() or (0,)
    return int(count)


STEPS = [
    (0, "PREPARE TRANSACTION", False),
    (0, "PREPARE TRANSACTION", True),
    (1, "INSERT INTO SHARDLIB.DECISION", False),
    (1, "COMMIT", False),
    (1, "COMMIT", True),
    (0, "COMMIT PREPARED", False),
    (0, "COMMIT PREPARED", True),
    (1, "BEGIN; SET LOCAL SYNCHRONOUS_COMMIT", False),
]


@pytest.mark.parametrize("read_leg", [False, True])
@pytest.mark.parametrize(("shard", "word", "forwarded"), STEPS)
def test_a_connection_is_lost_at_each_step(
    facade: Any, proxied: tuple[LocalCluster, list[Proxy]], keys: list[str], shard: int, word: str, forwarded: bool,
    read_leg: bool,
) -> None:  # fmt: skip
    cluster, proxies = proxied
    attempts: list[int] = []

    def body(s: Any) -> None:
        attempts.append(1)
        if read_leg:
            s.scalars(select(Customer)).all()
        s.add_all([Customer(tenant_id=key, id=len(attempts), name="x") for key in keys])
        s.flush()
        if len(attempts) == 1:
            cuts.append(proxies[shard].cuts + proxies[shard].replies_lost)
            proxies[shard].cut_at(word, forwarded=forwarded)

    cuts: list[int] = []
    try:
        facade.run(body, twophase=True)
    except errors.CommitOutcomeUnknown:
        outcome = "unknown"
        assert word == "COMMIT"
    else:
        outcome = "done"
    assert proxies[shard].cuts + proxies[shard].replies_lost > cuts[0], "the fault did not strike"
    # Whoever looks now, or after the leftovers are settled, finds all or nothing; what was promised is there once.
    assert prepared(cluster) == 0, "the session left a part in doubt, though every server answers"
    found = rows(cluster)
    assert found in ([1, 1], [0, 0])
    if outcome == "done" or forwarded:
        assert found == [1, 1]
    assert facade.core.settle(older_than_s=0) == []
    assert rows(cluster) == found


def test_a_server_that_stays_away_after_it_prepared(
    facade: Any, proxied: tuple[LocalCluster, list[Proxy]], keys: list[str]
) -> None:
    """Decided, and one part cannot be reached: commit() is right to return, and settling makes it visible."""
    cluster, proxies = proxied

    def body(s: Any) -> None:
        s.add_all([Customer(tenant_id=key, id=1, name="x") for key in keys])
        s.flush()
        proxies[0].cut_at("COMMIT PREPARED", forwarded=False)
        proxies[0].refuse()
        s.commit()

    facade.session(body, twophase=True)
    assert rows(cluster) == [0, 1]
    assert prepared(cluster) == 1
    proxies[0].heal()
    assert [entry.verdict for entry in facade.core.settle(older_than_s=0)] == ["commit"]
    assert rows(cluster) == [1, 1]


def test_a_read_leg_lost_at_commit_keeps_nothing(
    facade: Any, proxied: tuple[LocalCluster, list[Proxy]], keys: list[str]
) -> None:
    cluster, proxies = proxied

    def body(s: Any) -> None:
        s.scalars(select(Customer)).all()
        s.add(Customer(tenant_id=keys[1], id=1, name="x"))
        s.flush()
        proxies[0].cut_at("COMMIT", forwarded=True)
        with pytest.raises(Exception, match=r"unknown|lost|closed"):
            s.commit()

    facade.session(body)
    assert rows(cluster) == [0, 0]


def test_settling_does_not_wait_for_a_frozen_server(
    facade: Any, proxied: tuple[LocalCluster, list[Proxy]], monkeypatch: Any
) -> None:
    """The shard takes the connection and then falls silent: its parts stay in doubt, the others' are looked at."""
    topology = facade.core.topology
    real = settling._connect

    def then_frozen(topology: Any, shard: Any, timeout_s: float) -> Any:
        conn = real(topology, shard, timeout_s)
        if shard.id == topology.shards[0].id:
            proxied[1][0].stall()
        return conn

    monkeypatch.setattr(settling, "_connect", then_frozen)
    began = time.monotonic()
    try:
        (entry,) = settling.settle(topology, older_than_s=0, timeout_s=1)
    finally:
        proxied[1][0].heal()
    assert 0.9 < time.monotonic() - began < 20
    assert (entry.shard, entry.gid, entry.verdict) == (topology.shards[0].name, "", "pending")
    assert "no answer within 1 s" in entry.reason
    assert "settle again" in entry.remedy


def test_settling_asks_the_shards_side_by_side(
    facade: Any, proxied: tuple[LocalCluster, list[Proxy]], keys: list[str], monkeypatch: Any
) -> None:
    """Six dead shards stand before the live one, which is settled; all together cost what one of them costs."""
    cluster, _ = proxied
    monkeypatch.setattr(twophase.TwoPhase, "finish", lambda self: self.__init__(self._core))
    facade.session(
        lambda s: (s.add_all([Customer(tenant_id=key, id=1, name="x") for key in keys]), s.commit()), twophase=True
    )
    assert prepared(cluster) == 1
    topology = facade.core.topology
    alive, decider = topology.shards
    with Proxy(cluster.servers[0].dsn) as silent:
        silent.stall()
        dead = tuple(replace(alive, id=f"s{n}", name=f"dead-{n}", primary=Dsn(silent.dsn)) for n in range(91, 97))

        class Wider:
            shards = (*dead, alive, decider)
            cluster_id = topology.cluster_id
            shard_by_id = staticmethod(topology.shard_by_id)

        began = time.monotonic()
        done = settling.settle(Wider(), older_than_s=0, timeout_s=2)  # type: ignore[arg-type]
        took_s = time.monotonic() - began
        silent.heal()
    assert [(entry.shard, entry.verdict) for entry in done] == [
        *((shard.name, "pending") for shard in dead),
        (alive.name, "commit"),
    ]
    assert not any(entry.gid for entry in done[:-1])
    assert rows(cluster) == [1, 1]
    assert took_s < 10, f"{took_s:.1f} s: six shards of 2 s each in a row are 12"


def decisions(cluster: LocalCluster) -> list[str]:
    with psycopg.connect(cluster.servers[1].dsn) as conn:
        return [str(verdict) for (verdict,) in conn.execute("SELECT verdict FROM shardlib.decision").fetchall()]


def test_a_server_freezes_after_the_decision(
    facade: Any, proxied: tuple[LocalCluster, list[Proxy]], keys: list[str], monkeypatch: Any
) -> None:
    """Nothing is answered and nothing closed: commit() tells success within a limit, and settling does the rest."""
    cluster, _ = proxied
    real = twophase.TwoPhase.finish

    def frozen(self: twophase.TwoPhase) -> None:
        cluster.servers[0].pause()
        real(self)

    monkeypatch.setattr(twophase.TwoPhase, "finish", frozen)
    began = time.monotonic()
    try:
        facade.session(
            lambda s: (s.add_all([Customer(tenant_id=key, id=1, name="x") for key in keys]), s.commit()), twophase=True
        )
        took_s = time.monotonic() - began
        assert decisions(cluster) == ["commit"]
    finally:
        cluster.servers[0].resume()
    assert took_s < twophase._FINISH_S + 15
    # The server runs what it had received as it wakes up, or settling does.
    assert {entry.verdict for entry in facade.core.settle(older_than_s=0)} <= {"commit"}
    eventually(lambda: prepared(cluster) == 0, 30, "the part is committed")
    assert rows(cluster) == [1, 1]
    facade.core.settle(older_than_s=0)
    assert decisions(cluster) == []
    assert sorted(facade.session(lambda s: s.scalars(select(Customer.name)).all())) == ["x", "x"]


def test_the_decider_freezes_once_all_is_committed(
    facade: Any, proxied: tuple[LocalCluster, list[Proxy]], keys: list[str], monkeypatch: Any
) -> None:
    cluster, _ = proxied
    real = twophase.TwoPhase._end_parts

    def then_frozen(self: twophase.TwoPhase, verb: Any) -> Any:
        left = real(self, verb)
        cluster.servers[1].pause()
        return left

    monkeypatch.setattr(twophase.TwoPhase, "_end_parts", then_frozen)
    began = time.monotonic()
    try:
        facade.session(
            lambda s: (s.add_all([Customer(tenant_id=key, id=1, name="x") for key in keys]), s.commit()), twophase=True
        )
        took_s = time.monotonic() - began
    finally:
        cluster.servers[1].resume()
    assert took_s < twophase._FINISH_S + 15
    assert rows(cluster) == [1, 1]
    assert facade.core.settle(older_than_s=0) == []
    assert decisions(cluster) == []


def test_a_server_freezes_as_its_part_is_rolled_back(
    facade: Any, proxied: tuple[LocalCluster, list[Proxy]], keys: list[str], monkeypatch: Any
) -> None:
    cluster, proxies = proxied
    real = twophase.TwoPhase.abort

    def frozen(self: twophase.TwoPhase) -> None:
        cluster.servers[0].pause()
        real(self)

    def body(s: Any) -> None:
        s.add_all([Customer(tenant_id=key, id=1, name="x") for key in keys])
        s.flush()
        proxies[1].cut_at("INSERT INTO SHARDLIB.DECISION", forwarded=False)
        s.commit()

    monkeypatch.setattr(twophase.TwoPhase, "abort", frozen)
    began = time.monotonic()
    try:
        with pytest.raises((errors.RetryableError, DBAPIError)):
            facade.session(body, twophase=True)
        took_s = time.monotonic() - began
    finally:
        cluster.servers[0].resume()
    assert took_s < twophase._FINISH_S + 15
    assert {entry.verdict for entry in facade.core.settle(older_than_s=0)} <= {"abort"}
    eventually(lambda: prepared(cluster) == 0, 30, "the part is rolled back")
    assert rows(cluster) == [0, 0]
