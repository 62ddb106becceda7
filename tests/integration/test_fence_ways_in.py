"""Ways into a transaction, and out of a part of it, that SQLAlchemy and psycopg have besides the usual one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from shardlib import errors
from shardlib.fence import holders
from shardlib.fence.control import ending_statement
from shardlib_ops import LocalCluster
from tests.integration.test_fence import Operator, frozen
from tests.support.facade import SyncFacade
from tests.support.models import Customer, Order
from tests.support.shop import one_key_a_shard

SQL = "INSERT INTO orders (tenant_id, id, total) VALUES (%s, 1, 1)"


@pytest.fixture
def facade(shop: LocalCluster) -> Iterator[SyncFacade]:
    """The blocking facade: these ways are its own."""
    for server in shop.servers:
        with psycopg.connect(server.dsn) as conn:
            conn.execute("TRUNCATE orders CASCADE")
    made = SyncFacade(shop.url, pool_size=2)
    yield made
    made.close()


@pytest.fixture
def keys(facade: SyncFacade) -> list[str]:
    return list(one_key_a_shard(facade.core).values())


@pytest.fixture
def operator(shop: LocalCluster) -> Iterator[Operator]:
    made = Operator(shop)
    yield made
    made.end()


def begin_twophase(engine: Any, key: str) -> None:
    with engine.connect(key) as conn:
        transaction = conn.begin_twophase()
        conn.execute(insert(Order), [{"tenant_id": key, "id": 1}])
        transaction.prepare()
        transaction.commit()


def tpc_begin(engine: Any, key: str) -> None:
    with engine.connect(key) as conn:
        raw = conn.connection.driver_connection
        raw.tpc_begin(raw.xid(1, "a", "b"))
        raw.execute(SQL, (key,))
        raw.tpc_commit()


def driver_transaction(engine: Any, key: str) -> None:
    with engine.connect(key) as conn:
        raw = conn.connection.driver_connection
        with raw.transaction():
            raw.execute(SQL, (key,))


@pytest.mark.parametrize("way", [begin_twophase, tpc_begin, driver_transaction])
def test_a_transaction_that_would_begin_without_a_gate_is_refused(
    facade: SyncFacade, keys: list[str], operator: Operator, way: Callable[[Any, str], None]
) -> None:
    key = keys[0]
    with pytest.raises(errors.UnsupportedOperation, match="holds no gate"):
        way(facade.engine, key)
    frozen(facade)  # cut off from the catalog
    shard = facade.core.shard_for(key).id
    old, _ = operator.renew(shard)
    assert operator.close(shard, old)
    with pytest.raises((errors.ShardlibError, SQLAlchemyError)):
        way(facade.engine, key)
    found = operator.on(shard).execute("SELECT count(*) FROM orders WHERE tenant_id = %s", (key,)).fetchone()
    assert found == (0,), "a stale client's write was acknowledged behind a closed gate"


def savepoint(session: Any, way: str) -> Callable[[], object]:
    """Set a savepoint; what is returned rolls it back."""
    if way == "core":
        rollback: Callable[[], object] = session.connection().begin_nested().rollback
        return rollback
    if way == "text":
        session.connection().execute(text("SAVEPOINT x"))
        return lambda: session.connection().execute(text("ROLLBACK TO SAVEPOINT x"))
    inner = session.connection().connection.driver_connection.transaction(force_rollback=True)
    inner.__enter__()
    return lambda: inner.__exit__(None, None, None)


@pytest.mark.parametrize("way", ["core", "text", "psycopg"])
@pytest.mark.parametrize("what", ["write", "scan"])
def test_a_gate_that_went_with_a_savepoint_is_taken_again(
    facade: SyncFacade, keys: list[str], operator: Operator, way: str, what: str
) -> None:
    shard, own = operator.give_own_gate(facade, keys[0])
    default = own.default_gate(shard)
    other = next(key for n in itertools.count() if facade.core.shard_for(key := f"o-{n}").id == shard)

    def work(session: Any) -> None:
        if what == "write":
            session.execute(insert(Order.__table__), [{"tenant_id": other, "id": 1}])
        else:
            session.execute(select(Customer)).all()

    pins = (keys[0],) if what == "scan" else ()
    with facade.engine.session(*pins) as session:
        session.execute(select(Order.__table__).where(Order.tenant_id == keys[0])).all()
        if what == "write":
            session.execute(insert(Order.__table__), [{"tenant_id": keys[0], "id": 1}])
        roll_back = savepoint(session, way)
        work(session)
        assert len(holders(operator.on(shard), default)) == 1
        roll_back()
        assert holders(operator.on(shard), default) == (), "PostgreSQL has let go of it"
        assert operator.close(shard, default)
        with pytest.raises(errors.StaleTopology):
            work(session)


GATES = (
    "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
    "WHERE c.relname LIKE 'gate%' AND l.pid = pg_backend_pid()"
)


def by_copy(session: Any, raw: Any) -> None:
    with raw.cursor().copy("COMMIT AND CHAIN"):
        pass


def by_client_cursor(session: Any, raw: Any) -> None:
    psycopg.ClientCursor(raw).execute("COMMIT AND CHAIN")


def by_raw_cursor(session: Any, raw: Any) -> None:
    psycopg.RawCursor(raw).execute("COMMIT AND CHAIN")


def by_nested_comment(session: Any, raw: Any) -> None:
    session.execute(text("/* /* */ ' */ SELECT 1; COMMIT AND CHAIN -- '"))


def by_backslash(session: Any, raw: Any) -> None:
    session.execute(text("SET LOCAL standard_conforming_strings = off"))
    session.connection().exec_driver_sql("SELECT 'a\\'; -- '; COMMIT AND CHAIN; --'")


@pytest.mark.parametrize("way", [by_copy, by_client_cursor, by_raw_cursor, by_nested_comment, by_backslash])
def test_no_text_ends_a_transaction_unseen(
    facade: SyncFacade, keys: list[str], way: Callable[[Any, Any], None]
) -> None:
    with facade.engine.session(keys[0]) as session:
        raw: Any = session.connection().connection.driver_connection
        with pytest.raises(errors.UnsupportedOperation):
            way(session, raw)
        assert session.scalar(text(GATES)) == 1


def test_the_connections_own_cursors_work(facade: SyncFacade, keys: list[str]) -> None:
    with facade.engine.session(keys[0]) as session:
        raw: Any = session.connection().connection.driver_connection
        with raw.cursor("named") as named:
            named.execute("SELECT * FROM generate_series(1, 3)")
            assert named.fetchall() == [(1,), (2,), (3,)]
        with raw.cursor().copy("COPY (SELECT 1) TO STDOUT") as copy:
            assert list(copy.rows()) == [("1",)]
        with raw.cursor(row_factory=psycopg.rows.dict_row) as rows:
            assert rows.execute("SELECT 1 AS one").fetchone() == {"one": 1}
        with raw.transaction():  # a savepoint
            raw.execute("SELECT 1")
        streamed = session.execute(text("SELECT * FROM generate_series(1, 3)"), execution_options={"yield_per": 2})
        assert streamed.scalars().all() == [1, 2, 3]
        assert session.scalar(text(GATES)) == 1


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("/* /* */ ' */ SELECT 1; COMMIT AND CHAIN -- '", "COMMIT"),
        ("/* /* */ */ ROLLBACK", "ROLLBACK"),
        ("/*/**/*/ END", "END"),
        ("/* /* */ COMMIT */ SELECT 1;", None),
        ("/* ; COMMIT", None),
        ("SELECT '/*'; COMMIT; -- */", "COMMIT"),
        ("SELECT 1; -- /*\nABORT", "ABORT"),
    ],
)
def test_comments_nest(query: str, word: str | None) -> None:
    assert ending_statement(query) == word


@pytest.mark.parametrize("way", ["session", "core"])
def test_text_of_a_pinned_session_holds_the_gate_of_its_key_alone(
    facade: SyncFacade, keys: list[str], operator: Operator, way: str
) -> None:
    """What it promises is for rows of the pinned key: nobody reads out of text which others it touches."""
    shard, own = operator.give_own_gate(facade, keys[0])
    default = own.default_gate(shard)
    (other,) = (number for number in own.gates_of(shard) if number != default)
    run: Any = facade.session if way == "session" else facade.connect

    def body(s: Any) -> None:
        s.execute(text("SELECT count(*) FROM customer"))
        assert len(holders(operator.on(shard), other)) == 1
        assert holders(operator.on(shard), default) == ()
        s.execute(select(Customer)).all()  # a scan that can be read for what it is holds them all
        assert len(holders(operator.on(shard), default)) == 1

    run(body, keys[0])
    assert operator.close(shard, other)
    facade.core._core.reroute_timeout_s = 0.3
    with pytest.raises(errors.StaleTopology):
        run(lambda s: s.execute(text("SELECT 1")), keys[0])
