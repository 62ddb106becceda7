"""Corners of a session in which rows could go to the wrong shard, get lost, or be answered by some shards only."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import psycopg
import pytest
from sqlalchemy import bindparam, delete, event, func, insert, literal_column, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import with_loader_criteria

from shardlib import ShardedEngine, errors
from tests.integration.test_fence import Operator
from tests.support.eventually import eventually
from tests.support.models import Currency, Customer, Order, Tag


def places(facade: Any, table: str = "customer") -> dict[str, set[str]]:
    """Shard id -> tenants whose rows lie there, asked of the servers themselves."""
    found = {}
    for shard in facade.core.topology.shards:
        with psycopg.connect(shard.primary.conninfo()) as conn:
            rows = conn.execute(f"SELECT DISTINCT tenant_id FROM {table}").fetchall()
        found[shard.id] = {tenant for (tenant,) in rows}
    return found


def assert_rows_at_home(facade: Any, tenants: list[str], table: str = "customer") -> None:
    expected: dict[str, set[str]] = {shard.id: set() for shard in facade.core.topology.shards}
    for tenant in tenants:
        expected[facade.core.shard_for(tenant).id].add(tenant)
    assert places(facade, table) == expected


def customer(key: str, number: int = 1, name: str = "x") -> Customer:
    return Customer(tenant_id=key, id=number, name=name)


def rows_of(keys: list[str]) -> list[dict[str, Any]]:
    return [{"tenant_id": key, "id": 1, "name": "x"} for key in keys]


# --- rows at the wrong place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("twophase", [False, True])
def test_an_insert_of_rows_flushes_pending_objects_to_their_own_shards(
    facade: Any, keys: list[str], twophase: bool
) -> None:
    def body(s: Any) -> None:
        s.add(customer(keys[1]))
        s.execute(insert(Order), [{"tenant_id": keys[0], "id": n} for n in (1, 2)])
        s.commit()

    if twophase:
        facade.session(body, twophase=True)
        assert_rows_at_home(facade, keys[1:2])
    else:
        with pytest.raises(errors.CrossShardTransaction):
            facade.session(body)
        assert_rows_at_home(facade, [])


def test_an_update_by_primary_key_flushes_pending_objects_to_their_own_shards(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        s.add(customer(keys[0]))
        s.commit()
        s.add(customer(keys[1]))
        s.execute(update(Customer), [{"tenant_id": keys[0], "id": 1, "name": "y"}])
        s.commit()

    facade.session(body, twophase=True)
    assert_rows_at_home(facade, keys[:2])


def test_rows_of_a_many_to_many_table_follow_their_own_key(facade: Any, keys: list[str]) -> None:
    def fill(s: Any) -> None:
        for key in keys[:2]:
            s.add_all([Order(tenant_id=key, id=1), Tag(tenant_id=key, id=1, label="t")])
        s.commit()

    def body(s: Any) -> None:
        s.add(customer(keys[0]))
        s.flush()
        order, tag = s.get(Order, (keys[1], 1)), s.get(Tag, (keys[1], 1))
        order.tags.append(tag)
        s.commit()

    facade.session(fill, twophase=True)
    facade.session(body, twophase=True)
    assert_rows_at_home(facade, keys[1:2], "order_tag")


def test_rows_of_a_many_to_many_table_on_two_shards_at_once(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        for key in keys[:2]:
            s.add(Order(tenant_id=key, id=1, tags=[Tag(tenant_id=key, id=1, label="t")]))
        s.commit()

    facade.session(body, twophase=True)
    assert_rows_at_home(facade, keys[:2], "order_tag")


def test_a_core_connection_refuses_rows_of_another_key(facade: Any, keys: list[str]) -> None:
    def body(conn: Any) -> None:
        conn.execute(insert(Customer).values(rows_of(keys[1:2])[0]))
        conn.commit()

    with pytest.raises(errors.ShardKeyMismatch):
        facade.connect(body, keys[0])
    assert_rows_at_home(facade, [])


def test_a_core_connection_refuses_an_update_of_another_key(facade: Any, keys: list[str]) -> None:
    for statement in (
        update(Customer).where(Customer.tenant_id == keys[1]).values(name="y"),
        delete(Customer).where(Customer.tenant_id == keys[1]),
        select(Customer).where(Customer.tenant_id == keys[1]),
    ):
        with pytest.raises(errors.ShardKeyMismatch):
            facade.connect(lambda conn, s=statement: conn.execute(s), keys[0])


@pytest.mark.parametrize("way", ["session", "core"])
def test_a_pinned_write_without_a_key_is_refused(facade: Any, keys: list[str], way: str) -> None:
    """It would change the rows of whichever other keys happen to share the shard."""
    run = facade.session if way == "session" else facade.connect
    for statement in (update(Customer).values(name="y"), delete(Customer).where(Customer.id == 1)):
        with pytest.raises(errors.ShardKeyRequired, match="all_shards"):
            run(lambda s, statement=statement: s.execute(statement), keys[0])


# --- commits that do not tell the truth ------------------------------------------------------------------------------


def fails_on(key: str) -> Any:
    return select(1 / (Customer.id - 1)).where(Customer.tenant_id == key)


@pytest.mark.parametrize("failed", [0, 1])
def test_a_failed_leg_is_not_prepared_as_nothing(facade: Any, keys: list[str], failed: int) -> None:
    """PostgreSQL answers PREPARE TRANSACTION of a failed transaction with ROLLBACK, and no error."""

    def body(s: Any) -> None:
        s.add_all([customer(key) for key in keys])
        s.flush()
        home = sorted(keys, key=lambda key: facade.core.shard_for(key).id)
        with pytest.raises(DBAPIError):
            s.execute(fails_on(home[failed])).all()
        s.commit()

    with pytest.raises(Exception, match="failed"):
        facade.session(body, twophase=True)
    assert_rows_at_home(facade, [])


def test_a_failed_read_does_not_fail_after_the_write_is_committed(facade: Any, keys: list[str]) -> None:
    """Whatever order the shards commit in: an error from commit() means that nothing was kept."""
    facade.session(lambda s: (s.add(Order(tenant_id=keys[1], id=1)), s.commit()))
    for number in range(6):

        def body(s: Any, number: int = number) -> None:
            if number % 2:
                s.get(Customer, (keys[1], 1))
            s.execute(insert(Customer).values(tenant_id=keys[0], id=100 + number, name="x"))
            with pytest.raises(DBAPIError):
                s.execute(select(1 / (Order.id - Order.id)).where(Order.tenant_id == keys[1])).all()
            s.commit()

        with pytest.raises(DBAPIError):
            facade.session(body)
        assert_rows_at_home(facade, [])


def test_objects_added_by_hooks_of_the_commit_are_committed_with_the_rest(facade: Any, keys: list[str]) -> None:
    """What a `before_commit` or `after_flush_postexec` hook adds is flushed late, perhaps on one more shard."""

    def body(s: Any) -> None:
        @event.listens_for(s, "before_commit")
        def late(session: Any) -> None:
            session.add(customer(keys[0], 2))

        @event.listens_for(s, "after_flush_postexec")
        def later(session: Any, context: Any) -> None:
            if not added:
                added.append(1)
                session.add(customer(keys[2]))

        added: list[int] = []
        s.add_all([customer(key) for key in keys[:2]])
        s.commit()

    facade.session(body, twophase=True)
    assert_rows_at_home(facade, keys)


def test_a_failed_commit_stays_failed(facade: Any, keys: list[str]) -> None:
    """After a refused PREPARE the parts are rolled back: a second commit() must not keep the rest."""

    def body(s: Any) -> None:
        s.add_all([customer(key) for key in keys])
        s.flush()
        home = sorted(keys, key=lambda key: facade.core.shard_for(key).id)
        with pytest.raises(DBAPIError):
            s.execute(fails_on(home[0])).all()
        for _ in range(3):
            with pytest.raises(Exception, match=r"failed|roll"):
                s.commit()
        s.rollback()
        s.add(customer(keys[0]))
        s.commit()

    facade.session(body, twophase=True)
    assert_rows_at_home(facade, keys[:1])


def test_run_does_not_repeat_what_is_committed(facade: Any, keys: list[str]) -> None:
    calls = []

    def body(s: Any) -> None:
        calls.append(1)
        s.add(customer(keys[0], len(calls)))
        s.commit()
        raise errors.StaleTopology("shard", 1, 1)

    with pytest.raises(errors.StaleTopology):
        facade.run(body)
    assert len(calls) == 1
    assert len(facade.session(lambda s: s.scalars(select(Customer)).all())) == 1


def test_run_asks_the_catalog_when_its_watch_is_cut_off(facade: Any, keys: list[str], shop: Any) -> None:
    operator, shard = Operator(shop), facade.core.shard_for(keys[1]).id
    facade.core._cache._watch.close()
    attempts: list[int] = []

    def body(s: Any) -> None:
        attempts.append(1)
        assert s.get(Customer, (keys[0], 1)) is None
        if len(attempts) == 1:
            old, _ = operator.renew(shard)
            assert operator.close(shard, old)
        s.add(customer(keys[1]))

    try:
        facade.run(body)
    finally:
        operator.end()
    assert_rows_at_home(facade, keys[1:2])


def test_a_disposed_engine_is_forgotten(shop: Any) -> None:
    engine = ShardedEngine(shop.url)
    with engine.session() as session:
        assert session.scalars(select(Customer).where(Customer.tenant_id == "a")).all() == []  # the short way
        assert session.scalars(select(Customer.name).where(Customer.tenant_id.in_(["a"]))).all() == []  # a kept plan
    engine.dispose()
    itself, pools = ref(engine), ref(engine._core.pools)
    del engine, session

    def forgotten() -> bool:  # in a moment: a thread of its own may be in the middle of its work
        gc.collect()
        return (itself(), pools()) == (None, None)

    eventually(forgotten, 5, "engine and pools are gone")


# --- statements and transactions in unusual order ---------------------------------------------------------------------


@pytest.mark.parametrize("first", [select(Currency), select(1)])
def test_a_session_that_reads_a_reference_table_first(facade: Any, keys: list[str], first: Any) -> None:
    def body(s: Any) -> None:
        for _ in range(4):
            s.execute(first).all()
            assert s.scalars(select(Customer)).all() == []
            s.execute(first).all()
            for key in keys:
                assert s.get(Customer, (key, 1)) is None
            s.rollback()

    facade.session(body)


def test_a_failed_select_of_all_shards_in_a_savepoint_is_undone_on_all(facade: Any, keys: list[str]) -> None:
    facade.session(lambda s: (s.add_all([customer(key) for key in keys]), s.commit()), twophase=True)

    def body(s: Any) -> None:
        s.scalars(select(Customer)).all()
        with pytest.raises(DBAPIError), s.begin_nested():
            s.execute(select(1 / (Customer.id - 1)).where(Customer.id > 0)).all()
        assert len(s.scalars(select(Customer)).all()) == 3
        s.add(customer(keys[0], 2))
        s.commit()

    facade.session(body)
    assert len(facade.session(lambda s: s.scalars(select(Customer)).all())) == 4


def test_without_autobegin_no_connection_is_kept(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        for _ in range(3):
            with pytest.raises(Exception, match="Autobegin"):
                s.execute(select(Customer).where(Customer.tenant_id == keys[0]))
        assert sum(pool.in_use for pool in facade.core._core.pools.stats()) == 0
        with s.begin():
            assert s.get(Customer, (keys[0], 1)) is None

    facade.session(body, autobegin=False)


@pytest.mark.parametrize(
    "command",
    [
        "COMMIT AND CHAIN", "commit; begin", "/* x */ COMMIT", "ROLLBACK AND CHAIN", "END", "-- x\nABORT",
        "SELECT ';'; COMMIT; BEGIN", "PREPARE TRANSACTION 'x'; BEGIN", "SELECT E'\\''; COMMIT --'", " ROLLBACK",
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["session", "core"])
def test_a_transaction_is_not_ended_by_text(facade: Any, keys: list[str], command: str, way: str) -> None:
    """What follows would run without a gate."""
    run = facade.session if way == "session" else facade.connect

    def body(s: Any) -> None:
        s.execute(insert(Customer).values(rows_of(keys)[0]))
        with pytest.raises(errors.UnsupportedOperation, match="commit"):
            s.execute(text(command))
        s.commit()

    run(body, keys[0])
    assert_rows_at_home(facade, keys[:1])


def test_text_that_ends_nothing_is_let_through(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        assert s.scalar(text("SELECT 'a; COMMIT' AS \"; commit\"")) == "a; COMMIT"
        assert s.scalar(text("SELECT 1; SELECT $x$; COMMIT; $x$ -- ; COMMIT")) in (1, "; COMMIT; ")
        s.execute(text("SAVEPOINT a"))
        s.execute(text("ROLLBACK TO SAVEPOINT a"))
        s.execute(text("ROLLBACK WORK TO a"))
        s.execute(text("RELEASE a"))
        assert s.scalar(text("SELECT CASE WHEN true THEN 1 END;")) == 1

    facade.session(body, keys[0])


def test_a_core_connection_keeps_its_isolation_level_on_a_new_connection(facade: Any, keys: list[str]) -> None:
    def body(conn: Any) -> None:
        conn.execution_options(isolation_level="SERIALIZABLE", postgresql_readonly=True)
        show = text(
            "SELECT pg_backend_pid(), current_setting('transaction_isolation'), "
            "current_setting('transaction_read_only')"
        )
        first = conn.execute(show).one()
        conn.commit()
        with psycopg.connect(facade.core.shard_for(keys[0]).primary.conninfo(), autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", (first[0],))
        second = conn.execute(show).one()
        assert first[0] != second[0]
        assert first[1:] == second[1:] == ("serializable", "on")

    facade.connect(body, keys[0])
    show = text("SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')")
    assert facade.session(lambda s: s.execute(show).one(), keys[0]) == ("read committed", "off")


def test_a_statement_that_cannot_be_routed_runs_in_a_pinned_session(facade: Any, keys: list[str]) -> None:
    facade.session(lambda s: (s.add(customer(keys[0])), s.commit()))
    statement = select(Customer.name, Order.id).outerjoin(Order, Order.id == Customer.id)
    with pytest.raises(errors.UnsupportedCrossShardQuery):
        facade.session(lambda s: s.execute(statement))
    assert facade.session(lambda s: s.execute(statement).all(), keys[0]) == [("x", None)]
    assert facade.connect(lambda c: c.execute(statement).all(), keys[0]) == [("x", None)]


def test_criteria_added_by_a_listener_of_the_application(facade: Any, keys: list[str]) -> None:
    facade.session(lambda s: (s.add_all([customer(key) for key in keys]), s.commit()), twophase=True)

    def body(s: Any) -> None:
        @event.listens_for(s, "do_orm_execute")
        def only(state: Any) -> None:
            state.statement = state.statement.options(with_loader_criteria(Customer, Customer.tenant_id == keys[1]))

        assert [found.tenant_id for found in s.scalars(select(Customer))] == [keys[1]]

    facade.session(body)


def test_a_listener_of_the_application_may_change_the_key(facade: Any, keys: list[str]) -> None:
    facade.session(lambda s: (s.add_all([customer(key) for key in keys]), s.commit()), twophase=True)

    def body(s: Any) -> None:
        @event.listens_for(s, "do_orm_execute")
        def other(state: Any) -> None:
            state.statement = select(Customer).where(Customer.tenant_id == keys[1])

        found = s.scalars(select(Customer).where(Customer.tenant_id == keys[0])).all()
        assert [each.tenant_id for each in found] == [keys[1]]

    facade.session(body)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_sessions_connection_refuses_rows_of_another_shard(facade: Any, keys: list[str], pinned: bool) -> None:
    def body(s: Any) -> None:
        s.execute(insert(Customer).values(tenant_id=keys[0], id=1, name="x"))
        conn = s.connection()
        conn.execute(insert(Customer).values(tenant_id=keys[0], id=2, name="x"))
        assert len(conn.execute(select(Customer).where(Customer.tenant_id == keys[0])).all()) == 2
        for statement in (
            insert(Customer).values(tenant_id=keys[1], id=1, name="x"),
            update(Customer).where(Customer.tenant_id == keys[1]).values(name="y"),
            delete(Customer).where(Customer.id == 1),
            *(() if pinned else (select(Customer),)),
        ):
            with pytest.raises(errors.ShardlibError):
                conn.execute(statement)
        s.add(customer(keys[0], 3))
        s.execute(update(Customer).where(Customer.tenant_id == keys[0]).values(name="y"))
        s.commit()

    facade.session(body, *keys[: int(pinned)])
    assert_rows_at_home(facade, keys[:1])
    assert [row.name for row in facade.session(lambda s: s.scalars(select(Customer)).all())] == ["y"] * 3


def test_rows_returned_in_the_order_of_the_parameters(facade: Any, keys: list[str]) -> None:
    rows = [{"tenant_id": key, "id": n, "name": f"{key}/{n}"} for n in range(5) for key in keys]

    def body(s: Any) -> None:
        statement = insert(Customer).returning(Customer, sort_by_parameter_order=True)
        assert [found.name for found in s.scalars(statement, rows)] == [row["name"] for row in rows]
        statement = insert(Customer).returning(Customer.name, Customer.id, sort_by_parameter_order=True)
        more = [{**row, "id": row["id"] + 10} for row in rows]
        assert s.execute(statement, more).all() == [(row["name"], row["id"]) for row in more]

    facade.session(body, twophase=True)


def test_parameter_sets_that_name_no_key_change_nothing(facade: Any, keys: list[str]) -> None:
    table = Customer.__table__
    statement = update(table).where(table.c.tenant_id == bindparam("tenant")).values(name="y")

    def body(s: Any) -> None:
        s.add_all([customer(key) for key in keys])
        assert s.execute(statement, [{"tenant": None}, {"tenant": None}]).rowcount == 0
        assert s.execute(statement, [{"tenant": keys[0]}, {"tenant": None}]).rowcount == 1
        s.commit()

    facade.session(body, twophase=True)


def test_a_backend_lost_before_the_commit_is_run_again_once(facade: Any, keys: list[str]) -> None:
    facade.session(lambda s: (s.add_all([customer(key) for key in keys]), s.commit()), twophase=True)
    for victim in range(3):
        calls: list[int] = []

        def body(s: Any, victim: int = victim, calls: list[int] = calls) -> None:
            calls.append(1)
            for key in keys:
                s.get(Customer, (key, 1)).name += "!"
            s.flush()
            if len(calls) == 1:
                leg = s._unit.legs[facade.core.shard_for(keys[victim]).id]
                with psycopg.connect(leg.shard.primary.conninfo(), autocommit=True) as admin:
                    admin.execute("SELECT pg_terminate_backend(%s, 5000)", (leg.connection.driver.info.backend_pid,))

        facade.run(body, twophase=True)
        assert len(calls) == 2
        names = facade.session(lambda s: [found.name for found in s.scalars(select(Customer))])
        assert names == ["x" + "!" * (victim + 1)] * 3
    for shard in facade.core.topology.shards:
        with psycopg.connect(shard.primary.conninfo()) as conn:
            conn.execute("DELETE FROM shardlib.decision")  # that the lost part was aborted


@pytest.mark.parametrize(
    "statement", [select(func.corner_count()), select(literal_column("corner_count()")), select(text("corner_count()"))]
)
def test_a_function_of_the_database_is_not_answered_by_one_shard(facade: Any, keys: list[str], statement: Any) -> None:
    for shard in facade.core.topology.shards:
        with psycopg.connect(shard.primary.conninfo()) as conn:
            conn.execute(
                "CREATE OR REPLACE FUNCTION corner_count() RETURNS int8 LANGUAGE sql AS 'SELECT count(*) FROM customer'"
            )
    facade.session(lambda s: (s.add_all([customer(key) for key in keys]), s.commit()), twophase=True)
    with pytest.raises(errors.ShardlibError):
        facade.session(lambda s: s.scalar(statement))


def test_unique_keeps_apart_objects_that_nobody_holds(facade: Any) -> None:
    """Objects are told apart by `id()`, and that of a collected one is used again: by a row of another shard."""

    def body(s: Any) -> None:
        s.execute(insert(Customer), [{"tenant_id": f"t{n}", "id": 1, "name": "x"} for n in range(300)])
        s.flush()
        assert sum(1 for _ in s.scalars(select(Customer)).unique()) == 300
        assert sum(1 for _ in s.execute(select(Customer)).unique()) == 300
        assert sum(1 for _ in s.execute(select(Customer)).scalars().unique()) == 300
        s.rollback()

    facade.session(body, twophase=True)
