"""Each row once while it moves: scans and `all_shards` writes leave out what a shard holds but does not own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy import (
    Column,
    MetaData,
    Table,
    and_,
    delete,
    exists,
    func,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.orm import Session, aliased, contains_eager, joinedload, selectinload, subqueryload

from shardlib import errors
from shardlib_ops import LocalCluster
from tests.support.facade import AsyncFacade, SyncFacade
from tests.support.hidden import JOB, SOURCE, TARGET, Moving
from tests.support.models import Base, CardPayment, Customer, Order, Payment, Tag, order_tag

KEY = {"shard_key": True}
OTHER = MetaData()


def keyed_by(name: str, *kinds: Any) -> Table:
    """A table whose shard key has columns of these types."""
    key = [Column(f"k{i}", kind, primary_key=True, autoincrement=False, info=KEY) for i, kind in enumerate(kinds)]
    return Table(name, OTHER, *key, Column("id", sa.Integer, primary_key=True), Column("v", sa.Integer))


START = datetime(2024, 2, 29, 23, 59, 59, 120, tzinfo=UTC)
KINDS: dict[str, tuple[list[Any], Callable[[int], tuple[Any, ...]]]] = {
    "by_int": ([sa.BigInteger], lambda i: (i * 7919 - 300,)),
    "by_uuid": ([sa.Uuid], lambda i: (UUID(int=i * 2**90 + i),)),
    "by_uuid_char": ([sa.Uuid(native_uuid=False)], lambda i: (UUID(int=i * 2**91 + 5),)),
    "by_date": ([sa.Date], lambda i: (date(1999, 12, 1) + timedelta(days=i),)),
    "by_moment": ([sa.DateTime(timezone=True)], lambda i: (START + timedelta(microseconds=i * 3_600_000_007),)),
    "by_local": ([sa.DateTime()], lambda i: (START.replace(tzinfo=None) + timedelta(seconds=i * 1_000),)),
    "by_bytes": ([sa.LargeBinary], lambda i: (bytes([0, i, 255 - i]),)),
    "by_number": ([sa.Numeric(12, 2)], lambda i: (Decimal(i) / 4 - 3,)),
    "by_varchar": ([sa.String(20)], lambda i: (f"%s {i}'\\",)),
    "by_enum": ([sa.Enum(*[f"e {i}" for i in range(40)], name="forty")], lambda i: (f"e {i}",)),
    "by_two": ([sa.String, sa.Integer], lambda i: (f"r{i % 5}", i)),
    "by_three": ([sa.Date, sa.Boolean, sa.Uuid], lambda i: (date(2000, 1, 1 + i % 3), i % 2 == 0, UUID(int=i))),
}
TABLES = {name: keyed_by(name, *kinds) for name, (kinds, _) in KINDS.items()}


def rows_of_all() -> dict[Table, list[dict[str, Any]]]:
    rng = random.Random(11)
    rows: dict[Any, list[dict[str, Any]]] = {table: [] for table in (*Base.metadata.sorted_tables, *TABLES.values())}
    t = Base.metadata.tables
    for n in range(30):
        tenant = f"tenant-{n}"
        for i in (1, 2):
            rows[t["customer"]].append({"tenant_id": tenant, "id": i, "name": rng.choice("abc"), "notes": None})
        for i in range(rng.randint(0, 4)):
            customer = rng.choice([1, 2, None])
            rows[t["orders"]].append(
                {"tenant_id": tenant, "id": i, "customer_id": customer, "total": rng.randint(0, 9)}
            )
            rows[t["tag"]].append({"tenant_id": tenant, "id": i, "label": f"l{i}"})
            rows[order_tag].append({"tenant_id": tenant, "order_id": i, "tag_id": i})
        rows[t["payment"]].append({"tenant_id": tenant, "id": 1, "kind": "payment"})
        rows[t["payment"]].append({"tenant_id": tenant, "id": 2, "kind": "card"})
        rows[t["card_payment"]].append({"tenant_id": tenant, "id": 2, "card": f"c{n}"})
    for name, (_, value) in KINDS.items():
        for i in range(40):
            key = {f"k{position}": part for position, part in enumerate(value(i))}
            rows[TABLES[name]] += [{**key, "id": 1, "v": i}, {**key, "id": 2, "v": 0}]
    return rows


@pytest.fixture(scope="module")
def world() -> Iterator[Moving]:
    with LocalCluster(shards=2) as cluster:
        made = Moving(cluster, [Base.metadata, OTHER])
        made.fill(rows_of_all())
        yield made
        made.close()


@pytest.fixture(scope="module", params=["copying", "switched", "given back"])
def moving(request: pytest.FixtureRequest, world: Moving) -> Moving:
    """One after the other: the module's fixtures keep pytest in this order."""
    {"copying": world.copying, "switched": world.switched, "given back": world.given_back}[request.param]()
    return world


