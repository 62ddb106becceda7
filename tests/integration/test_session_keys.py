"""The key of a row that is written is the key that its shard was chosen by."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import CHAR, String, TypeDecorator, cast, event, insert, literal, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import errors
from tests.support.models import CardPayment, Customer, Payment

KEY = {"shard_key": True}


class Prefixed(TypeDecorator[str]):
    """Stores `p:` before each value."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else f"p:{value}"

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value[2:]


class Base(DeclarativeBase):
    """The tables of this file alone."""


class Decorated(Base):
    __tablename__ = "keys_decorated"
    k: Mapped[str] = mapped_column(Prefixed, primary_key=True, info=KEY)
    v: Mapped[int] = mapped_column(default=0)


class Padded(Base):
    __tablename__ = "keys_padded"
    k: Mapped[str] = mapped_column(primary_key=True, info=KEY)
    padded: Mapped[str] = mapped_column(CHAR(12))


class Document(Base):
    __tablename__ = "keys_document"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, info=KEY, default=uuid.uuid4)
    pages: Mapped[int]


class Region(Base):
    __tablename__ = "keys_region"
    name: Mapped[str] = mapped_column(primary_key=True, info=KEY, default="home")
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Looking(Base):
    __tablename__ = "keys_looking"
    k: Mapped[str] = mapped_column(
        primary_key=True, info=KEY, default=lambda context: context.get_current_parameters()["v"]
    )
    v: Mapped[str]


def on_all_servers(facade: Any, command: str) -> None:
    for shard in facade.core.topology.shards:
        with psycopg.connect(shard.primary.conninfo()) as conn:
            conn.execute(command)


@pytest.fixture
def own(facade: Any) -> Any:
    """The facade, with this file's tables, empty."""
    facade.core.create_all(Base.metadata)
    on_all_servers(facade, f"TRUNCATE {', '.join(Base.metadata.tables)}")
    return facade


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


def test_a_selected_literal_is_a_key_in_the_type_of_the_column_only(own: Any) -> None:
    def body(s: Any) -> None:
        with pytest.raises(errors.ShardKeyRequired):
            s.execute(insert(Decorated).from_select(["k", "v"], select(literal("a"), literal(1))))
        for key in "abcdef":
            s.execute(insert(Decorated).from_select(["k", "v"], select(literal(key, Prefixed), literal(1))))
        s.commit()
        for key in "abcdef":
            assert s.scalars(select(Decorated.k).where(Decorated.k == key)).all() == [key]

    own.session(body, twophase=True)


def test_a_key_does_not_follow_from_a_padded_column(own: Any) -> None:
    names = [f"k{n}" for n in range(6)]

    def body(s: Any) -> None:
        s.add_all([Padded(k=name, padded=name) for name in names])
        s.commit()
        for name in names:
            equal = select(Padded.k).where(Padded.k == Padded.padded)
            assert s.scalars(equal.where(Padded.padded == f"{name}  ")).all() == [name]
            for value in (cast(f"{name}  ", CHAR(12)), cast(f"{name}rest", CHAR(2))):
                assert s.scalars(select(Padded.k).where(Padded.k == value)).all() == [name], "the cast changes it"

    own.session(body, twophase=True)


DOCUMENTS: Any = Document.__table__
WAYS: dict[str, Any] = {
    "object": lambda s: s.add_all([Document(pages=1), Document(pages=1)]),
    "mapped": lambda s: s.execute(insert(Document), [{"pages": 1}, {"pages": 1}]),
    "mapped, one": lambda s: [s.execute(insert(Document), {"pages": 1}) for _ in range(2)],
    "core": lambda s: s.execute(insert(DOCUMENTS), [{"pages": 1}, {"pages": 1}]),
    "values": lambda s: [s.execute(insert(Document).values(pages=1)) for _ in range(2)],
    "listed values": lambda s: s.execute(insert(Document).values([{"pages": 1}, {"pages": 1}])),
    "listed values of core": lambda s: s.execute(insert(DOCUMENTS).values([{"pages": 1}, {"pages": 1}])),
    "bulk mappings": lambda s: s.bulk_insert_mappings(Document, [{"pages": 1}, {"pages": 1}]),
    "bulk objects": lambda s: s.bulk_save_objects([Document(pages=1), Document(pages=1)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_default_of_python_gives_the_key(own: Any, way: str) -> None:
    def body(s: Any) -> None:
        WAYS[way](s)
        s.commit()
        found = s.scalars(select(Document.id)).all()
        assert len(set(found)) == 2
        for key in found:
            assert s.get_one(Document, key).pages == 1, "it lies where its key leads"

    own.session(body, twophase=True)


def test_a_default_gives_way_to_a_value(own: Any) -> None:
    given = uuid.uuid4()

    def body(s: Any) -> None:
        s.execute(insert(Document), [{"id": given, "pages": 7}])
        s.add(Region(number=1))
        s.execute(insert(Region), [{"number": 2}, {"number": 3, "name": "home"}])
        s.commit()
        assert s.get_one(Document, given).pages == 7
        assert s.scalars(select(Region.number).where(Region.name == "home")).all() == [1, 2, 3]

    own.session(body, twophase=True)


@pytest.mark.parametrize("way", ["object", "insert"])
def test_a_default_that_looks_at_its_row_is_refused(own: Any, way: str) -> None:
    def body(s: Any) -> None:
        if way == "object":
            s.add(Looking(v="x"))
        write = s.flush if way == "object" else lambda: s.execute(insert(Looking), [{"v": "x"}])
        with pytest.raises(errors.ShardKeyRequired, match="looks at the rest of its row"):
            write()

    own.session(body)
