"""What SQLAlchemy's ORM does with a session works with a sharded one: the situations that meet a sharded session."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event, func, inspect, select, text, update
from sqlalchemy.exc import IntegrityError, InvalidRequestError, NoResultFound
from sqlalchemy.orm import defer, joinedload, lazyload, selectinload, subqueryload, undefer

from shardlib import errors
from tests.support.models import CardPayment, Currency, Customer, Order, Payment, Tag


def fill(facade: Any, keys: list[str]) -> None:
    """In each tenant: a customer with two orders, and two tags of which the first order has both."""

    def body(s: Any) -> None:
        for key in keys:
            tags = [Tag(tenant_id=key, id=n, label=f"tag-{n}") for n in (1, 2)]
            orders = [Order(tenant_id=key, id=n, total=10 * n) for n in (1, 2)]
            s.add(Customer(tenant_id=key, id=1, name=f"of {key}", notes="long", orders=orders))
            s.add_all(tags)
            s.flush()
            orders[0].tags = tags
            s.commit()

    facade.session(body)


def test_roundtrip_pinned_and_routed(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)
    for key in keys:
        pinned = facade.session(lambda s, key=key: s.get(Customer, (key, 1)).name, key)
        routed = facade.session(lambda s, key=key: s.get(Customer, (key, 1)).name)
        assert pinned == routed == f"of {key}"


def test_rows_lie_on_the_shards_of_their_keys(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)
    for key in keys:
        only = facade.session(lambda s: s.execute(text("SELECT tenant_id FROM customer")).scalars().all(), key)
        assert only == [key]


def test_get_of_a_row_that_is_not_there(facade: Any, keys: list[str]) -> None:
    assert facade.session(lambda s: s.get(Customer, (keys[0], 99))) is None


def test_get_takes_the_identity_map(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        first = s.get(Customer, (keys[0], 1))
        statements: list[str] = []
        engine = facade.core._core.pools.engine(facade.core.shard_for(keys[0]).id)
        event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        assert s.get(Customer, (keys[0], 1)) is first
        assert statements == []

    facade.session(body)


def test_refresh_and_expire(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        customer = s.get(Customer, (keys[1], 1))
        s.execute(
            update(Customer).where(Customer.tenant_id == keys[1]).values(name="new"),
            execution_options={"synchronize_session": False},
        )
        assert customer.name == f"of {keys[1]}"
        s.refresh(customer)
        assert customer.name == "new"
        s.expire(customer)
        assert customer.name == "new"
        s.commit()
        assert customer.name == "new"

    facade.session(body)


def test_deferred_columns(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        customer = s.scalars(select(Customer).where(Customer.tenant_id == keys[2])).one()
        assert "notes" not in inspect(customer).dict
        assert customer.notes == "long"
        s.expunge_all()
        customer = s.scalars(
            select(Customer).where(Customer.tenant_id == keys[2]).options(undefer(Customer.notes))
        ).one()
        assert inspect(customer).dict["notes"] == "long"
        s.expunge_all()
        customer = s.scalars(select(Customer).where(Customer.tenant_id == keys[2]).options(defer(Customer.name))).one()
        assert customer.name == f"of {keys[2]}"

    facade.session(body)


@pytest.mark.parametrize("loader", [lazyload, selectinload, joinedload, subqueryload])
@pytest.mark.parametrize("pinned", [True, False])
def test_relationship_loaders(facade: Any, keys: list[str], loader: Any, pinned: bool) -> None:
    fill(facade, keys)
    key = keys[0]

    def body(s: Any) -> None:
        statement = select(Customer).where(Customer.tenant_id == key).options(loader(Customer.orders))
        customer = s.scalars(statement).unique().one()
        assert [order.id for order in customer.orders] == [1, 2]
        assert customer.orders[0].customer is customer
        assert sorted(tag.label for tag in customer.orders[0].tags) == ["tag-1", "tag-2"]
        assert customer.orders[1].tags == []

    facade.session(body, *((key,) if pinned else ()))


def test_loaders_over_all_shards(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        statement = select(Customer).options(selectinload(Customer.orders).selectinload(Order.tags))
        customers = s.scalars(statement).all()
        assert {customer.tenant_id for customer in customers} == set(keys)
        for customer in customers:
            assert [order.id for order in customer.orders] == [1, 2]
            assert {tag.tenant_id for tag in customer.orders[0].tags} == {customer.tenant_id}

    facade.session(body)


def test_lazy_load_from_an_object_of_another_shard(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        orders = s.scalars(select(Order).where(Order.tenant_id.in_(keys), Order.id == 2)).all()
        assert {order.customer.name for order in orders} == {f"of {key}" for key in keys}

    facade.session(body)


def test_many_to_many_in_a_routed_session(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def change(s: Any) -> None:
        order = s.get(Order, (keys[1], 2))
        order.tags.append(s.get(Tag, (keys[1], 1)))
        s.commit()
        assert [tag.id for tag in s.get(Order, (keys[1], 2)).tags] == [1]
        order.tags.clear()
        s.commit()
        assert s.get(Order, (keys[1], 2)).tags == []

    facade.session(change)


def test_merge(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        merged = s.merge(Customer(tenant_id=keys[0], id=1, name="merged"))
        assert merged.orders
        s.merge(Customer(tenant_id=keys[0], id=2, name="fresh"))
        s.commit()
        names = s.scalars(select(Customer.name).where(Customer.tenant_id == keys[0])).all()
        assert sorted(names) == ["fresh", "merged"]

    facade.session(body)


def test_update_and_delete_of_objects(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        order = s.get(Order, (keys[0], 2))
        order.total = 99
        s.commit()
        assert s.scalar(select(Order.total).where(Order.tenant_id == keys[0], Order.id == 2)) == 99
        s.delete(order)
        s.commit()
        assert s.get(Order, (keys[0], 2)) is None

    facade.session(body)


@pytest.mark.parametrize("synchronize", ["evaluate", "fetch", False, "auto"])
def test_synchronize_session(facade: Any, keys: list[str], synchronize: Any) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        orders = s.scalars(select(Order).where(Order.tenant_id == keys[0])).all()
        s.execute(
            update(Order).where(Order.tenant_id == keys[0], Order.total < 15).values(total=1),
            execution_options={"synchronize_session": synchronize},
        )
        if synchronize is False:
            s.expire_all()
        assert sorted(order.total for order in orders) == [1, 20]

    facade.session(body)


@pytest.mark.parametrize("synchronize", ["evaluate", "fetch"])
def test_update_of_all_shards(facade: Any, keys: list[str], synchronize: str) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        orders = s.scalars(select(Order)).all()
        options = {"all_shards": True, "synchronize_session": synchronize}
        done = s.execute(update(Order).values(total=Order.total + 1), execution_options=options)
        assert done.rowcount == 6
        assert sorted(order.total for order in orders) == [11, 11, 11, 21, 21, 21]
        s.commit()

    facade.session(body, twophase=True)
    totals = facade.session(lambda s: s.scalars(select(Order.total)).all())
    assert sorted(totals) == [11, 11, 11, 21, 21, 21]


def test_legacy_query(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        assert s.query(Customer).filter_by(tenant_id=keys[0]).one().name == f"of {keys[0]}"
        assert s.query(Order).filter(Order.tenant_id == keys[0]).count() == 2
        assert len(s.query(Order).all()) == 6
        assert s.query(Order).filter(Order.tenant_id == keys[0]).update({"total": 0}) == 2
        assert s.query(Order).filter(Order.tenant_id == keys[0], Order.id == 2).delete() == 1

    facade.session(body)


def test_bulk_operations(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        s.bulk_insert_mappings(Customer, [{"tenant_id": key, "id": n, "name": "b"} for key in keys for n in (1, 2)])
        s.bulk_save_objects([Order(tenant_id=key, id=1, customer_id=1) for key in keys])
        s.bulk_update_mappings(Customer, [{"tenant_id": key, "id": 2, "name": "u"} for key in keys])
        s.commit()
        assert len(s.scalars(select(Customer).where(Customer.name == "u")).all()) == 3
        assert {order.tenant_id for order in s.scalars(select(Order))} == set(keys)

    facade.session(body, twophase=True)


def test_inheritance(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        s.add_all([CardPayment(tenant_id=key, id=1, card="4242") for key in keys[:1]])
        s.commit()
        payment = s.get(Payment, (keys[0], 1))
        assert isinstance(payment, CardPayment)
        assert payment.card == "4242"
        s.expunge_all()
        assert s.scalars(select(CardPayment).where(CardPayment.tenant_id == keys[0])).one().card == "4242"
        assert s.scalars(select(CardPayment)).one().card == "4242"
        s.delete(s.get(Payment, (keys[0], 1)))
        s.commit()
        assert s.scalars(select(Payment)).all() == []

    facade.session(body)


def test_events_and_autoflush(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        seen: list[str] = []
        event.listen(s, "before_flush", lambda *args: seen.append("flush"))
        event.listen(s, "after_commit", lambda *args: seen.append("commit"))
        s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        assert s.scalar(select(func.count()).select_from(Customer).where(Customer.tenant_id == keys[0])) == 1
        assert seen == ["flush"]
        s.commit()
        assert seen[-1] == "commit"

    facade.session(body)


@pytest.mark.parametrize("pinned", [True, False])
def test_savepoints(facade: Any, keys: list[str], pinned: bool) -> None:
    def body(s: Any) -> None:
        s.add(Customer(tenant_id=keys[0], id=1, name="kept"))
        with s.begin_nested():
            s.add(Customer(tenant_id=keys[0], id=2, name="kept too"))
        with pytest.raises(IntegrityError), s.begin_nested():
            s.add(Customer(tenant_id=keys[0], id=1, name="twice"))
        nested = s.begin_nested()
        s.add(Customer(tenant_id=keys[0], id=3, name="gone"))
        s.flush()
        nested.rollback()
        s.commit()

    facade.session(body, *((keys[0],) if pinned else ()))
    names = facade.session(lambda s: s.scalars(select(Customer.name).where(Customer.tenant_id == keys[0])).all())
    assert sorted(names) == ["kept", "kept too"]


def test_a_savepoint_first(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        with s.begin_nested():
            s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        s.commit()
        assert s.get(Customer, (keys[0], 1)).name == "x"

    facade.session(body)


def test_begin_block_and_rollback(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> None:
        with s.begin():
            s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        s.add(Customer(tenant_id=keys[0], id=2, name="y"))
        s.flush()
        s.rollback()
        assert len(s.scalars(select(Customer)).all()) == 1

    facade.session(body)


def test_isolation_level(facade: Any, keys: list[str]) -> None:
    def body(s: Any) -> str:
        s.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        return str(s.scalar(text("SHOW transaction_isolation")))

    assert facade.session(body, keys[0]) == "serializable"
    assert facade.session(lambda s: s.scalar(text("SHOW transaction_isolation")), keys[0]) == "read committed"


def test_reference_tables_are_read_anywhere_and_not_written_in_a_session(facade: Any, keys: list[str]) -> None:
    assert facade.session(lambda s: s.scalars(select(Currency)).all()) == []

    def write(s: Any) -> None:
        s.add(Currency(code="EUR", name="euro"))
        s.flush()

    with pytest.raises(errors.UnsupportedOperation, match="bulk_load"):
        facade.session(write)


def test_errors_are_sqlalchemys(facade: Any, keys: list[str]) -> None:
    with pytest.raises(NoResultFound):
        facade.session(lambda s: s.scalars(select(Customer).where(Customer.tenant_id == keys[0])).one())
    with pytest.raises(InvalidRequestError):
        facade.session(lambda s: s.refresh(Customer(tenant_id=keys[0], id=1)))


def test_populate_existing_and_yield_per(facade: Any, keys: list[str]) -> None:
    fill(facade, keys)

    def body(s: Any) -> None:
        got = s.scalars(
            select(Order).where(Order.tenant_id == keys[0]).execution_options(yield_per=1, populate_existing=True)
        )
        assert [order.id for order in got] == [1, 2]
        everything = s.scalars(select(Order).execution_options(yield_per=1))
        assert len(list(everything)) == 6

    facade.session(body)


def test_sessionmaker(facade: Any, keys: list[str]) -> None:
    maker = facade.engine.sessionmaker(expire_on_commit=False)
    session = maker(shard_key=keys[0])
    inner = getattr(session, "sync_session", session)
    assert inner.shard_key == keys[0]
    assert inner.expire_on_commit is False