@pytest.fixture(params=["sync", "asyncio"])
def facade(request: pytest.FixtureRequest, moving: Moving) -> Iterator[Any]:
    made = {"sync": SyncFacade, "asyncio": AsyncFacade}[request.param](moving.cluster.url, pool_size=2)
    yield made
    made.close()


def a_key_of(facade: Any, shard_id: str) -> str:
    return next(f"pin-{n}" for n in range(1000) if facade.core.shard_for(f"pin-{n}").id == shard_id)


def plainly(rows: Any) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(row) for row in rows)


class Ways:
    """The same statement by each way there is, and on the plain database."""

    def __init__(self, facade: Any, moving: Moving) -> None:
        self.facade, self.moving = facade, moving

    def plain(self, statement: Any) -> Counter[tuple[Any, ...]]:
        with Session(self.moving.plain) as session:
            return plainly(session.execute(statement).all())

    def scan(self, statement: Any) -> Counter[tuple[Any, ...]]:
        return self.facade.session(lambda s: plainly(s.execute(statement).all()))  # type: ignore[no-any-return]

    def pinned(self, statement: Any) -> list[Any]:
        """The answers of both shards, each read whole."""
        return [
            self.facade.session(lambda s: s.execute(statement).all(), a_key_of(self.facade, shard_id))
            for shard_id in (SOURCE, TARGET)
        ]

    def core(self, statement: Any) -> list[Any]:
        """By `engine.connect`, and by the connection of a pinned session: the same, or the test fails."""
        answers = []
        for shard_id in (SOURCE, TARGET):
            key = a_key_of(self.facade, shard_id)
            once = self.facade.connect(lambda conn: conn.execute(statement).all(), key)
            again = self.facade.session(lambda s: s.connection().execute(statement).all(), key)
            assert plainly(once) == plainly(again)
            answers.append(once)
        return answers


@pytest.fixture
def ways(facade: Any, moving: Moving) -> Ways:
    return Ways(facade, moving)


O, C, T = Order.__table__, Customer.__table__, Tag.__table__  # noqa: E741
o2 = O.alias("o2")
k = O.alias("k")
cheap = select(O.c.tenant_id, O.c.id).where(O.c.total < 5).cte("cheap")
per_tenant = select(O.c.tenant_id, func.count().label("n")).group_by(O.c.tenant_id).subquery()

