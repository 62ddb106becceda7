"""The key of a row that is written is the key that its shard was chosen by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, insert, select

from shardlib import errors
from tests.support.models import CardPayment, Customer, Payment


def rows_on_servers(facade: Any, table: str) -> list[str]:
    found: list[str] = []
    for shard in facade.core.topology.shards:
        with psycopg.connect(shard.primary.conninfo()) as conn:
            found += [key for (key,) in conn.execute(f"SELECT tenant_id FROM {table}").fetchall()]
    return found


@contextmanager
def listening(target: Any, name: str, change: Callable[[Any], None]) -> Iterator[None]:
    def heard(mapper: Any, connection: Any, instance: Any) -> None:
        change(instance)

    event.listen(target, name, heard)
    try:
        yield
    finally:
        event.remove(target, name, heard)


@pytest.mark.parametrize("pinned", [False, True], ids=["routed", "pinned"])
def test_a_listener_that_changes_the_key_of_a_new_row_is_refused(facade: Any, keys: list[str], pinned: bool) -> None:
    def change(customer: Any) -> None:
        customer.tenant_id = keys[1]

    def body(s: Any) -> None:
        s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        with pytest.raises(errors.ShardKeyChanged, match=f"from '{keys[0]}' to '{keys[1]}'"):
            s.flush()
        s.rollback()
        s.commit()

    with listening(Customer, "before_insert", change):
        facade.session(body, *([keys[0]] if pinned else []))
    assert rows_on_servers(facade, "customer") == []


def test_a_listener_that_changes_the_key_of_a_row_is_refused(facade: Any, keys: list[str]) -> None:
    def fill(s: Any) -> None:
        s.execute(insert(Customer), [{"tenant_id": keys[0], "id": 1, "name": "x"}])
        s.commit()

    def change(customer: Any) -> None:
        customer.tenant_id = keys[1]

    def body(s: Any) -> None:
        s.get_one(Customer, (keys[0], 1)).name = "y"
        with pytest.raises(errors.ShardKeyChanged):
            s.commit()
        s.rollback()
        assert s.scalar(select(Customer.name).where(Customer.tenant_id == keys[0])) == "x"

    facade.session(fill)
    with listening(Customer, "before_update", change):
        facade.session(body)
    assert rows_on_servers(facade, "customer") == [keys[0]]


def test_a_listener_of_a_class_below_is_seen_too(facade: Any, keys: list[str]) -> None:
    def change(payment: Any) -> None:
        payment.tenant_id = keys[1]

    def body(s: Any) -> None:
        s.add(CardPayment(tenant_id=keys[0], id=1, card="c"))
        with pytest.raises(errors.ShardKeyChanged):
            s.flush()

    with listening(CardPayment, "before_insert", change):
        facade.session(body)
    assert rows_on_servers(facade, Payment.__tablename__) == []


def test_a_listener_may_change_what_is_no_key(facade: Any, keys: list[str]) -> None:
    def change(customer: Any) -> None:
        customer.name, customer.tenant_id = customer.name.upper(), keys[0]

    def body(s: Any) -> None:
        s.add(Customer(tenant_id=keys[0], id=1, name="x"))
        s.commit()
        s.get_one(Customer, (keys[0], 1)).notes = "n"
        s.commit()
        assert s.get_one(Customer, (keys[0], 1)).name == "X"

    with listening(Customer, "before_insert", change), listening(Customer, "before_update", change):
        facade.session(body)
