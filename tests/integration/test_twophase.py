"""Writes on several shards: refused, or committed together; what is left in doubt is settled by its record."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from shardlib import errors
from shardlib.session.settling import gid_of, settle
from shardlib.session.twophase import TwoPhase
from tests.support.eventually import eventually
from tests.support.models import Customer, Order


def customers(facade: Any) -> list[str]:
    return sorted(facade.session(lambda s: s.scalars(select(Customer.name)).all()))


def add_all(s: Any, keys: list[str], name: str = "x") -> None:
    s.add_all([Customer(tenant_id=key, id=1, name=name) for key in keys])


def prepared(facade: Any) -> list[str]:
    found = []
    for shard in facade.core.topology.shards:
        with psycopg.connect(shard.primary.conninfo(), autocommit=True) as conn:
            found += [gid for (gid,) in conn.execute("SELECT gid FROM pg_prepared_xacts").fetchall()]
    return found


def decisions(facade: Any) -> list[tuple[str, str]]:
    found = []
    for shard in facade.core.topology.shards:
        with psycopg.connect(shard.primary.conninfo(), autocommit=True) as conn:
            found += conn.execute("SELECT txid, verdict FROM shardlib.decision").fetchall()
            conn.execute("DELETE FROM shardlib.decision")
    return found


@pytest.fixture(autouse=True)
def no_decisions_of_others(facade: Any) -> None:
    """That a transaction was aborted is remembered for a while."""
    decisions(facade)


def test_without_it_a_second_shard_is_refused(facade: Any, keys: list[str]) -> None:
    ways = [
        lambda s: (add_all(s, keys), s.flush()),
        lambda s: s.execute(insert(Customer), [{"tenant_id": key, "id": 1, "name": "x"} for key in keys]),
        lambda s: s.execute(insert(Customer).values([{"tenant_id": key, "id": 1, "name": "x"} for key in keys])),
        lambda s: s.execute(update(Customer).where(Customer.tenant_id.in_(keys)).values(name="y")),
        lambda s: s.execute(delete(Customer).execution_options(all_shards=True)),
        lambda s: s.bulk_insert_mappings(Customer, [{"tenant_id": key, "id": 1, "name": "x"} for key in keys]),
    ]
    for way in ways:
        with pytest.raises(errors.CrossShardTransaction) as caught:
            facade.session(way)
        assert len(caught.value.shards) >= 2
    assert customers(facade) == []


def test_committed_together(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        add_all(s, keys)
        s.commit()
        s.execute(insert(Order), [{"tenant_id": key, "id": n} for key in keys for n in (1, 2)])
        s.execute(insert(Customer).values([{"tenant_id": key, "id": 2, "name": "y"} for key in keys]))
        s.commit()

    facade.session(body, twophase=True)
    assert customers(facade) == ["x", "x", "x", "y", "y", "y"]
    assert len(facade.session(lambda s: s.scalars(select(Order)).all())) == 6
    assert prepared(facade) == []
    assert decisions(facade) == []


def test_one_shard_needs_no_second_phase(facade: Any, keys: list[str]) -> None:
    facade.session(lambda s: (add_all(s, keys[:1]), s.commit()), twophase=True)
    assert customers(facade) == ["x"]


def test_rolled_back_together(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        add_all(s, keys)
        s.flush()
        s.rollback()

    facade.session(body, twophase=True)
    assert customers(facade) == []


def test_a_failure_at_flush_leaves_nothing(facade: Any, keys: list[str]) -> None:
    facade.session(lambda s: (add_all(s, keys[2:]), s.commit()))

    def body(s: Any) -> None:
        add_all(s, keys, "second")
        s.commit()

    with pytest.raises(IntegrityError):
        facade.session(body, twophase=True)
    assert customers(facade) == ["x"]
    assert prepared(facade) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_at_prepare_leaves_nothing(facade: Any, keys: list[str], failing: int, monkeypatch: Any) -> None:
    real, calls = TwoPhase._prepare, []

    def broken(self: TwoPhase, leg: Any) -> None:
        calls.append(leg)
        if len(calls) == failing + 1:
            raise psycopg.OperationalError("planted")
        real(self, leg)

    monkeypatch.setattr(TwoPhase, "_prepare", broken)
    with pytest.raises(psycopg.OperationalError, match="planted"):
        facade.session(lambda s: (add_all(s, keys), s.commit()), twophase=True)
    assert customers(facade) == []
    assert prepared(facade) == []
    assert decisions(facade) == []


def test_a_lost_session_is_settled_by_the_verdict(facade: Any, keys: list[str], monkeypatch: Any) -> None:
    """The session is gone between decision and second phase: commit. Before the decision: abort."""
    monkeypatch.setattr(TwoPhase, "finish", lambda self: self.__init__(self._core))
    facade.session(lambda s: (add_all(s, keys, "decided"), s.commit()), twophase=True)
    assert len(prepared(facade)) == 2
    done = settle(facade.core.topology, older_than_s=0)
    assert sorted(entry.verdict for entry in done) == ["commit", "commit"]
    assert customers(facade) == ["decided"] * 3
    assert prepared(facade) == []
    decisions(facade)


def test_a_part_without_a_decision_is_aborted_and_a_late_decision_refused(facade: Any, keys: list[str]) -> None:
    topology = facade.core.topology
    part, decider = (facade.core.shard_for(key) for key in keys[:2])
    txid = uuid4().hex
    with psycopg.connect(part.primary.conninfo(), autocommit=True) as conn:
        conn.execute("BEGIN")
        conn.execute("INSERT INTO customer (tenant_id, id, name) VALUES (%s, 1, 'in doubt')", (keys[0],))
        conn.execute(f"PREPARE TRANSACTION '{gid_of(txid, decider.id, part.id)}'")
    assert settle(topology, older_than_s=3600) == []
    (entry,) = settle(topology, older_than_s=0)
    assert (entry.shard, entry.verdict) == (part.name, "abort")
    assert customers(facade) == []
    # Its session, had it only been slow, now finds that it may not decide otherwise.
    with psycopg.connect(decider.primary.conninfo()) as conn, pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute("INSERT INTO shardlib.decision (txid, verdict) VALUES (%s, 'commit')", (txid,))
    assert decisions(facade) == [(txid, "abort")]
    assert settle(topology, older_than_s=0) == []


def test_read_only_parts_are_not_prepared(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        s.scalars(select(Customer)).all()
        add_all(s, keys[:2])
        s.commit()

    facade.session(body, twophase=True)
    assert customers(facade) == ["x", "x"]


def test_a_gid_that_names_no_decider_does_not_stop_the_settling(facade: Any, keys: list[str], monkeypatch: Any) -> None:
    """Somebody prepared something by hand under our prefix, or the decider has left the cluster."""
    monkeypatch.setattr(TwoPhase, "finish", lambda self: self.__init__(self._core))
    facade.session(lambda s: (add_all(s, keys, "decided"), s.commit()), twophase=True)
    first = facade.core.topology.shards[0]
    foreign = ("shardlib:by hand", gid_of(uuid4().hex, "s99", first.id))
    with psycopg.connect(first.primary.conninfo(), autocommit=True) as conn:
        for number, gid in enumerate(foreign):
            conn.execute("BEGIN")
            conn.execute("INSERT INTO customer (tenant_id, id, name) VALUES ('foreign', %s, 'x')", (number,))
            conn.execute(f"PREPARE TRANSACTION '{gid}'")
        done = settle(facade.core.topology, older_than_s=0)
        assert sorted(entry.verdict for entry in done) == ["commit", "commit", "pending", "pending"]
        for gid in foreign:
            conn.execute(f"ROLLBACK PREPARED '{gid}'")
    assert customers(facade) == ["decided"] * 3
    decisions(facade)


def test_an_engine_settles_by_itself_and_one_at_a_time(facade: Any, keys: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("shardlib.engine.engine._SETTLE_EVERY_S", 0.5)
    engine = type(facade)(facade.core._catalog.safe_url, pool_size=2)
    part, decider = (facade.core.shard_for(key) for key in keys[:2])
    with psycopg.connect(part.primary.conninfo(), autocommit=True) as conn:
        conn.execute("BEGIN")
        conn.execute("INSERT INTO customer (tenant_id, id, name) VALUES (%s, 1, 'in doubt')", (keys[0],))
        conn.execute(f"PREPARE TRANSACTION '{gid_of(uuid4().hex, decider.id, part.id)}'")
    try:
        assert not engine.core._settler.running
        engine.session(
            lambda s: s.scalars(select(Customer.name).where(Customer.tenant_id == keys[1])).all(), twophase=True
        )
        assert engine.core._settler.running
        eventually(lambda: prepared(facade) == [], 10, "the part in doubt is settled")
    finally:
        engine.close()
        settle(facade.core.topology, older_than_s=0)
    assert customers(facade) == []
    decisions(facade)


def test_a_session_of_any_origin_makes_the_engine_settle(facade: Any) -> None:
    """Also one that is told only when its maker is called, or whose maker was made before a fork."""
    engine = type(facade)(facade.core._catalog.safe_url, pool_size=1)
    try:
        make = engine.core.sessionmaker()
        make().close()
        assert not engine.core._settler.running
        make(twophase=True).close()
        assert engine.core._settler.running
    finally:
        engine.close()
