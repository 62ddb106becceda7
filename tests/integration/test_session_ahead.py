"""A flush begins its transaction before it needs it: the fence, the pool and errors are as if it had not."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import IntegrityError, ResourceClosedError

from shardlib import ShardedEngine, ShardedSession, errors
from shardlib.catalog import Catalog, open_catalog
from shardlib.fence import close_gate, holders, open_gate
from shardlib.fence.control import ending_statement, plain_start
from shardlib.ring import TokenRange
from shardlib.session.core import Ahead, Core
from shardlib.topology.change import renew_gates
from shardlib_ops import LocalCluster
from tests.support.gates import give_gate, move_ranges
from tests.support.models import Base, Customer, Order


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(shards=2) as made, ShardedEngine(made.url) as engine:
        engine.create_all(Base.metadata)
        yield made


@pytest.fixture
def engine(cluster: LocalCluster) -> Iterator[ShardedEngine]:
    """With one connection for each shard: what is not given back is missed at once."""
    with ShardedEngine(cluster.url, pool_size=1, max_overflow=0, pool_timeout_s=3) as made:
        yield made


@pytest.fixture
def catalog(cluster: LocalCluster) -> Iterator[Catalog]:
    made = open_catalog(cluster.url)
    yield made
    made.close()


@pytest.fixture
def pair(engine: ShardedEngine) -> tuple[str, str]:
    """New keys of two shards."""
    by_shard: dict[str, str] = {}
    while len(by_shard) < 2:
        key = f"tenant-{uuid4().hex}"
        by_shard.setdefault(engine.shard_for(key).id, key)
    return by_shard["s1"], by_shard["s2"]


def on(engine: ShardedEngine, shard_id: str) -> psycopg.Connection[Any]:
    return psycopg.connect(engine.topology.shard(shard_id).primary.conninfo(), autocommit=True)


def customer(key: str, number: int = 1) -> Customer:
    return Customer(tenant_id=key, id=number, name="x")


def names(engine: ShardedEngine, shard_id: str, key: str) -> list[Any]:
    with on(engine, shard_id) as conn:
        return conn.execute("SELECT id FROM customer WHERE tenant_id = %s ORDER BY 1", (key,)).fetchall()


def close_default(engine: ShardedEngine, catalog: Catalog, shard_id: str) -> tuple[int, int]:
    """Replace a shard's default gate, and close the old one before the engine hears of it: (old, new)."""
    before = catalog.load()
    after = renew_gates(before, shard_id, nonce=uuid4().hex)
    with on(engine, shard_id) as conn:
        for number in after.gates_of(shard_id):
            open_gate(conn, number)
        assert close_gate(conn, before.default_gate(shard_id), budget_s=5).closed
    catalog.publish(after, expected=before.version)
    return before.default_gate(shard_id), after.default_gate(shard_id)


@contextmanager
def closed_unheard(engine: ShardedEngine, catalog: Catalog) -> Iterator[int]:
    """The default gate of s1 is closed, and the engine hears of the new one, whose number this gives, once refused."""
    before = catalog.load()
    after = renew_gates(before, "s1", nonce=uuid4().hex)
    with on(engine, "s1") as conn:
        for number in after.gates_of("s1"):
            open_gate(conn, number)
        assert close_gate(conn, before.default_gate("s1"), budget_s=5).closed
    asked: list[int] = []
    ask = Core.newer

    def newer(core: Core, *args: Any) -> Any:
        asked.append(args[0].version)
        if len(asked) == 1:
            catalog.publish(after, expected=before.version)
        return ask(core, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Core, "newer", newer)
        yield after.default_gate("s1")
    assert asked


def gates(session: ShardedSession) -> set[int]:
    return {gate for leg in session._now.legs.values() for gate in leg.gates}


