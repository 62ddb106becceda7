"""P7: the same program gives the same results with a plain SQLAlchemy session and with a sharded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, case, create_engine, event, exists, func, insert, literal, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased, contains_eager, joinedload, raiseload, selectinload

from shardlib_ops import LocalCluster
from tests.support.models import Base, CardPayment, Customer, Order, Payment, Tag

pytestmark = pytest.mark.promise("P7")

T = "tenant-7"


def fill(s: Any) -> None:
    tags = [Tag(tenant_id=T, id=n, label=f"tag-{n}") for n in range(3)]
    orders = [Order(tenant_id=T, id=n, total=n * 10, tags=tags[: n % 3]) for n in range(6)]
    s.add_all([Customer(tenant_id=T, id=1, name="ann", notes="n", orders=orders[:4]), *tags, *orders[4:]])
    s.add_all([Payment(tenant_id=T, id=1), CardPayment(tenant_id=T, id=2, card="42")])
    s.commit()


def get_and_load(s: Any) -> Any:
    customer = s.get(Customer, (T, 1), options=[selectinload(Customer.orders).joinedload(Order.tags)])
    return customer.name, [(o.id, sorted(t.label for t in o.tags)) for o in customer.orders]


def joins(s: Any) -> Any:
    other = aliased(Order)
    statement = (
        select(Customer.name, Order.id, other.id)
        .join(Customer.orders)
        .join(other, (other.tenant_id == Order.tenant_id) & (other.total > Order.total))
        .where(Customer.tenant_id == T)
        .order_by(Order.id, other.id)
    )
    return s.execute(statement).all()


def aggregates(s: Any) -> Any:
    statement = (
        select(Order.customer_id, func.count(), func.sum(Order.total))
        .where(Order.tenant_id == T)
        .group_by(Order.customer_id)
        .having(func.count() > 1)
        .order_by(func.sum(Order.total).desc())
        .limit(5)
    )
    return s.execute(statement).all()


def subqueries(s: Any) -> Any:
    has_tags = exists().where(Tag.tenant_id == Order.tenant_id, Tag.id == Order.id)
    biggest = select(func.max(Order.total)).where(Order.tenant_id == T).scalar_subquery()
    cte = select(Order.id, Order.total).where(Order.tenant_id == T, Order.total > 10).cte()
    return (
        s.scalars(select(Order.id).where(Order.tenant_id == T, has_tags).order_by(Order.id)).all(),
        s.scalars(select(Order.id).where(Order.tenant_id == T, Order.total == biggest)).all(),
        s.execute(select(cte.c.id).order_by(cte.c.id)).all(),
        s.execute(select(literal(1), case((Order.total > 20, "big"), else_="small")).where(Order.tenant_id == T)).all(),
    )


def eager(s: Any) -> Any:
    statement = (
        select(Order)
        .join(Order.customer)
        .options(contains_eager(Order.customer), raiseload(Order.tags))
        .where(Order.tenant_id == T, tuple_(Order.tenant_id, Order.id).in_([(T, 1), (T, 2)]))
        .order_by(Order.id)
    )
    return [(o.id, o.customer.name) for o in s.scalars(statement)]


def polymorphism(s: Any) -> Any:
    rows = s.scalars(select(Payment).where(Payment.tenant_id == T).order_by(Payment.id)).all()
    return [type(row).__name__ for row in rows], rows[1].card


def writes(s: Any) -> Any:
    s.execute(update(Order).where(Order.tenant_id == T, Order.id > 3).values(total=Order.total + 1))
    s.execute(insert(Order).returning(Order.id), [{"tenant_id": T, "id": n} for n in (20, 21)]).all()
    order = s.get(Order, (T, 1))
    order.total, order.customer_id = 77, None
    s.delete(s.get(Order, (T, 20)))
    s.flush()
    return s.execute(
        select(Order.id, Order.total, Order.customer_id).where(Order.tenant_id == T).order_by(Order.id)
    ).all()


def savepoints(s: Any) -> Any:
    caught = []
    for number in (30, 1, 31):
        try:
            with s.begin_nested():
                s.add(Order(tenant_id=T, id=number))
        except IntegrityError as error:
            caught.append(type(error.orig).__name__)
    return caught, s.scalars(select(Order.id).where(Order.tenant_id == T, Order.id >= 30).order_by(Order.id)).all()


def session_events(s: Any) -> Any:
    seen: list[str] = []
    names = ("after_begin", "before_flush", "after_flush", "before_commit", "after_commit", "after_transaction_end")
    for name in names:
        event.listen(s, name, lambda *args, name=name: seen.append(name))
    s.add(Tag(tenant_id=T, id=50, label="x"))
    s.commit()
    return seen


def expiry(s: Any) -> Any:
    order = s.get(Order, (T, 2))
    s.commit()
    first = order.total
    s.expunge(order)
    merged = s.merge(order)
    return first, merged is order, merged.total, merged in s


def a_query_object(s: Any) -> Any:
    query = s.query(Order).filter_by(tenant_id=T).options(joinedload(Order.customer))
    return query.count(), query.order_by(Order.id).first().id, query.filter(Order.id == 3).one().customer.name


PROGRAMS: list[Callable[[Any], Any]] = [
    get_and_load, joins, aggregates, subqueries, eager, polymorphism, writes, savepoints, session_events, expiry,
    a_query_object,
]  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    """One PostgreSQL without any of this."""
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(cluster.servers[0].dsn))
        yield engine
        engine.dispose()


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "routed"])
@pytest.mark.parametrize("program", PROGRAMS, ids=[program.__name__ for program in PROGRAMS])
def test_p7_the_same_program_gives_the_same_result(
    plain: Engine, facade: Any, program: Callable[[Any], Any], pinned: bool
) -> None:
    Base.metadata.drop_all(plain)
    Base.metadata.create_all(plain)
    with Session(plain) as s:
        fill(s)
        expected = program(s)
    key = (T,) if pinned else ()
    facade.session(fill, *key)
    assert facade.session(program, *key) == expected