ROWWISE: dict[str, Any] = {
    "all rows": select(O),
    "some columns": select(O.c.total),
    "filtered": select(O.c.tenant_id, O.c.id).where(or_(O.c.total > 3, O.c.customer_id.is_(None))),
    "alias": select(o2.c.tenant_id, o2.c.total),
    "alias named as a column": select(k.c.tenant_id, k.c.id),
    "join": select(O.c.id, C.c.name).join_from(O, C, and_(O.c.tenant_id == C.c.tenant_id, O.c.customer_id == C.c.id)),
    "comma join": select(O.c.id, C.c.name).where(O.c.tenant_id == C.c.tenant_id, O.c.customer_id == C.c.id),
    "self join": select(O.c.id, o2.c.id).join_from(O, o2, O.c.tenant_id == o2.c.tenant_id),
    "left join": select(C.c.tenant_id, C.c.id, O.c.id).outerjoin_from(
        C, O, and_(O.c.tenant_id == C.c.tenant_id, O.c.customer_id == C.c.id)
    ),
    "left join of a join": select(C.c.tenant_id, C.c.id, O.c.id, T.c.label).select_from(
        C.outerjoin(
            O.join(T, and_(O.c.tenant_id == T.c.tenant_id, O.c.id == T.c.id)),
            and_(O.c.tenant_id == C.c.tenant_id, O.c.customer_id == C.c.id),
        )
    ),
    "two left joins": select(C.c.tenant_id, C.c.id, O.c.id, o2.c.id).select_from(
        C.outerjoin(O, and_(O.c.tenant_id == C.c.tenant_id, O.c.customer_id == C.c.id)).outerjoin(
            o2, and_(o2.c.tenant_id == C.c.tenant_id, o2.c.id == O.c.id + 1)
        )
    ),
    "cte": select(cheap.c.tenant_id, cheap.c.id),
    "cte joined": select(O.c.total).join_from(O, cheap, and_(cheap.c.tenant_id == O.c.tenant_id, cheap.c.id == O.c.id)),
    "subquery": select(per_tenant.c.n, C.c.name).join_from(C, per_tenant, per_tenant.c.tenant_id == C.c.tenant_id),
    "exists": select(C).where(exists().where(O.c.tenant_id == C.c.tenant_id, O.c.customer_id == C.c.id)),
    "not exists": select(C).where(~exists().where(O.c.tenant_id == C.c.tenant_id, O.c.customer_id == C.c.id)),
    "scalar subquery": select(
        C.c.tenant_id, select(func.count()).where(O.c.tenant_id == C.c.tenant_id).scalar_subquery()
    ),
    "group by the key": select(O.c.tenant_id, func.count(), func.sum(O.c.total)).group_by(O.c.tenant_id),
    "group by the primary key": select(O, func.count(T.c.id))
    .outerjoin_from(O, T, and_(O.c.tenant_id == T.c.tenant_id, O.c.id == T.c.id))
    .group_by(O.c.tenant_id, O.c.id),
    "union all": union_all(select(O.c.tenant_id, O.c.id), select(C.c.tenant_id, C.c.id)),
    "lateral": select(
        C.c.tenant_id, C.c.id, (own := select(O.c.id).where(O.c.tenant_id == C.c.tenant_id).lateral()).c.id
    ).select_from(C.outerjoin(own, sa.true())),
    "sample": select((sample := O.tablesample(100, name="some")).c.tenant_id, sample.c.id),
    "for update": select(O.c.tenant_id, O.c.id).with_for_update(of=O),
    "several keys": select(O).where(O.c.tenant_id.in_([f"tenant-{n}" for n in range(30)])),
    "orm": select(Order.tenant_id, Order.total),
    "orm alias": select(aliased(Order).tenant_id),
    "orm join": select(Customer.name, Order.id).join(Customer.orders),
    "orm outer join": select(Customer.tenant_id, Customer.id, Order.id).outerjoin(Customer.orders),
    "orm many to many": select(Order.tenant_id, Order.id, Tag.label).join(Order.tags),
    "orm any": select(Customer.tenant_id, Customer.id).where(Customer.orders.any(Order.total > 2)),
    "orm inheritance": select(CardPayment.tenant_id, CardPayment.card),
}
"""Statements whose answer over both shards is that of each, put together."""


@pytest.mark.parametrize("name", ROWWISE)
def test_each_row_once(ways: Ways, name: str) -> None:
    statement = ROWWISE[name]
    expected = ways.plain(statement)
    assert expected
    assert ways.scan(statement) == expected
    source, target = ways.pinned(statement) if name != "several keys" else ([], list(expected.elements()))
    assert plainly([*source, *target]) == expected
    assert source or name == "several keys"
    if name != "several keys":
        source, target = ways.core(statement)
        assert plainly([*source, *target]) == expected


