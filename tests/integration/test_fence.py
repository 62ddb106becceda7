"""The fence on real servers: a transaction through a closed gate is refused, by every way into the database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError

from shardlib import errors
from shardlib.catalog import open_catalog
from shardlib.fence import close_gate, holders, install, list_gates, open_gate
from shardlib.fence.sql import SCHEMA_VERSION
from shardlib.ring import TokenRange
from shardlib.topology import Topology
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from tests.support.eventually import eventually
from tests.support.gates import give_gate, move_ranges
from tests.support.models import Customer, Order

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


class Operator:
    """Changes gates as the control plane would."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.catalog = open_catalog(cluster.url)
        self._connections: dict[str, psycopg.Connection[Any]] = {}

    def on(self, shard_id: str) -> psycopg.Connection[Any]:
        if shard_id not in self._connections:
            dsn = self.catalog.load().shard(shard_id).primary
            self._connections[shard_id] = psycopg.connect(dsn.conninfo(), autocommit=True)
        return self._connections[shard_id]

    def publish(self, after: Topology) -> None:
        self.catalog.publish(after, expected=after.version - 1)

    def renew(self, shard_id: str) -> tuple[int, int]:
        """The shard's default gate is replaced: (old, new)."""
        before = self.catalog.load()
        after = renew_gates(before, shard_id, nonce=uuid4().hex)
        for number in after.gates_of(shard_id):
            open_gate(self.on(shard_id), number)
        self.publish(after)
        return before.default_gate(shard_id), after.default_gate(shard_id)

    def close(self, shard_id: str, number: int, budget_s: float = 5.0) -> bool:
        return close_gate(self.on(shard_id), number, budget_s=budget_s).closed

    def end(self) -> None:
        topology = self.catalog.load()
        for shard in topology.shards:
            after = give_gate(topology, shard.id, (), nonce=uuid4().hex)
            for number in after.gates_of(shard.id):
                open_gate(self.on(shard.id), number)
            self.publish(after)
            topology = after
            for number in list_gates(self.on(shard.id)):
                if number not in topology.gates_of(shard.id):
                    self.close(shard.id, number)
        for conn in self._connections.values():
            conn.close()
        self.catalog.close()

    def give_own_gate(self, facade: Any, key: str) -> tuple[str, Topology]:
        """A key gets a gate of its own, and the facade knows: its shard's id, and the topology. Old gates stay open."""
        shard_id, token = facade.core.shard_for(key).id, facade.core.token(key)
        own = give_gate(self.catalog.load(), shard_id, (TokenRange(token, token),), nonce=uuid4().hex)
        for number in own.gates_of(shard_id):
            open_gate(self.on(shard_id), number)
        self.publish(own)
        facade.core.refresh()
        return shard_id, own


@pytest.fixture
def operator(shop: LocalCluster) -> Iterator[Operator]:
    made = Operator(shop)
    yield made
    made.end()


def frozen(facade: Any) -> Any:
    """The facade's engine no longer learns of new topologies by itself."""
    facade.core._cache._catalog = Silent(facade.core._cache._catalog)
    facade.core._cache._watch.close()
    return facade