@pytest.mark.parametrize("pinned", [True, False])
def test_a_flush_through_a_closed_gate_goes_on_unseen(
    engine: ShardedEngine, catalog: Catalog, pair: tuple[str, str], pinned: bool
) -> None:
    key = pair[0]
    with engine.session(**({"shard_key": key} if pinned else {})) as session:
        session.add(customer(key))
        session.commit()
        with closed_unheard(engine, catalog) as gate:
            session.add(customer(key, 2))
            session.flush()
            assert gates(session) == {gate}
            session.commit()
    assert names(engine, "s1", key) == [(1,), (2,)]


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("way", ["get", "new statement", "known statement", "statement with a listener"])
def test_a_read_through_a_closed_gate_goes_on_unseen(
    engine: ShardedEngine, catalog: Catalog, pair: tuple[str, str], way: str, pinned: bool
) -> None:
    key = pair[0]
    with engine.session(key) as session:
        session.add(customer(key))
        session.commit()
    known = select(Customer).where(Customer.tenant_id == key, Customer.id == 1)
    with engine.session(**({"shard_key": key} if pinned else {})) as session:
        session.scalars(known).one()
        session.rollback()
        session.expunge_all()
        if way == "statement with a listener":
            event.listen(session, "do_orm_execute", lambda state: None)
        with closed_unheard(engine, catalog) as gate:
            if way == "get":
                found = session.get(Customer, (key, 1))
            else:
                new = select(Customer).where(Customer.tenant_id == key, Customer.id == 1)
                found = session.scalars(known if way == "known statement" else new).one()
            assert found is not None
            assert found.name == "x"
            assert gates(session) == {gate}


@pytest.mark.parametrize("word", ["statement", "call", "session"])
def test_a_wrong_consistency_is_refused_on_the_short_way_too(
    engine: ShardedEngine, pair: tuple[str, str], word: str
) -> None:
    query = select(Customer).where(Customer.tenant_id == pair[0])
    wrong: Any = {"consistency": "strongest"}
    if word == "statement":
        query = query.execution_options(**wrong)
    with (
        engine.session(execution_options=wrong if word == "session" else {}) as session,
        pytest.raises(errors.InvalidArgument, match="strongest"),
    ):
        session.execute(query, execution_options=wrong if word == "call" else {})


def test_a_flush_follows_a_key_to_its_new_shard(engine: ShardedEngine, catalog: Catalog, pair: tuple[str, str]) -> None:
    key = pair[0]
    token = engine.token(key)
    ranges = (TokenRange(token, token),)
    before = catalog.load()
    own = give_gate(before, "s1", ranges, nonce=uuid4().hex)
    with on(engine, "s1") as conn, on(engine, "s2") as target:
        for number in own.gates_of("s1"):
            open_gate(conn, number)
        catalog.publish(own, expected=before.version)
        engine.refresh()
        moved = move_ranges(own, ranges, "s2", nonce=uuid4().hex)
        for number in moved.gates_of("s2"):
            open_gate(target, number)
        assert close_gate(conn, own.place(token).gate, budget_s=5).closed
    with engine.session(key) as session:
        begun: list[str] = []
        take = Ahead.take

        def taken(ahead: Ahead, *args: Any) -> Any:
            begun.append(ahead.shard.id)
            catalog.publish(moved, expected=own.version)  # by the time that the refusal is read
            return take(ahead, *args)

        session.add(customer(key))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ahead, "take", taken)
            session.commit()
    assert begun == ["s1"]
    assert names(engine, "s2", key) == [(1,)]
    assert names(engine, "s1", key) == []


@pytest.mark.parametrize("read", [True, False])
def test_a_connection_that_died_in_the_pool_is_replaced(
    engine: ShardedEngine, pair: tuple[str, str], read: bool
) -> None:
    key = pair[0]
    with engine.session(key) as session:
        session.add(customer(key))
        session.flush()
        pid = session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        session.commit()
        with on(engine, "s1") as conn:
            conn.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        if read:
            session.expunge_all()
            assert session.get_one(Customer, (key, 1)).name == "x"
        session.add(customer(key, 2))
        session.commit()
    assert names(engine, "s1", key) == [(1,), (2,)]


def test_one_begun_on_another_shard_is_given_back_first(engine: ShardedEngine, pair: tuple[str, str]) -> None:
    """The order comes first in the session and last in the flush: both shards have one connection each."""
    with engine.session(twophase=True) as session:
        session.add(Order(tenant_id=pair[0], id=1))
        session.add(customer(pair[1]))
        session.commit()
    with engine.session(pair[0]) as session:
        assert session.scalars(select(Order.id).where(Order.tenant_id == pair[0])).all() == [1]
    assert names(engine, "s2", pair[1]) == [(1,)]


@pytest.mark.parametrize("closed", [False, True])
def test_one_that_nobody_wants_is_given_back(
    engine: ShardedEngine, catalog: Catalog, pair: tuple[str, str], closed: bool
) -> None:
    key = pair[0]
    with engine.session(key) as session:
        session.execute(select(Customer).where(Customer.tenant_id == key))
    gate = engine.topology.place(engine.token(key)).gate
    if closed:
        gate, _ = close_default(engine, catalog, "s1")
    for _ in range(3):
        with engine.session(key) as session:
            session.add(Customer(id=1, name="no key"))
            with pytest.raises(errors.ShardKeyRequired):
                session.flush()
    with on(engine, "s1") as conn:
        assert holders(conn, gate) == ()
    assert [stats.in_use for stats in engine._core.pools.stats()] == [0]
    with engine.session(key) as session:
        session.add(customer(key))
        session.commit()
    assert names(engine, "s1", key) == [(1,)]