MERGED: dict[str, Any] = {
    "count": select(func.count()).select_from(O),
    "sum": select(func.sum(O.c.total)),
    "count of an outer join": select(func.count(O.c.id), func.count()).outerjoin_from(
        C, O, and_(O.c.tenant_id == C.c.tenant_id, O.c.customer_id == C.c.id)
    ),
    "full join": select(func.count(O.c.id), func.count(o2.c.id), func.count()).select_from(
        O.outerjoin(o2, and_(O.c.tenant_id == o2.c.tenant_id, O.c.id == o2.c.id + 1), full=True)
    ),
    "full join of joins": select(func.count(O.c.id), func.count(C.c.id), func.count(T.c.id), func.count()).select_from(
        O.outerjoin(
            C.outerjoin(T, and_(T.c.tenant_id == C.c.tenant_id, T.c.id == C.c.id)),
            and_(O.c.tenant_id == C.c.tenant_id, O.c.id == C.c.id),
            full=True,
        )
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_each_row_once_on_one_shard(ways: Ways, name: str) -> None:
    """What is not merged over shards is still right on each of them: added up, it is the whole."""
    ((expected, _),) = ways.plain(MERGED[name]).items()
    for answers in (ways.pinned(MERGED[name]), ways.core(MERGED[name])):
        assert tuple(map(sum, zip(*(rows[0] for rows in answers), strict=True))) == expected


def test_order_and_limit_on_one_shard(ways: Ways, facade: Any, moving: Moving) -> None:
    rows = ways.plain(select(O.c.tenant_id, O.c.id))
    statement = select(O.c.tenant_id, O.c.id).order_by(O.c.tenant_id.desc(), O.c.id).limit(7).offset(1)
    by_id = sorted(rows, key=lambda row: row[1])
    for shard_id, answer in zip((SOURCE, TARGET), ways.pinned(statement), strict=True):
        own = [row for row in by_id if facade.core.shard_for(row[0]).id == shard_id]
        assert [tuple(row) for row in answer] == sorted(own, key=lambda row: row[0], reverse=True)[1:8]


@pytest.mark.parametrize("name", KINDS)
def test_keys_of_every_kind(ways: Ways, name: str) -> None:
    statement = select(TABLES[name])
    expected = ways.plain(statement)
    assert len(expected) == 80
    assert ways.scan(statement) == expected
    assert plainly([row for rows in ways.core(statement) for row in rows]) == expected


def loaded(customers: Any) -> list[Any]:
    return sorted(
        (c.tenant_id, c.id, sorted((o.id, sorted(t.label for t in o.tags)) for o in c.orders)) for c in customers
    )


@pytest.mark.parametrize("how", [joinedload, selectinload, subqueryload, None])
def test_relationships_load_each_row_once(facade: Any, moving: Moving, how: Any) -> None:
    statement = select(Customer)
    if how is not None:
        statement = statement.options(how(Customer.orders).options(how(Order.tags)))
    with Session(moving.plain) as session:
        expected = loaded(session.scalars(statement).unique().all())
    if how is not joinedload:  # whose ORDER BY of the children would be merged
        assert facade.session(lambda s: loaded(s.scalars(statement).unique().all())) == expected
    if how is joinedload or how is subqueryload:  # the others name the parents' keys, which are not the session's
        parts = [
            facade.session(lambda s: loaded(s.scalars(statement).unique().all()), a_key_of(facade, shard_id))
            for shard_id in (SOURCE, TARGET)
        ]
        assert sorted(parts[0] + parts[1]) == expected


def test_older_ways_to_write_a_statement(facade: Any, moving: Moving) -> None:
    with moving.plain.connect() as conn:
        expected = conn.scalar(select(func.count()).select_from(O))

    def body(s: Any) -> tuple[int, int, int]:
        by_lambda = s.execute(sa.lambda_stmt(lambda: select(Order.tenant_id))).all()
        changed = s.query(Order).execution_options(all_shards=True).update({Order.total: 1})
        s.rollback()
        return len(by_lambda), s.query(Order).count(), changed

    parts = [facade.session(body, a_key_of(facade, shard_id)) for shard_id in (SOURCE, TARGET)]
    assert tuple(map(sum, zip(*parts, strict=True))) == (expected, expected, expected)
    assert facade.session(lambda s: len(s.query(Order).all())) == expected


def test_contains_eager_and_polymorphic_loads(facade: Any, moving: Moving) -> None:
    eager = select(Customer).outerjoin(Customer.orders).options(contains_eager(Customer.orders))

    def payments(s: Any) -> list[Any]:
        return sorted((p.tenant_id, p.id, getattr(p, "card", None)) for p in s.scalars(select(Payment)))

    with Session(moving.plain) as session:
        expected = loaded(session.scalars(eager).unique().all()), payments(session)
    assert facade.session(lambda s: (loaded(s.scalars(eager).unique().all()), payments(s))) == expected


def everything(session: Any, table: Any, what: str) -> list[Any]:
    """What each shard of the transaction really holds, hidden or not."""
    return sorted(
        tuple(row)
        for leg in session._now.legs.values()
        for row in leg.connection.exec_driver_sql(f"SELECT {what} FROM {table}").all()
    )


@pytest.mark.parametrize("which", ["all", "of several keys"])
@pytest.mark.parametrize("synchronize", ["auto", "fetch", "evaluate", False])
def test_an_update_changes_each_row_once(facade: Any, moving: Moving, synchronize: Any, which: str) -> None:
    marked = {"all_shards": True, "synchronize_session": synchronize}

    def body(s: Any) -> None:
        rows = plainly(s.execute(select(Order.tenant_id, Order.id, Order.total)).all())
        before = everything(s, "orders", "tenant_id, id, total")
        assert len(before) > len(rows)
        change = update(Order).values(total=Order.total + 100)
        if which == "of several keys":
            change = change.where(Order.tenant_id.in_([f"tenant-{n}" for n in range(30)]))
        answer = s.execute(change, execution_options=marked)
        assert answer.rowcount == len(rows)
        after = Counter({(tenant, i, total + 100): n for (tenant, i, total), n in rows.items()})
        assert plainly(s.execute(select(Order.tenant_id, Order.id, Order.total)).all()) == after
        hidden = Counter(before) - rows
        assert Counter(everything(s, "orders", "tenant_id, id, total")) == hidden + after
        s.rollback()

    facade.session(body, twophase=True)


def test_a_delete_removes_each_row_once(facade: Any, moving: Moving) -> None:
    def body(s: Any) -> None:
        rows = plainly(s.execute(select(Payment.tenant_id, Payment.id).where(Payment.kind == "payment")).all())
        before = Counter(everything(s, "payment", "tenant_id, id"))
        gone = s.execute(delete(Payment).where(Payment.kind == "payment"), execution_options={"all_shards": True})
        assert gone.rowcount == len(rows)
        assert Counter(everything(s, "payment", "tenant_id, id")) == before - rows
        s.rollback()

    facade.session(body, twophase=True)


def test_writes_that_read_other_tables(facade: Any, moving: Moving) -> None:
    """UPDATE ... FROM, DELETE ... USING, and subqueries in both: neither the target nor what is read is a copy."""
    together = and_(C.c.tenant_id == O.c.tenant_id, C.c.id == O.c.customer_id)
    writes = {
        "from": update(O).values(total=O.c.total + 1).where(together, C.c.name == "a").returning(O.c.tenant_id, O.c.id),
        "alias": update(o2).values(total=0).where(o2.c.total > 4).returning(o2.c.tenant_id, o2.c.id),
        "subquery": update(O)
        .values(total=select(func.count()).where(T.c.tenant_id == O.c.tenant_id).scalar_subquery())
        .returning(O.c.tenant_id, O.c.id, O.c.total),
        "using": delete(order_tag)
        .where(order_tag.c.tenant_id == O.c.tenant_id, order_tag.c.order_id == O.c.id, O.c.total > 2)
        .returning(order_tag.c.tenant_id, order_tag.c.order_id),
        "exists": delete(order_tag)
        .where(exists().where(T.c.tenant_id == order_tag.c.tenant_id, T.c.id == order_tag.c.tag_id))
        .returning(order_tag.c.tenant_id, order_tag.c.order_id),
    }
    for name, statement in writes.items():
        with moving.plain.connect() as conn:
            expected = plainly(conn.execute(statement).all())
            conn.rollback()
        assert expected, name

        def body(s: Any, statement: Any = statement) -> Any:
            found = plainly(s.execute(statement, execution_options={"all_shards": True}).all())
            s.rollback()
            return found

        assert facade.session(body, twophase=True) == expected, name
        parts = [facade.session(body, a_key_of(facade, shard_id)) for shard_id in (SOURCE, TARGET)]
        assert parts[0] + parts[1] == expected, name


def test_core_writes_on_a_pinned_connection(facade: Any, moving: Moving) -> None:
    counts = []
    for shard_id in (SOURCE, TARGET):

        def body(conn: Any) -> int:
            changed: int = conn.execute(
                update(O).values(total=O.c.total + 1), execution_options={"all_shards": True}
            ).rowcount
            assert conn.dialect is conn.engine.dialect
            conn.rollback()
            return changed

        counts.append(facade.connect(body, a_key_of(facade, shard_id)))
    with moving.plain.connect() as conn:
        assert sum(counts) == conn.scalar(select(func.count()).select_from(O))


def test_a_statement_that_a_listener_executes_inside_another(facade: Any, moving: Moving) -> None:
    """Scans and keyed statements, one inside the other: each is told apart."""
    count = select(func.count()).select_from(O)
    counts = []
    for shard_id in (SOURCE, TARGET):
        key = a_key_of(facade, shard_id)

        def body(conn: Any, key: str = key) -> list[Any]:
            inner: list[Any] = []

            def listen(conn: Any, *_: Any) -> None:
                if len(inner) == 1:
                    inner.append(None)
                    keyed = count.where(O.c.tenant_id == key)
                    inner[:] = [*inner[:1], conn.scalar(count), conn.scalar(keyed), conn.scalar(count)]

            sa.event.listen(conn, "before_execute", listen)
            inner.append(conn.scalar(count))
            return [*inner, conn.scalar(count), *inner[1:]]

        first, last, once, keyed, again = facade.connect(body, key)
        assert (last, once, again, keyed) == (first, first, first, 0)
        counts.append(first)
    with moving.plain.connect() as conn:
        assert sum(counts) == conn.scalar(count)


def test_keyed_statements_pay_nothing(facade: Any, moving: Moving) -> None:
    sent: list[str] = []
    with Session(moving.plain) as session:
        tenants = session.scalars(select(Order.tenant_id).distinct()).all()

    def listen(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", listen)
    try:
        for tenant in tenants:

            def one(s: Any, tenant: str = tenant) -> None:
                assert all(o.tenant_id == tenant for o in s.scalars(select(Order).where(Order.tenant_id == tenant)))
                s.execute(update(Order).where(Order.tenant_id == tenant).values(total=Order.total))
                s.add(Tag(tenant_id=tenant, id=99, label="x"))
                s.flush()
                s.rollback()

            facade.session(one)
        assert sent
        assert not [statement for statement in sent if "shardlib.job_" in statement]
        facade.session(lambda s: s.scalars(select(Order)).all())
        assert [statement for statement in sent if f"shardlib.job_{JOB}_keys" in statement]
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", listen)


def test_raw_text_for_all_rows_of_a_shard_is_refused(facade: Any, moving: Moving) -> None:
    hidden = TARGET if moving.catalog.load().hidden_on(TARGET) else SOURCE
    raw = text("SELECT count(*) FROM orders")
    key = a_key_of(facade, hidden)
    assert facade.session(lambda s: s.execute(raw).scalar(), key) > 0  # the application's own, about its key
    with pytest.raises(errors.UnsupportedOperation, match="raw SQL over all rows"):
        facade.session(lambda s: s.execute(raw, execution_options={"all_shards": True}), key)
    with pytest.raises(errors.UnsupportedOperation, match="raw SQL over all rows"):
        facade.connect(lambda c: c.execute(raw, execution_options={"all_shards": True}), key)
    with pytest.raises(errors.ShardKeyRequired):
        facade.session(lambda s: s.execute(raw, execution_options={"all_shards": True}))