class Silent:
    """A catalog that has stopped answering."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def load(self, known: Any = None) -> Any:
        raise errors.CatalogUnavailable(self._inner.safe_url, "cut off by the test")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("level", LEVELS)
def test_work_not_begun_goes_on_unseen(facade: Any, keys: list[str], operator: Operator, level: str) -> None:
    shard = facade.core.shard_for(keys[0]).id
    facade.session(lambda s: s.scalars(select(Customer)).all())  # connections are warm
    old, new = operator.renew(shard)
    assert operator.close(shard, old)

    def body(s: Any) -> int:
        s.connection(execution_options={"isolation_level": level})
        s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        s.flush()
        assert new in [n for leg in s._now.legs.values() for n in leg.gates]
        s.commit()
        return 1

    assert facade.session(body, keys[0]) == 1


@pytest.mark.parametrize("level", LEVELS)
def test_a_transaction_waiting_for_a_closing_gate_is_refused(
    facade: Any, keys: list[str], operator: Operator, level: str
) -> None:
    """The drop commits while the client waits for the lock: its snapshot must not let it in."""
    frozen(facade)
    facade.core._core.reroute_timeout_s = 0.2
    shard = facade.core.shard_for(keys[0]).id
    old, _ = operator.renew(shard)
    dropper = psycopg.connect(operator.catalog.load().shard(shard).primary.conninfo())
    dropper.execute(f"DROP TABLE shardlib.gate_{old}")

    def release() -> None:
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = to_regclass(%s)::oid AND NOT granted"
        eventually(lambda: operator.on(shard).execute(waiting, (f"shardlib.gate_{old}",)).fetchone() == (1,), 10)
        dropper.commit()

    releaser = threading.Thread(target=release)
    releaser.start()

    def body(s: Any) -> None:
        s.connection(execution_options={"isolation_level": level})

    with pytest.raises(errors.StaleTopology) as caught:
        facade.session(body, keys[0])
    releaser.join()
    dropper.close()
    assert caught.value.gate == old


def test_a_client_cut_off_from_the_catalog_can_neither_write_nor_read(
    facade: Any, keys: list[str], operator: Operator
) -> None:
    facade.session(lambda s: (s.add(Customer(tenant_id=keys[0], id=1, name="x")), s.commit()))
    frozen(facade)
    facade.core._core.reroute_timeout_s = 0.3
    shard = facade.core.shard_for(keys[0]).id
    old, _ = operator.renew(shard)
    assert operator.close(shard, old)
    ways = [
        lambda: facade.session(lambda s: s.get(Customer, (keys[0], 1)), keys[0]),
        lambda: facade.session(lambda s: s.scalars(select(Customer).where(Customer.tenant_id == keys[0])).all()),
        lambda: facade.session(lambda s: s.scalars(select(Customer)).all()),
        lambda: facade.session(lambda s: (s.add(Order(tenant_id=keys[0], id=1)), s.flush())),
        lambda: facade.session(
            lambda s: s.execute(update(Customer).where(Customer.tenant_id == keys[0]).values(name="y"))
        ),
        lambda: facade.session(lambda s: s.execute(insert(Order), [{"tenant_id": keys[0], "id": 7}])),
        lambda: facade.session(lambda s: s.execute(text("SELECT 1")), keys[0]),
        lambda: facade.connect(lambda c: c.execute(text("SELECT 1")), keys[0]),
        lambda: facade.session(lambda s: s.begin_nested() and s.get(Customer, (keys[0], 1))),
    ]
    for way in ways:
        with pytest.raises(errors.StaleTopology):
            way()
    # Other shards are no concern of that gate.
    assert facade.session(lambda s: s.get(Customer, (keys[1], 1))) is None


def test_work_that_had_begun_is_refused_and_run_again_by_run(facade: Any, keys: list[str], operator: Operator) -> None:
    shards = [facade.core.shard_for(key).id for key in keys]
    attempts: list[int] = []

    def body(s: Any) -> str:
        attempts.append(1)
        assert s.get(Customer, (keys[0], 1)) is None
        if len(attempts) == 1:
            old, _ = operator.renew(shards[1])
            assert operator.close(shards[1], old)
        s.add(Customer(tenant_id=keys[1], id=1, name="x"))
        return "done"

    with pytest.raises(errors.StaleTopology):
        facade.session(lambda s: (body(s), s.commit()))
    attempts.clear()
    assert facade.run(body) == "done"
    assert len(attempts) == 2
    assert facade.session(lambda s: s.get(Customer, (keys[1], 1)).name) == "x"


def test_a_moved_key_is_followed_to_its_new_shard(facade: Any, keys: list[str], operator: Operator) -> None:
    """Connections, pinned and routed sessions all go on at the new place, unseen by the application."""
    source, target = (facade.core.shard_for(key).id for key in keys[:2])
    token = facade.core.token(keys[0])
    ranges = (TokenRange(token, token),)
    held: list[str] = []

    def move() -> None:
        before = operator.catalog.load()
        own = give_gate(before, source, ranges, nonce=uuid4().hex)
        for number in own.gates_of(source):
            open_gate(operator.on(source), number)
        operator.publish(own)
        for number in [*before.gates_of(source), *(g.number for g in own.gates if g.ranges)]:
            assert operator.close(source, number)
        operator.publish(move_ranges(own, ranges, target, nonce=uuid4().hex))

    def core(conn: Any) -> None:
        held.append(conn.shard.id)
        conn.execute(text("SELECT 1"))
        conn.commit()
        move()
        conn.execute(text("SELECT 1"))
        held.append(conn.shard.id)
        conn.commit()

    facade.connect(core, keys[0])
    assert held == [source, target]
    assert facade.core.shard_for(keys[0]).id == target
    facade.session(lambda s: (s.add(Customer(tenant_id=keys[0], id=1, name="x")), s.commit()), keys[0])
    found = operator.on(target).execute("SELECT count(*) FROM customer WHERE tenant_id = %s", (keys[0],)).fetchone()
    assert found == (1,)


def test_a_scan_holds_all_gates_of_each_shard(facade: Any, keys: list[str], operator: Operator) -> None:
    source, own = operator.give_own_gate(facade, keys[0])

    def body(s: Any) -> None:
        s.scalars(select(Customer)).all()
        for shard in own.shards:
            for number in own.gates_of(shard.id):
                assert len(holders(operator.on(shard.id), number)) == 1

    facade.session(body)

    def keyed(s: Any) -> None:
        s.get(Customer, (keys[0], 1))
        default = own.default_gate(source)
        assert holders(operator.on(source), default) == ()
        (other,) = [number for number in own.gates_of(source) if number != default]
        assert len(holders(operator.on(source), other)) == 1
        # A second key of the same shard behind another gate takes that one too, in the running transaction.
        second = next(f"other-{n}" for n in range(1000) if facade.core.shard_for(f"other-{n}").id == source)
        s.get(Customer, (second, 1))
        assert len(holders(operator.on(source), default)) == 1

    facade.session(keyed)


def test_a_gate_taken_inside_a_savepoint_is_taken_again_after_it(
    facade: Any, keys: list[str], operator: Operator
) -> None:
    source, own = operator.give_own_gate(facade, keys[0])
    second = next(f"other-{n}" for n in range(1000) if facade.core.shard_for(f"other-{n}").id == source)
    default = own.default_gate(source)

    def body(s: Any) -> None:
        s.get(Customer, (keys[0], 1))
        nested = s.begin_nested()
        s.get(Customer, (keys[0], 2))  # SQLAlchemy sets the savepoint with the first statement inside
        s.get(Customer, (second, 1))
        assert len(holders(operator.on(source), default)) == 1
        nested.rollback()
        assert holders(operator.on(source), default) == ()
        s.get(Customer, (second, 1))
        assert len(holders(operator.on(source), default)) == 1

    facade.session(body)


def test_closing_waits_for_transactions_in_flight_and_names_them(
    facade: Any, keys: list[str], operator: Operator
) -> None:
    shard = facade.core.shard_for(keys[0]).id

    def body(s: Any) -> None:
        s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        s.flush()
        old, _ = operator.renew(shard)
        closing = close_gate(operator.on(shard), old, budget_s=0.2)
        assert not closing.closed
        assert closing.attempts >= 2
        assert [holder.application for holder in closing.holders] == ["shardlib"]
        assert old in list_gates(operator.on(shard))
        s.commit()
        assert operator.close(shard, old)
        assert operator.close(shard, old)  # closing it again is no error

    facade.session(body, keys[0])


def test_a_prepared_transaction_keeps_its_gate(facade: Any, keys: list[str], operator: Operator) -> None:
    shard = facade.core.shard_for(keys[0]).id

    def body(s: Any) -> None:
        s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        s.flush()
        s.execute(text("PREPARE TRANSACTION 'by hand'"))

    facade.session(body, keys[0])
    old, _ = operator.renew(shard)
    closing = close_gate(operator.on(shard), old, budget_s=0.1)
    assert [holder.gid for holder in closing.holders] == ["by hand"]
    operator.on(shard).execute("COMMIT PREPARED 'by hand'")
    assert operator.close(shard, old)


def test_autocommit_is_refused_with_the_way_out(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        s.connection(execution_options={"isolation_level": "AUTOCOMMIT"})

    with pytest.raises(errors.UnsupportedOperation, match="AUTOCOMMIT"):
        facade.session(body, keys[0])

    def core(conn: Any) -> None:
        conn.execution_options(isolation_level="AUTOCOMMIT").execute(text("SELECT 1"))

    with pytest.raises(errors.UnsupportedOperation, match="AUTOCOMMIT"):
        facade.connect(core, keys[0])
    # The pooled connection is none the worse.
    assert facade.session(lambda s: s.scalar(text("SELECT 1")), keys[0]) == 1


def test_the_drivers_connection_is_fenced_as_well(facade: Any, keys: list[str]) -> None:
    def core(conn: Any) -> None:
        with pytest.raises(errors.UnsupportedOperation, match="outside of a routed transaction"):
            conn.connection.cursor().execute("SELECT 1")
        assert conn.scalar(text("SELECT 1")) == 1
        conn.connection.cursor().execute("SELECT 1")
        conn.commit()
        with pytest.raises(errors.UnsupportedOperation, match="outside of a routed transaction"):
            conn.connection.cursor().execute("SELECT 1")

    facade.connect(core, keys[0])


def test_a_shard_without_the_schema_and_a_newer_one(
    facade: Any, keys: list[str], operator: Operator, shop: LocalCluster
) -> None:
    shard = facade.core.shard_for(keys[0])
    conn = operator.on(shard.id)

    def seen_by_a_new_connection(match: str) -> None:
        made = type(facade)(shop.url)
        try:
            with pytest.raises(errors.InvalidTopology, match=match):
                made.session(lambda s: s.get(Customer, (keys[0], 1)))
        finally:
            made.close()

    try:
        conn.execute("UPDATE shardlib.control SET schema_version = 99")
        seen_by_a_new_connection(r"version 99.*upgrade")
        with pytest.raises(errors.InvalidTopology, match="99"):
            install(conn, cluster_id="x", shard_id="s1")
        conn.execute("UPDATE shardlib.control SET schema_version = %s, shard_id = 's99'", (SCHEMA_VERSION,))
        seen_by_a_new_connection("says that it is shard 's99'")
        conn.execute("UPDATE shardlib.control SET shard_id = %s", (shard.id,))
        conn.execute("ALTER SCHEMA shardlib RENAME TO hidden")
        seen_by_a_new_connection("no schema shardlib")
    finally:
        if conn.execute("SELECT to_regnamespace('hidden') IS NOT NULL").fetchone() == (True,):
            conn.execute("ALTER SCHEMA hidden RENAME TO shardlib")
        conn.execute("UPDATE shardlib.control SET schema_version = %s, shard_id = %s", (SCHEMA_VERSION, shard.id))


def test_an_idle_transaction_is_ended_by_the_server(
    shop: LocalCluster, keys: list[str], facade: Any, operator: Operator
) -> None:
    """A client that stops in the middle of a transaction cannot hold a gate for ever."""
    made = type(facade)(shop.url, idle_in_transaction_timeout_s=0.2)
    try:

        def body(s: Any) -> None:
            pid = s.scalar(text("SELECT pg_backend_pid()"))
            ask = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
            on = operator.on(facade.core.shard_for(keys[0]).id)
            eventually(lambda: on.execute(ask, (pid,)).fetchone() == (0,), 20, "the server ends the session")
            s.execute(text("SELECT 1"))

        with pytest.raises(DBAPIError, match="idle-in-transaction"):
            made.session(body, keys[0])
    finally:
        made.close()


def test_what_was_written_before_a_refusal_is_not_committed_as_nothing(
    facade: Any, keys: list[str], operator: Operator
) -> None:
    """A transaction that needs one more gate and is refused has failed: its commit() says so."""
    shard_id, moving = operator.give_own_gate(facade, keys[0])

    def body(s: Any) -> None:
        s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        s.flush()
        assert operator.close(shard_id, moving.default_gate(shard_id))
        with pytest.raises(errors.StaleTopology):
            s.execute(select(Customer)).all()
        with pytest.raises(DBAPIError, match="failed"):
            s.commit()

    facade.session(body, keys[0])
    assert facade.session(lambda s: s.get(Customer, (keys[0], 1)), keys[0]) is None


def test_a_core_connection_that_could_not_begin_goes_on(facade: Any, keys: list[str], operator: Operator) -> None:
    """SQLAlchemy takes it for one that is still beginning, and would begin no transaction by itself."""
    shard_id = facade.core.shard_for(keys[0]).id

    def body(conn: Any) -> None:
        conn.execute(text("SELECT 1"))
        conn.rollback()
        frozen(facade)
        facade.core._core.reroute_timeout_s = 0.2
        old, _ = operator.renew(shard_id)
        assert operator.close(shard_id, old)
        with pytest.raises(errors.StaleTopology):
            conn.begin()
        facade.core._cache._catalog = facade.core._cache._catalog._inner
        facade.core.refresh()
        with conn.begin_nested():
            assert conn.scalar(text("SELECT 1")) == 1
        conn.commit()

    facade.connect(body, keys[0])


def test_a_core_scan_holds_all_gates_of_its_shard(facade: Any, keys: list[str], operator: Operator) -> None:
    shard_id, moving = operator.give_own_gate(facade, keys[0])

    def body(conn: Any) -> None:
        conn.execute(select(Customer).where(Customer.tenant_id == keys[0]))
        assert not holders(operator.on(shard_id), moving.default_gate(shard_id))
        conn.execute(select(Customer)).all()
        assert len(holders(operator.on(shard_id), moving.default_gate(shard_id))) == 1

    facade.connect(body, keys[0])
