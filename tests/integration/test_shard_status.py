"""The status of a shard holds on every way into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError

from shardlib import errors
from shardlib.topology import Status
from shardlib_ops import LocalCluster
from tests.integration.test_fence import Operator
from tests.support.models import Order

AS_TEXT = text("INSERT INTO orders (tenant_id, id, total) VALUES (:key, 1, 1)")


@pytest.fixture
def set_status(facade: Any, keys: list[str], shop: LocalCluster) -> Iterator[Callable[[str], None]]:
    """Sets the status of the shard of the first key, and active at the end."""
    operator = Operator(shop)

    def publish(status: str) -> None:
        before = operator.catalog.load()
        owner = facade.core.shard_for(keys[0]).id
        shards = tuple(dataclasses.replace(s, status=Status(status)) if s.id == owner else s for s in before.shards)
        operator.publish(before.evolve(shards=shards, nonce=uuid4().hex))
        facade.core.refresh()

    yield publish
    publish("active")
    operator.end()


def by_core(facade: Any, key: str) -> None:
    facade.connect(lambda c: (c.execute(insert(Order).values(tenant_id=key, id=1)), c.commit()), key)


def by_text_of_core(facade: Any, key: str) -> None:
    facade.connect(lambda c: (c.execute(AS_TEXT, {"key": key}), c.commit()), key)


def by_text(facade: Any, key: str) -> None:
    facade.session(lambda s: (s.execute(AS_TEXT, {"key": key}), s.commit()), key)


def by_session(facade: Any, key: str) -> None:
    facade.session(lambda s: (s.add(Order(tenant_id=key, id=1)), s.commit()), key)


def by_a_text_on_its_connection(facade: Any, key: str) -> None:
    facade.session(lambda s: (s.connection().execute(AS_TEXT, {"key": key}), s.commit()), key)


WAYS = [by_core, by_text_of_core, by_text, by_session, by_a_text_on_its_connection]


@pytest.mark.parametrize("way", WAYS)
def test_a_read_only_shard_is_read_only(
    facade: Any, keys: list[str], set_status: Callable[[str], None], way: Callable[[Any, str], None]
) -> None:
    set_status("readonly")
    with pytest.raises(errors.UnsupportedOperation, match="is read-only"):
        way(facade, keys[0])
    way(facade, keys[1])
    orders = select(Order).where(Order.tenant_id == keys[0])
    assert facade.connect(lambda c: c.execute(orders).all(), keys[0]) == []
    assert facade.session(lambda s: s.scalars(orders).all()) == []
    set_status("active")
    way(facade, keys[0])  # by the same pooled connection


@pytest.mark.parametrize("setting", ["SET TRANSACTION READ WRITE", "SET LOCAL transaction_read_only = off"])
def test_a_read_only_shard_stays_so_whatever_a_text_sets(
    facade: Any, keys: list[str], set_status: Callable[[str], None], setting: str
) -> None:
    set_status("readonly")

    def of_a_session(s: Any) -> None:
        with pytest.raises(DBAPIError, match="before any query"):
            s.execute(text(setting))

    facade.session(of_a_session, keys[0])
    facade.connect(of_a_session, keys[0])


@pytest.mark.parametrize("way", WAYS)
def test_an_inactive_shard_takes_no_statement(
    facade: Any, keys: list[str], set_status: Callable[[str], None], way: Callable[[Any, str], None]
) -> None:
    set_status("inactive")
    with pytest.raises(errors.ShardUnavailable, match="inactive"):
        way(facade, keys[0])
    with pytest.raises(errors.ShardUnavailable, match="inactive"):
        facade.connect(lambda c: c.execute(text("SELECT 1")), keys[0])
    way(facade, keys[1])