def test_no_connection_is_an_error_of_the_flush(engine: ShardedEngine, pair: tuple[str, str]) -> None:
    key = pair[0]
    with engine.session(key) as holder:
        holder.connection()
        with engine.session(key) as session:
            session.add(customer(key))
            with pytest.raises(errors.PoolTimeout):
                session.commit()
            session.rollback()
            holder.close()
            session.add(customer(key))
            session.commit()
    assert names(engine, "s1", key) == [(1,)]


def test_a_failed_insert_leaves_nothing_open(engine: ShardedEngine, pair: tuple[str, str]) -> None:
    key = pair[0]
    for expected in (None, IntegrityError):
        with engine.session(key) as session:
            session.add(customer(key))
            if expected is None:
                session.commit()
                continue
            with pytest.raises(expected):
                session.commit()
            session.rollback()
            session.add(customer(key, 2))
            session.commit()
    assert names(engine, "s1", key) == [(1,), (2,)]


def test_listeners_before_a_flush_have_the_only_connection(engine: ShardedEngine, pair: tuple[str, str]) -> None:
    key, seen = pair[0], []
    with engine.session(key) as session:

        @event.listens_for(session, "before_flush")
        def look(*args: Any) -> None:
            with engine.session(key) as other:
                seen.append(other.scalars(select(Customer.id).where(Customer.tenant_id == key)).all())

        session.add(customer(key))
        session.commit()
    assert seen == [[]]
    assert names(engine, "s1", key) == [(1,)]


def test_a_flush_inside_a_savepoint(engine: ShardedEngine, pair: tuple[str, str]) -> None:
    key = pair[0]
    with engine.session(key) as session:
        with session.begin_nested() as inner:
            session.add(customer(key))
            session.flush()
            inner.rollback()
        session.add(customer(key, 2))
        session.commit()
    assert names(engine, "s1", key) == [(2,)]


AHEAD_FILES = (
    *(f"session/{name}.py" for name in ("ahead", "core", "unit", "session", "held")),
    *(f"fence/{name}.py" for name in ("connection", "talking", "gated", "ending")),
)


def interrupted(work: Callable[[], object], at: int) -> bool:
    """Run it with a Ctrl-C at point number `at` of where Python can raise one in these files; whether there was one."""
    left = at

    def profile(frame: FrameType, what: str, arg: Any) -> None:
        nonlocal left
        if (
            what in ("call", "c_return")
            and frame.f_code.co_filename.endswith(AHEAD_FILES)
            and arg is not sys.setprofile
        ):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        work()
    except (KeyboardInterrupt, ResourceClosedError):
        pass  # the latter is SQLAlchemy's, when a listener is interrupted within its rollback
    finally:
        sys.setprofile(None)
    return left <= 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt within a destructor
@pytest.mark.parametrize("way", ["flush", "read"])
def test_interrupted_at_each_point_the_connection_comes_back(
    engine: ShardedEngine, pair: tuple[str, str], way: str
) -> None:
    key = pair[0]

    def work() -> None:
        with engine.session(key) as session:
            if way == "flush":
                session.add(customer(key))
                session.flush()
            else:
                session.get(Customer, (key, 1))

    at = 0
    work()
    while interrupted(work, at := at + 1):
        gc.collect(0)
        assert [stats.in_use for stats in engine._core.pools.stats()] == [0], at
        work()  # with the only connection there is, or a new one in its place
    assert at > 30, "there are more points than that"
    with on(engine, "s1") as conn:
        assert holders(conn, engine.topology.place(engine.token(key)).gate) == ()


ENDS = ["COMMIT", "commit and chain", " end", "ABORT", "rollback", "-- x\nABORT", "/* */ COMMIT", "SELECT 1; COMMIT"]


@pytest.mark.parametrize("query", ENDS)
def test_no_statement_that_ends_a_transaction_looks_plain(query: str) -> None:
    assert ending_statement(query) is not None
    assert not plain_start(query)


@pytest.mark.parametrize("query", ["SELECT 1", "insert into t values (1)", "WITH x AS (SELECT 1) SELECT * FROM x"])
def test_a_plain_statement_ends_nothing(query: str) -> None:
    assert plain_start(query)
    assert ending_statement(query) is None
