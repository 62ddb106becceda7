"""Statements of several rows or parameter sets, each of which goes to the shard of its own key."""

from __future__ import annotations

import enum
import itertools
from typing import Any

import pytest
from sqlalchemy import Enum, bindparam, delete, exists, func, insert, or_, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import PendingRollbackError, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardlib import errors
from tests.support.models import Customer, Order

ORDERS: Any = Order.__table__
OTHER = ORDERS.alias()


def neighbours_of(facade: Any, key: str, count: int) -> list[str]:
    """Other keys that share the shard of this one."""
    shard = facade.core.shard_for(key).id
    found = (f"next-{n}" for n in itertools.count() if facade.core.shard_for(f"next-{n}").id == shard)
    return list(itertools.islice(found, count))


def write(facade: Any, statement: Any, sets: Any = None) -> None:
    def body(s: Any) -> None:
        s.execute(statement, sets) if sets else s.execute(statement)
        s.commit()

    facade.session(body, twophase=True)


def fill(facade: Any, keys: list[str]) -> None:
    write(facade, insert(ORDERS), [{"tenant_id": key, "id": 1, "total": 10} for key in keys])


def totals(facade: Any) -> dict[tuple[str, int], int]:
    found = facade.session(lambda s: s.execute(select(ORDERS.c.tenant_id, ORDERS.c.id, ORDERS.c.total)).all())
    return {(tenant, number): total for tenant, number, total in found}


@pytest.mark.parametrize(
    "criteria",
    [
        ORDERS.c.tenant_id.in_([bindparam("a"), bindparam("b")]),
        or_(ORDERS.c.tenant_id == bindparam("a"), ORDERS.c.tenant_id == bindparam("b")),
    ],
    ids=["in", "or"],
)
def test_a_set_that_names_two_keys_is_applied_once(facade: Any, keys: list[str], criteria: Any) -> None:
    one, two, three = neighbours_of(facade, keys[0], 3)
    fill(facade, [one, two, three, keys[1]])
    debit = update(ORDERS).where(criteria).values(total=ORDERS.c.total - 1)
    write(facade, debit, [{"a": one, "b": two}, {"a": three, "b": keys[1]}])
    assert totals(facade) == dict.fromkeys([(key, 1) for key in (one, two, three, keys[1])], 9)


def test_sets_that_delete_by_rows_of_another_shard_are_refused(facade: Any, keys: list[str]) -> None:
    mine, theirs = keys[:2]
    fill(facade, [mine, theirs])
    alone = ~exists().where(OTHER.c.tenant_id == bindparam("y"))
    statement = delete(ORDERS).where(ORDERS.c.tenant_id == bindparam("x"), alone)
    with pytest.raises(errors.UnsupportedCrossShardQuery, match="over 2 shards"):
        write(facade, statement, [{"x": mine, "y": theirs}, {"x": "nobody", "y": theirs}])
    assert totals(facade) == {(mine, 1): 10, (theirs, 1): 10}
    write(facade, statement, [{"x": mine, "y": mine}, {"x": theirs, "y": theirs}])
    assert totals(facade) == {(mine, 1): 10, (theirs, 1): 10}, "each set needs its own key only, and finds rows there"
    write(facade, statement, [{"x": mine, "y": neighbours_of(facade, mine, 1)[0]}, {"x": theirs, "y": theirs}])
    assert totals(facade) == {(theirs, 1): 10}, "two keys of one shard may meet"


def test_sets_that_update_from_rows_of_another_shard_are_refused(facade: Any, keys: list[str]) -> None:
    mine, theirs = keys[:2]
    fill(facade, [mine, theirs])
    read = select(OTHER.c.total).where(OTHER.c.tenant_id == bindparam("y")).scalar_subquery()
    statement = update(ORDERS).where(ORDERS.c.tenant_id == bindparam("x")).values(total=func.coalesce(read, -1))
    with pytest.raises(errors.UnsupportedCrossShardQuery):
        write(facade, statement, [{"x": mine, "y": theirs}, {"x": "nobody", "y": theirs}])
    assert totals(facade) == {(mine, 1): 10, (theirs, 1): 10}


