"""Settling where something cannot be settled: each such thing is told, and nothing stops the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from shardlib import ShardedEngine
from shardlib.dsn import Dsn
from shardlib.errors import CatalogUnavailable
from shardlib.session import settling
from shardlib.session.settling import gid_of, settle
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.faults import Proxy
from tests.support.models import Base

pytestmark = pytest.mark.fault

_ROLE = "clerk"


@dataclass
class World:
    """Two shards, and the same cluster as an ordinary role sees it."""

    cluster: LocalCluster
    topology: Topology
    clerk: Topology

    def prepare(self, gid: str, shard: int = 0, *, topology: Topology | None = None) -> None:
        with psycopg.connect((topology or self.topology).shards[shard].primary.conninfo(), autocommit=True) as conn:
            conn.execute("BEGIN")
            conn.execute("INSERT INTO customer (tenant_id, id, name) VALUES (%s, 1, 'x')", (gid,))
            conn.execute(f"PREPARE TRANSACTION '{gid}'")

    def decide(self, txid: str, verdict: str = "commit", shard: int = 1) -> None:
        with psycopg.connect(self.cluster.servers[shard].dsn) as conn:
            conn.execute("INSERT INTO shardlib.decision (txid, verdict) VALUES (%s, %s)", (txid, verdict))

    def decisions(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for server in self.cluster.servers:
            with psycopg.connect(server.dsn) as conn:
                found |= dict(conn.execute("SELECT txid, verdict FROM shardlib.decision").fetchall())
        return found

    def gids(self) -> list[str]:
        found: list[str] = []
        for server in self.cluster.servers:
            with psycopg.connect(server.dsn) as conn:
                found += [gid for (gid,) in conn.execute("SELECT gid FROM pg_prepared_xacts").fetchall()]
        return found

    def customers(self) -> list[str]:
        with psycopg.connect(self.cluster.servers[0].dsn) as conn:
            return [name for (name,) in conn.execute("SELECT tenant_id FROM customer").fetchall()]

    def with_dsn(self, shard: int, dsn: str) -> Topology:
        shards = list(self.topology.shards)
        shards[shard] = replace(shards[shard], primary=Dsn(dsn))
        return self.topology.evolve(shards=tuple(shards), nonce="elsewhere")


@pytest.fixture(scope="module")
def made() -> Iterator[World]:
    with LocalCluster(shards=2) as cluster:
        for server in cluster.servers:
            with psycopg.connect(server.dsn, autocommit=True) as conn:
                conn.execute(f"CREATE ROLE {_ROLE} LOGIN PASSWORD 'wood'")
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(Base.metadata, app_roles=[_ROLE])
            topology = engine.topology
        for server in cluster.servers:
            with psycopg.connect(server.dsn, autocommit=True) as conn:
                conn.execute(f"GRANT ALL ON customer TO {_ROLE}")
        shards = tuple(
            replace(shard, primary=Dsn(shard.primary.conninfo(user=_ROLE, password="wood")))
            for shard in topology.shards
        )
        yield World(cluster, topology, topology.evolve(shards=shards, nonce="as clerk"))


@pytest.fixture
def world(made: World) -> World:
    for server in made.cluster.servers:
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            for (gid,) in conn.execute("SELECT gid FROM pg_prepared_xacts").fetchall():
                conn.execute(f"ROLLBACK PREPARED '{gid}'")
            conn.execute("TRUNCATE customer CASCADE")
            conn.execute("TRUNCATE shardlib.decision")
    return made


def test_a_part_that_cannot_be_settled_stops_no_other(world: World) -> None:
    """Two parts were prepared by another role, before and after our own."""
    first, second = world.topology.shards
    foreign, own, last = (gid_of(uuid4().hex, second.id, first.id) for _ in range(3))
    world.prepare(foreign)
    world.prepare(own, topology=world.clerk)
    world.prepare(last)
    for gid in (foreign, own, last):
        world.decide(gid.split(":")[1])
    entries = {entry.gid: entry for entry in settle(world.clerk, older_than_s=0)}
    assert {gid: entry.verdict for gid, entry in entries.items()} == {
        foreign: "pending",
        own: "commit",
        last: "pending",
    }
    assert entries[foreign].shard == first.name
    assert "permission denied" in entries[foreign].reason
    assert "the role that prepared it" in entries[foreign].remedy
    assert (entries[own].reason, entries[own].remedy) == ("", "")
    assert world.customers() == [own]
    assert {entry.verdict for entry in settle(world.topology, older_than_s=0)} == {"commit"}
    assert sorted(world.customers()) == sorted([foreign, own, last])


def test_a_dsn_that_leads_nowhere_stops_no_other(world: World, monkeypatch: Any) -> None:
    """A password that this process does not have: its shard is told, and a part that it decides."""
    monkeypatch.delenv("SHARDLIB_NOT_SET", raising=False)
    first, second = world.topology.shards
    own, decided_there = gid_of(uuid4().hex, first.id, first.id), gid_of(uuid4().hex, second.id, first.id)
    world.prepare(decided_there)
    world.prepare(own)
    broken = world.with_dsn(1, make_conninfo(second.primary.reveal(), password="env:SHARDLIB_NOT_SET"))
    entries = settle(broken, older_than_s=0)
    assert {(entry.shard, entry.gid): entry.verdict for entry in entries} == {
        (first.name, own): "abort",
        (first.name, decided_there): "pending",
        (second.name, ""): "pending",
    }
    for entry in entries:
        if entry.verdict == "pending":
            assert "SHARDLIB_NOT_SET" in entry.reason
            assert f"correct the DSN of shard {second.name!r}" in entry.remedy
    assert world.gids() == [decided_there]


def test_another_database_decides_nothing(world: World) -> None:
    """The DSN of the decider leads to the other shard: that has no verdict, and must not be made to give one."""
    first, second = world.topology.shards
    txid = uuid4().hex
    gid = gid_of(txid, second.id, first.id)
    world.prepare(gid)
    world.decide(txid)
    wrong = world.with_dsn(1, first.primary.reveal())
    entries = {entry.gid: entry for entry in settle(wrong, older_than_s=0)}
    assert entries[gid].verdict == entries[""].verdict == "pending"
    assert f"says that it is shard {first.id!r}" in entries[gid].reason
    assert world.decisions() == {txid: "commit"}
    (entry,) = settle(world.topology, older_than_s=0)
    assert (entry.gid, entry.verdict) == (gid, "commit")
    assert world.customers() == [gid]


def test_a_decision_stays_while_a_shard_does_not_answer(world: World) -> None:
    """That shard may hold a part of it: without its decision, this one would be aborted later."""
    first, second = world.topology.shards
    txid = uuid4().hex
    gid = gid_of(txid, second.id, first.id)
    world.prepare(gid)
    world.decide(txid)
    with Proxy(first.primary.reveal()) as proxy:
        away = world.with_dsn(0, proxy.dsn)
        proxy.refuse()
        (entry,) = settle(away, older_than_s=0, newest=lambda: away)
        assert (entry.shard, entry.gid, entry.verdict) == (first.name, "", "pending")
        assert "did not answer" in entry.reason
        assert world.decisions() == {txid: "commit"}
        proxy.accept()
        (entry,) = settle(away, older_than_s=0, newest=lambda: away)
        assert (entry.gid, entry.verdict) == (gid, "commit")
    assert world.decisions() == {}
    assert world.customers() == [gid]


def test_a_decision_stays_for_a_part_on_a_shard_that_is_new(world: World) -> None:
    """One that came after the decisions were read: the catalog is asked again before what its part needs is deleted."""
    first, second = world.topology.shards
    txid, done = uuid4().hex, uuid4().hex
    gid = gid_of(txid, second.id, first.id)
    world.prepare(gid)
    world.decide(txid)
    world.decide(done)

    class Older:
        shards = (second,)
        shard_by_id = staticmethod(world.topology.shard_by_id)
        cluster_id = world.topology.cluster_id

    older: Any = Older()

    def answers(*topologies: Any) -> Callable[[], Topology]:
        found = iter(topologies)

        def newest() -> Topology:
            for topology in found:
                return cast("Topology", topology)
            raise CatalogUnavailable("etcd://nowhere", "away")

        return newest

    assert settle(older, older_than_s=0) == settle(older, older_than_s=0, newest=answers(older)) == []
    assert world.decisions() == {txid: "commit", done: "commit"}
    assert settle(older, older_than_s=3600, newest=answers(older, world.topology)) == []
    assert world.decisions() == {txid: "commit", done: "commit"}
    assert settle(older, older_than_s=0, newest=answers(older, world.topology)) == []
    assert world.decisions() == {txid: "commit"}
    assert world.gids() == [gid]
    (entry,) = settle(older, older_than_s=0, newest=answers())
    assert (entry.shard, entry.gid, entry.verdict) == (second.name, "", "pending")
    assert "away" in entry.reason


@pytest.mark.parametrize("role", ["superuser", _ROLE])
def test_an_abort_stays_while_its_session_could_decide(world: World, monkeypatch: Any, role: str) -> None:
    """A session that is merely slow: deleting the verdict would let it commit its part alone."""
    monkeypatch.setattr(settling, "_ABORT_STAYS_S", 0.0)
    topology = world.topology if role == "superuser" else world.clerk
    first, second = topology.shards
    txid = uuid4().hex
    with psycopg.connect(world.cluster.servers[1].dsn) as session:
        session.execute("LOCK TABLE customer IN ACCESS SHARE MODE")  # it has begun, and has written nothing yet
        world.prepare(gid_of(txid, second.id, first.id), topology=topology)
        (entry,) = settle(topology, older_than_s=0, newest=lambda: topology)
        assert entry.verdict == "abort"
        for _ in range(2):
            assert settle(topology, older_than_s=0, newest=lambda: topology) == []
        assert world.decisions() == {txid: "abort"}
        with pytest.raises(psycopg.errors.UniqueViolation):
            session.execute("INSERT INTO shardlib.decision (txid, verdict) VALUES (%s, 'commit')", (txid,))
        session.rollback()

        def gone() -> bool:
            assert settle(topology, older_than_s=0, newest=lambda: topology) == []
            return world.decisions() == {}

        eventually(gone, 10, "the verdict goes with the transaction that could have overruled it")


def test_an_abort_stays_for_a_while_in_any_case(world: World) -> None:
    world.decide(uuid4().hex, "abort")
    assert settle(world.topology, older_than_s=0, newest=lambda: world.topology) == []
    assert list(world.decisions().values()) == ["abort"]


def test_an_engine_deletes_what_nobody_needs(world: World) -> None:
    world.decide(uuid4().hex)
    with ShardedEngine(world.cluster.url) as engine:
        assert engine.settle() == []
        assert list(world.decisions().values()) == ["commit"]  # too young
        assert engine.settle(older_than_s=0) == []
    assert world.decisions() == {}
