"""Extraction of shard keys: what is keyed, what is a scan, what is refused, statement by statement."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    insert,
    lambda_stmt,
    literal,
    literal_column,
    null,
    or_,
    select,
    table,
    text,
    true,
    tuple_,
    union,
    union_all,
    update,
    values,
)
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    contains_eager,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    with_loader_criteria,
)
from sqlalchemy.schema import CreateTable

from shardlib.errors import (
    InvalidShardKey,
    ShardKeyChanged,
    ShardKeyRequired,
    UnsupportedCrossShardQuery,
    UnsupportedOperation,
)
from shardlib.key import describe
from shardlib.route import Needs, Scope, needs_of
from shardlib.route.quick import quick_needs

KEY = {"shard_key": True}


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    tenant: Mapped[str] = mapped_column("tenant_id", primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int] = mapped_column(default=0)
    currency: Mapped[str | None] = mapped_column(ForeignKey("currencies.code"))
    items: Mapped[list[Item]] = relationship(back_populates="order")


class Item(Base):
    __tablename__ = "items"
    tenant: Mapped[str] = mapped_column("tenant_id", primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    order: Mapped[Order] = relationship(back_populates="items")
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "order_id"], ["orders.tenant_id", "orders.id"]),)


class Currency(Base):
    __tablename__ = "currencies"
    __table_args__: ClassVar[dict[str, Any]] = {"info": {"reference": True}}
    code: Mapped[str] = mapped_column(primary_key=True)


class Loose(Base):
    """Related by something else than the shard key, and loaded by a join whenever it is read."""

    __tablename__ = "loose"
    tenant: Mapped[str] = mapped_column("tenant_id", primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    orders: Mapped[list[Order]] = relationship(
        primaryjoin="foreign(Order.id) == Loose.order_id", viewonly=True, lazy="joined"
    )


class Person(Base):
    __tablename__ = "people"
    tenant: Mapped[str] = mapped_column("tenant_id", primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "person"}


class Engineer(Person):
    __tablename__ = "engineers"
    tenant: Mapped[str] = mapped_column("tenant_id", primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True)
    skill: Mapped[str]
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "id"], ["people.tenant_id", "people.id"]),)
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "engineer"}


TWO = Table(
    "two", Base.metadata, Column("a", String, primary_key=True, info=KEY),
    Column("b", Integer, primary_key=True, info=KEY), Column("id", Integer, primary_key=True),
)  # fmt: skip
DEFAULTED = Table(
    "defaulted", Base.metadata, Column("k", String, primary_key=True, info=KEY, default="x"), Column("n", Integer)
)
NODES = Table(
    "nodes", Base.metadata, Column("k", String, primary_key=True, info=KEY), Column("id", Integer, primary_key=True),
    Column("parent", Integer),
)  # fmt: skip
UNKNOWN = Table("unknown", MetaData(), Column("id", Integer, primary_key=True))
ORDERS, ITEMS = Order.__table__, Item.__table__


def needs(statement: Any, parameters: Any = None) -> Needs:
    first = needs_of(statement, parameters, describe)
    assert needs_of(statement, parameters, describe) == first, "the kept plan answers otherwise"
    return first


def keys(statement: Any, parameters: Any = None) -> tuple[bytes, ...]:
    found = needs(statement, parameters)
    assert found.scope is Scope.KEYED
    return found.keys


RECURSIVE = select(NODES.c.k, NODES.c.id).where(NODES.c.parent.is_(None)).cte("tree", recursive=True)
TREE = RECURSIVE.union_all(
    select(NODES.c.k, NODES.c.id).join(RECURSIVE, and_(NODES.c.k == RECURSIVE.c.k, NODES.c.parent == RECURSIVE.c.id))
)
STARTED = select(NODES.c.k, NODES.c.id).where(NODES.c.parent.is_(None), NODES.c.k == "x").cte("started", recursive=True)
STARTED_TREE = STARTED.union_all(
    select(NODES.c.k, NODES.c.id).join(STARTED, and_(NODES.c.k == STARTED.c.k, NODES.c.parent == STARTED.c.id))
)
OTHER = aliased(Order)
GROUPED = select(Item.tenant, func.count().label("n")).group_by(Item.tenant).subquery()
CUT = select(Item.tenant, Item.id).order_by(Item.id).limit(3).subquery()


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (select(Order).where(Order.tenant == "a"), ["a"]),
        (select(Order).where(literal("a") == Order.tenant, Order.total > 5), ["a"]),
        (select(Order).filter_by(tenant="a"), ["a"]),
        (select(ORDERS).where(ORDERS.c.tenant_id == "a"), ["a"]),
        (select(Order.id, func.count()).filter_by(tenant="a").group_by(Order.id).order_by(Order.id).limit(2), ["a"]),
        (select(Order).where(Order.tenant.in_(["a", "b", "a"])), ["a", "b"]),
        (select(Order).where(Order.tenant.in_([])), []),
        (select(Order).where(or_(Order.tenant == "a", Order.tenant == "b")), ["a", "b"]),
        (select(Order).where(or_(and_(Order.tenant == "a", Order.id == 1), Order.tenant == "b")), ["a", "b"]),
        (select(Order).where(Order.tenant.in_(["a", "b"]), Order.tenant.in_(["b", "c"])), ["b"]),
        (select(Order).where(Order.tenant == "a", Order.tenant == "b"), ["a"]),
        (select(Order).where(Order.tenant == null()), []),
        (select(Order).where(Order.tenant == literal(None, String)), []),
        (select(Order).where(Order.tenant == cast("a", Text)), ["a"]),
        (select(Order).where(Order.tenant == any_(bindparam("many", ["a", "b"]))), ["a", "b"]),
        (select(Order).where(tuple_(Order.tenant, Order.id).in_([("a", 1), ("b", 2)])), ["a", "b"]),
        (select(OTHER).where(OTHER.tenant == "a"), ["a"]),
        (select(Order).join(Order.items).where(Item.tenant == "a"), ["a"]),
        (select(Order).outerjoin(Order.items).where(Order.tenant == "a"), ["a"]),
        (select(Order, Item).where(Order.tenant == Item.tenant, Item.tenant == "a"), ["a"]),
        (select(Order).options(joinedload(Order.items)).where(Order.tenant == "a").limit(3), ["a"]),
        (select(Order).join(Order.items).options(contains_eager(Order.items)).where(Order.tenant == "a"), ["a"]),
        (select(Engineer).where(Engineer.tenant == "a"), ["a"]),
        (select(Person).where(Person.tenant == "a"), ["a"]),
        (select(Order).where(Order.tenant == "a", Order.items.any(Item.id > 1)), ["a"]),
        (select(Order).where(Order.tenant == "a", exists().where(OTHER.tenant == Order.tenant)), ["a"]),
        (select(Order).join(GROUPED, GROUPED.c.tenant == Order.tenant).where(Order.tenant == "a"), ["a"]),
        (select(Currency).outerjoin(Order, and_(Order.currency == Currency.code, Order.tenant == "a")), ["a"]),
        (select(select(func.count()).select_from(Order).where(Order.tenant == "a").scalar_subquery()), ["a"]),
        (union(select(Order.id).where(Order.tenant == "a"), select(Item.id).where(Item.tenant == "b")), ["a", "b"]),
        (select(STARTED_TREE), ["x"]),
        (select(lambda_o := ORDERS.alias()).where(lambda_o.c.tenant_id == "a"), ["a"]),
        (select(Order).where(Order.tenant == "a").with_for_update(), ["a"]),
        (select(Order).options(with_loader_criteria(Order, Order.tenant == "z")), ["z"]),
    ],
)  # fmt: skip
def test_keyed(statement: Any, expected: list[str]) -> None:
    assert keys(statement) == tuple(key.encode() for key in expected)


@pytest.mark.parametrize(
    ("statement", "merge"),
    [
        (select(Order), None),
        (select(Order).where(Order.tenant != "a"), None),
        (select(Order).where(Order.tenant.not_in(["a"])), None),
        (select(Order).where(Order.tenant.between("a", "b")), None),
        (select(Order).where(or_(Order.tenant == "a", Order.id == 1)), None),
        (select(Order).where(~(Order.tenant == "a")), None),
        (select(Order).where(Order.tenant == literal_column("'a'")), None),
        (select(Order).where(case((Order.id > 1, Order.tenant == "a"), else_=true())), None),
        (select(Order).join(Order.items), None),
        (select(Order).outerjoin(Order.items), None),
        (select(Order).options(selectinload(Order.items)), None),
        (select(Order).outerjoin(Item, and_(Item.tenant == Order.tenant, Item.tenant == "a")), None),
        (select(Order).outerjoin(Item, and_(Item.tenant == Order.tenant, Order.tenant == "a")), None),
        (select(Order).outerjoin(Item, Item.tenant == Order.tenant).where(Item.tenant.is_(None)), None),
        (select(Order).outerjoin(Currency, Currency.code == Order.currency), None),
        (select(Order).where(Order.tenant.in_(select(Item.tenant).where(Item.id == 1))), None),
        (select(Order.tenant, func.count()).group_by(Order.tenant).having(func.count() > 1), None),
        (select(Order.tenant, Order.id).distinct(), None),
        (union_all(select(Order.id), select(Item.id)), None),
        (select(TREE), None),
        (select(func.lower(Order.tenant)), None),
        (select(func.count()).select_from(Order), "the aggregate count()"),
        (select(func.count(Order.id).filter(Order.id > 1)), "an aggregate"),
        (select(func.mine(Order.id)), None),
        (select(func.row_number().over(order_by=Order.id)), "a window function"),
        (select(Order.id).distinct(), "DISTINCT"),
        (select(Order.id).ext(distinct_on(Order.id)), "DISTINCT ON"),
        (select(Order.id).group_by(Order.id), "GROUP BY"),
        (select(Order).order_by(Order.id), "ORDER BY"),
        (select(Order).limit(1), "LIMIT"),
        (select(Order).offset(1), "OFFSET"),
        (select(CUT), "LIMIT"),
        (union(select(Order.id), select(Item.id)), "UNION"),
        (select(Order.id).except_(select(Item.id)), "EXCEPT"),
    ],
)  # fmt: skip
def test_scan(statement: Any, merge: str | None) -> None:
    found = needs(statement)
    assert (found.scope, found.keys) == (Scope.SCAN, ())
    assert found.merge == merge or (merge is not None and str(found.merge).startswith(merge))


@pytest.mark.parametrize(
    "statement",
    [
        select(Order).join(Item, Item.order_id == Order.id),
        select(Order, Item),
        select(Order).join(Item, Item.order_id == Order.id).where(Order.tenant == "a"),
        select(Loose).where(Loose.tenant == "a"),
        select(Order).where(Order.id.in_(select(Item.order_id))),
        select(Order).where(Order.tenant == "a", Order.id.in_(select(Item.order_id))),
        select(Order).outerjoin(Item, Item.order_id == Order.id),
        select(Order).outerjoin(Item, and_(Item.tenant == Order.tenant), full=True),
        select(Currency).outerjoin(Order, Order.currency == Currency.code),
        select(Currency).where(exists().where(Order.currency == Currency.code)),
        select(select(func.count()).select_from(Order).scalar_subquery()),
        select(Order).join(CUT, CUT.c.id == Order.id),
        select(TWO, TWO.alias("other")).where(TWO.c.a == TWO.alias("other").c.a),
    ],
)
def test_refused_with_a_way_out(statement: Any) -> None:
    with pytest.raises(UnsupportedCrossShardQuery) as caught:
        needs(statement)
    assert caught.value.way_out
    assert "'" in caught.value.reason  # it names a table


def test_the_short_way_agrees_with_the_full_analysis() -> None:
    """What the short way takes, it answers as the analysis would; and it leaves the rest alone."""
    taken = [
        select(Order).where(Order.tenant == "a"),
        select(ORDERS).where(ORDERS.c.tenant_id == "a", ORDERS.c.id > 1, ORDERS.c.total != 5),
        select(TWO).where(and_(TWO.c.a == "x", TWO.c.b == 1)),
    ]
    for statement in taken:
        quick = quick_needs(statement, {}, describe)
        assert quick is not None
        assert quick == needs_of(statement.with_for_update(), None, describe), "which is left to the analysis"
    left = [
        select(Order), select(Order).where(Order.tenant > "a"), select(Order).where(Order.tenant == Order.currency),
        select(Order).where(Order.tenant == "a", ITEMS.c.id == 1), select(Loose).where(Loose.tenant == "a"),
        select(Person).where(Person.tenant == "a"), select(TWO).where(TWO.c.a == "x"), select(Currency),
        select(Order).where(or_(Order.tenant == "a", Order.tenant == "b")),
        select(Order, Item).where(Order.tenant == "a"),
        select(Order).where(Order.tenant == "a", Order.id == select(func.max(Item.id)).scalar_subquery()),
        select(Order).options(joinedload(Order.items)).where(Order.tenant == "a"),
        select(Order).where(Order.tenant == "a", Order.tenant == "b"),
    ]  # fmt: skip
    for other in left:
        assert quick_needs(other, {}, describe) is None


def test_several_keys_that_meet_nowhere_need_one_shard() -> None:
    apart = needs(select(Order).join(Item, Item.order_id == Order.id).where(Order.tenant == "a", Item.tenant == "b"))
    assert set(apart.keys) == {b"a", b"b"}
    assert apart.merge == "tables 'orders' and 'items' are not joined on their shard key"


def test_composite_keys() -> None:
    one = (TWO.c.a == "x", TWO.c.b == 1)
    assert keys(select(TWO).where(*one)) == (b"x\x001",)
    assert needs(select(TWO).where(one[0])).scope is Scope.SCAN
    pairs = select(TWO).where(tuple_(TWO.c.a, TWO.c.b).in_([("x", 1), ("y", 2)]))
    assert keys(pairs) == (b"x\x001", b"y\x002")
    assert keys(pairs.where(TWO.c.b == 2)) == (b"y\x002",)
    either = or_(and_(*one), and_(TWO.c.a == "y", TWO.c.b == 2))
    assert keys(select(TWO).where(either)) == (b"x\x001", b"y\x002"), "not the four combinations"
    assert keys(select(TWO).where(TWO.c.a.in_(["x", "y"]), TWO.c.b.in_([1, 2]))) == (
        b"x\x001", b"x\x002", b"y\x001", b"y\x002",
    )  # fmt: skip


def test_values_are_looked_up_at_each_execution() -> None:
    by_name = select(Order).where(Order.tenant == bindparam("t"), Order.id == bindparam("i"))
    for name in ("a", "b"):
        assert keys(by_name, {"t": name, "i": 1}) == (name.encode(),)
        assert keys(by_name, [{"t": name, "i": 1}]) == (name.encode(),)
        assert keys(by_name.params(t=name)) == (name.encode(),)
        assert keys(by_name.join(Order.items), {"t": name, "i": 1}) == (name.encode(),)
    for name in ("a", "b"):  # one structure, other values
        assert keys(select(Order).join(Order.items).where(Order.tenant == name)) == (name.encode(),)
        assert keys(select(Order).where(Order.tenant == bindparam(None, callable_=lambda name=name: name))) == (
            name.encode(),
        )
    with pytest.raises(UnsupportedOperation, match="made up"):
        needs(select(Order).where(Order.tenant == "a"), {"tenant_id_1": "b"})
    with pytest.raises(ShardKeyRequired, match="'t'"):
        needs(by_name)
    with pytest.raises(InvalidShardKey):
        needs(select(Order).where(Order.tenant == bindparam("t")), {"t": 5})


def test_statements_that_the_orm_makes() -> None:
    """Session.get, lazy loads, refresh and selectinload, as they reach do_orm_execute."""
    from sqlalchemy import create_engine, event

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    seen: list[Needs] = []
    with Session(engine) as session:
        session.add_all([Order(tenant="a", id=1), Item(tenant="a", id=1, order_id=1), Order(tenant="b", id=1)])
        session.commit()

        def look(state: Any) -> None:
            found = needs_of(state.statement, state.parameters, describe)
            quick = quick_needs(state.statement, state.parameters or {}, describe)
            assert quick == found or len(found.keys) != 1, "such loads are read the short way"
            seen.append(found)

        event.listen(session, "do_orm_execute", look)
        order = session.get(Order, ("a", 1))
        assert order is not None
        assert [item.id for item in order.items] == [1]
        session.refresh(order)
        session.expunge_all()
        item = session.get(Item, ("a", 1))
        assert item is not None
        assert item.order.id == 1
        assert [found.keys for found in seen] == [(b"a",)] * 5
        seen.clear()
        session.expunge_all()
        session.scalars(select(Order).where(Order.tenant.in_(["a", "b"])).options(selectinload(Order.items))).all()
    engine.dispose()
    assert [found.scope for found in seen] == [Scope.KEYED] * 2
    assert all(set(found.keys) == {b"a", b"b"} and found.merge is None for found in seen[:1])
    assert set(seen[1].keys) == {b"a", b"b"}


@pytest.mark.parametrize(
    ("statement", "scope"),
    [
        (select(1), Scope.REFERENCE), (func.now(), Scope.REFERENCE),
        (select(Currency).order_by(Currency.code), Scope.REFERENCE),
        (select(values(Column("x", Integer), name="v").data([(1,)])), Scope.REFERENCE),
        (text("select 1"), Scope.RAW), (text("select 1 as id").columns(Column("id", Integer)), Scope.RAW),
        (select(Order).from_statement(text("select * from orders")), Scope.RAW), (CreateTable(ORDERS), Scope.RAW),
        (select(table("pg_class")), Scope.RAW),
        (select(Table("pg_class", MetaData(), Column("oid", Integer), schema="pg_catalog")), Scope.RAW),
        (lambda_stmt(lambda: select(Order)), Scope.SCAN),
        (select(Order).from_statement(select(Order).where(Order.tenant == "a")), Scope.KEYED),
    ],
)  # fmt: skip
def test_other_scopes(statement: Any, scope: Scope) -> None:
    assert needs(statement).scope is scope


@pytest.mark.parametrize(
    "fragment",
    ["x = 1 or 1 = 1", "exists (select 1 from items)", "1 = 1; drop table x", "1 = 1 -- y", "id in (table items)"],
)
def test_text_that_could_touch_anything_is_refused(fragment: str) -> None:
    with pytest.raises(UnsupportedOperation, match=r"engine\.session\(key\)"):
        needs(select(Order).where(Order.tenant == "a", text(fragment)))
    with pytest.raises(UnsupportedOperation):
        needs(select(Order, literal_column(fragment)).where(Order.tenant == "a"))
    assert keys(select(Order).where(Order.tenant == "a", text("total > 5"))) == (b"a",)


def test_unknown_tables() -> None:
    with pytest.raises(ShardKeyRequired, match="unknown"):
        needs(select(UNKNOWN))
    with pytest.raises(UnsupportedOperation, match="pg_class"):
        needs(select(Order, table("pg_class", column("oid"))).where(Order.tenant == "a"))


def test_insert() -> None:
    for statement, given in [
        (insert(Order).values(tenant="a", id=1), None), (insert(ORDERS).values({ORDERS.c.tenant_id: "a"}), None),
        (insert(Order), {"tenant": "a", "id": 1}), (insert(ORDERS), [{"tenant_id": "a", "id": 1}]),
        (insert(ORDERS).values(tenant_id=bindparam("t")), {"t": "a"}),
        (insert(Order).values({Order.tenant: "a"}), None),
        (insert(ORDERS).values(("a", 1)), None),
    ]:  # fmt: skip
        found = needs(statement, given)
        assert (found.scope, found.keys, found.writes, found.merge) == (Scope.KEYED, (b"a",), True, None)
    rows = [{"tenant_id": "a", "id": 1}, {"tenant_id": "b", "id": 1}, {"tenant_id": "a", "id": 2}]
    for found in (needs(insert(ORDERS), rows), needs(insert(ORDERS).values(rows))):
        assert found.per_key_rows == {b"a": (0, 2), b"b": (1,)}
        assert found.merge is not None
    for statement in (
        insert(ORDERS).values(id=1), insert(ORDERS).values(tenant_id=func.lower("A")), insert(DEFAULTED).values(n=1),
        insert(ORDERS),
        insert(ORDERS).from_select(["tenant_id", "id"], select(Item.tenant, Item.id)),
        insert(ORDERS).from_select(["id"], select(Item.id).where(Item.tenant == "a")),
    ):  # fmt: skip
        with pytest.raises(ShardKeyRequired):
            needs(statement)
    with pytest.raises(InvalidShardKey):
        needs(insert(ORDERS).values(tenant_id=None))
    with pytest.raises(UnsupportedOperation, match="bulk_load"):
        needs(insert(Currency).values(code="x"))


def test_insert_from_select_and_on_conflict() -> None:
    copied = select(Item.tenant, Item.id).where(Item.tenant == "a")
    assert keys(insert(ORDERS).from_select(["tenant_id", "id"], copied)) == (b"a",)
    other = select(literal("b"), Item.id).where(Item.tenant == "a")
    assert set(keys(insert(ORDERS).from_select(["tenant_id", "id"], other))) == {b"a", b"b"}
    upsert = pg_insert(ORDERS).values(tenant_id="a", id=1)
    index = [ORDERS.c.tenant_id, ORDERS.c.id]
    assert keys(upsert.on_conflict_do_update(index_elements=index, set_={"total": 1}).returning(ORDERS.c.id)) == (b"a",)
    assert keys(upsert.on_conflict_do_nothing()) == (b"a",)
    with pytest.raises(ShardKeyChanged, match="orders"):
        needs(upsert.on_conflict_do_update(index_elements=index, set_={"tenant_id": "b"}))
    inner = select(func.max(Item.id)).where(Item.tenant == "b").scalar_subquery()
    assert set(keys(insert(ORDERS).values(tenant_id="a", id=inner))) == {b"a", b"b"}
    with pytest.raises(UnsupportedCrossShardQuery):
        needs(insert(ORDERS).values(tenant_id="a", id=select(func.max(Item.id)).scalar_subquery()))


def test_update_and_delete() -> None:
    for statement in (
        update(Order).where(Order.tenant == "a").values(total=1),
        update(Order).where(Order.tenant == "a").values(tenant="a"),
        update(ORDERS).where(ORDERS.c.tenant_id == ITEMS.c.tenant_id, ITEMS.c.tenant_id == "a").values(total=1),
        update(ORDERS).where(ORDERS.c.tenant_id == "a").values(
            total=select(func.count()).where(ITEMS.c.tenant_id == ORDERS.c.tenant_id).scalar_subquery()
        ),
        delete(Order).where(Order.tenant == "a").returning(Order.id),
        delete(ITEMS).where(ITEMS.c.tenant_id == ORDERS.c.tenant_id, ORDERS.c.tenant_id == "a"),
    ):  # fmt: skip
        found = needs(statement)
        assert (found.scope, found.keys, found.writes) == (Scope.KEYED, (b"a",), True)
    every = needs(delete(Order))
    assert (every.scope, every.writes, every.merge) == (Scope.SCAN, True, None)
    many = update(ORDERS).where(ORDERS.c.tenant_id == bindparam("t")).values(total=bindparam("n"))
    found = needs(many, [{"t": "a", "n": 1}, {"t": "b", "n": 2}, {"t": "a", "n": 3}])
    assert found.per_key_rows == {b"a": (0, 2), b"b": (1,)}
    bulk = needs(update(Order), [{"tenant": "a", "id": 1, "total": 2}, {"tenant": "b", "id": 1, "total": 2}])
    assert bulk.per_key_rows == {b"a": (0,), b"b": (1,)}
    with pytest.raises(ShardKeyRequired):
        needs(update(Order), [{"id": 1, "total": 2}])
    for moved, given in [
        (update(Order).where(Order.tenant == "a").values(tenant="b"), None), (update(Order).values(tenant="b"), None),
        (update(ORDERS).where(ORDERS.c.tenant_id == "a"), {"tenant_id": "b"}),
        (update(ORDERS).where(ORDERS.c.tenant_id == "a").values(tenant_id=func.lower("A")), None),
        (update(ORDERS).where(ORDERS.c.tenant_id.in_(["a", "b"])).values(tenant_id="a"), None),
    ]:  # fmt: skip
        with pytest.raises(ShardKeyChanged):
            needs(moved, given)
    with pytest.raises(UnsupportedCrossShardQuery):
        needs(delete(ITEMS).where(ITEMS.c.order_id == ORDERS.c.id, ORDERS.c.tenant_id == "a"))
    with pytest.raises(UnsupportedOperation, match="bulk_load"):
        needs(delete(Currency))


def test_writes_in_a_cte() -> None:
    gone = delete(Item).where(Item.tenant == "a").returning(Item.id).cte("gone")
    found = needs(select(gone))
    assert (found.scope, found.keys, found.writes) == (Scope.KEYED, (b"a",), True)
    beside = needs(select(Order).where(Order.tenant == "b").add_cte(gone))
    assert set(beside.keys) == {b"a", b"b"}
    assert beside.writes
    with pytest.raises(UnsupportedCrossShardQuery):
        needs(select(Order).add_cte(gone))
    with pytest.raises(UnsupportedCrossShardQuery):
        needs(select(delete(Item).returning(Item.id).cte()))


MINE_OF_ITEMS = select(func.mine(Item.id)).where(Item.tenant == Order.tenant).scalar_subquery()


@pytest.mark.parametrize(
    ("statement", "calls"),
    [
        (select(func.lower(Order.id), func.count(Order.id)), ()),
        (select(func.mine(Order.id)), ("mine",)),
        (select(Order).where(Order.tenant == "a", func.app.mine(Order.id) > 1), ("app.mine",)),
        (select(Order).where(func.app.lower(Order.tenant) == "a"), ("app.lower",)),
        (select(Order).where(text("mine (1) IN (2) AND lower('x') = 'x'")), ("mine",)),
        (select(Order.id, MINE_OF_ITEMS).where(Order.tenant == "a"), ("mine",)),
        (select(Order).join(Item, and_(Item.tenant == Order.tenant, func.mine(Item.id))), ("mine",)),
        (update(Order).where(Order.tenant == "a").values(id=func.mine()), ("mine",)),
        (delete(Order).where(Order.tenant == "a", func.mine()), ("mine",)),
    ],
)
def test_functions_of_the_application_are_told(statement: Any, calls: tuple[str, ...]) -> None:
    assert needs_of(statement).calls == calls
    assert needs_of(statement).calls == calls, "of a kept plan too"


def test_keys_that_one_parameter_set_needs_together() -> None:
    other = aliased(Order)
    read = select(other.id).where(other.tenant == bindparam("y")).scalar_subquery()
    statement = update(Order.__table__).where(Order.__table__.c.tenant_id == bindparam("x")).values(id=read)
    found = needs_of(statement, [{"x": "a", "y": "b"}, {"x": "c", "y": "c"}])
    assert found.together == ((b"a", b"b"),)
    plain = update(Order.__table__).where(Order.__table__.c.tenant_id.in_([bindparam("x"), bindparam("y")]))
    assert needs_of(plain.values(id=1), [{"x": "a", "y": "b"}, {"x": "c", "y": "c"}]).together == ()