@pytest.mark.parametrize("form", ["values([...])", "several sets"])
def test_rows_with_a_value_read_on_another_shard_are_refused(facade: Any, keys: list[str], form: str) -> None:
    _, theirs, mine = keys[:3]
    fill(facade, [theirs])

    def add(tenants: list[str]) -> None:
        first = select(ORDERS.c.total).where(ORDERS.c.tenant_id == theirs, ORDERS.c.id == 1)
        read = func.coalesce(first.scalar_subquery(), -1)
        rows = [{"tenant_id": key, "id": number} for number, key in enumerate(tenants, 2)]
        if form == "several sets":
            write(facade, insert(ORDERS).values(total=read), rows)
        else:
            write(facade, insert(ORDERS).values([{**row, "total": read} for row in rows]))

    with pytest.raises(errors.UnsupportedCrossShardQuery, match="a subquery in the values of an INSERT"):
        add([mine, mine])
    assert totals(facade) == {(theirs, 1): 10}
    add([theirs, neighbours_of(facade, theirs, 1)[0]])
    assert sorted(totals(facade).values()) == [10, 10, 10]


def test_only_the_row_with_a_subquery_needs_its_key(facade: Any, keys: list[str]) -> None:
    mine, theirs = keys[:2]
    fill(facade, [theirs])
    read = select(ORDERS.c.total).where(ORDERS.c.tenant_id == theirs).scalar_subquery()
    rows = [{"tenant_id": mine, "id": 2, "total": 1}, {"tenant_id": theirs, "id": 2, "total": read}]
    write(facade, insert(ORDERS).values(rows))
    assert totals(facade) == {(theirs, 1): 10, (theirs, 2): 10, (mine, 2): 1}


ONE_ROW = {
    "list": lambda s, row: s.execute(insert(Customer), [row]),
    "mapping": lambda s, row: s.execute(insert(Customer), row),
    "returning": lambda s, row: s.scalars(insert(Customer).returning(Customer), [row]).all(),
    "upsert": lambda s, row: s.execute(pg_insert(Customer).on_conflict_do_nothing(), [row]),
    "values beside it": lambda s, row: s.execute(insert(Customer).values(notes="n"), [row]),
}


@pytest.mark.parametrize("pinned", [False, True], ids=["routed", "pinned"])
@pytest.mark.parametrize("way", ONE_ROW)
def test_a_mapped_insert_of_one_row(facade: Any, keys: list[str], way: str, pinned: bool) -> None:
    def body(s: Any) -> None:
        ONE_ROW[way](s, {"tenant_id": keys[0], "id": 1, "name": "x"})
        s.commit()
        assert s.get(Customer, (keys[0], 1)).name == "x"

    facade.session(body, *([keys[0]] if pinned else []))


class Colour(enum.Enum):
    """What a column of `Painted` takes."""

    RED = "r"


class Base(DeclarativeBase):
    """The tables of this file alone."""


class Painted(Base):
    __tablename__ = "rows_painted"
    k: Mapped[str] = mapped_column(primary_key=True, info={"shard_key": True})
    colour: Mapped[Colour] = mapped_column(Enum(Colour, native_enum=False, validate_strings=True))


PAINTED: Any = Painted.__table__
WRITES_OF_ROWS = {
    "mapped": lambda s, rows: s.execute(insert(Painted), rows),
    "core": lambda s, rows: s.execute(insert(PAINTED), rows),
    "bulk mappings": lambda s, rows: s.bulk_insert_mappings(Painted, rows),
    "bulk objects": lambda s, rows: s.bulk_save_objects([Painted(**row) for row in rows]),
}


@pytest.mark.parametrize("way", WRITES_OF_ROWS)
@pytest.mark.parametrize("savepoint", [False, True], ids=["transaction", "savepoint"])
def test_rows_refused_on_the_second_shard_are_not_committed_on_the_first(
    facade: Any, keys: list[str], way: str, savepoint: bool
) -> None:
    facade.core.create_all(Base.metadata)
    rows = [{"k": keys[0], "colour": Colour.RED}, {"k": keys[1], "colour": "no colour"}]

    def body(s: Any) -> None:
        s.execute(delete(Painted).where(Painted.k.in_(keys)))
        s.commit()
        s.add(Painted(k=keys[2], colour=Colour.RED))
        s.flush()
        if savepoint:
            with pytest.raises(StatementError), s.begin_nested():
                WRITES_OF_ROWS[way](s, rows)
        else:
            with pytest.raises(StatementError):
                WRITES_OF_ROWS[way](s, rows)
            with pytest.raises(PendingRollbackError):
                s.commit()
            s.rollback()
        s.commit()

    facade.session(body, twophase=True)
    found = facade.session(lambda s: s.scalars(select(Painted.k).where(Painted.k.in_(keys))).all())
    assert found == ([keys[2]] if savepoint else [])
