"""Keys of every kind find their shard: decorated types, enumerations, UUIDs, integers, composite and renamed keys."""

from __future__ import annotations

import enum
import uuid
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    Enum,
    ForeignKeyConstraint,
    Integer,
    String,
    TypeDecorator,
    Uuid,
    bindparam,
    cast,
    delete,
    func,
    insert,
    lambda_stmt,
    literal,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.associationproxy import association_proxy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    column_property,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    with_loader_criteria,
)

from shardlib import ShardedEngine, errors
from shardlib_ops import LocalCluster


class Prefixed(TypeDecorator[str]):
    """Stores `p:` before each value."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else f"p:{value}"

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value[2:]


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"
    BLUE = "b"


class Base(DeclarativeBase):
    pass


KEY = {"shard_key": True}


class Decorated(Base):
    __tablename__ = "corner_decorated"
    k: Mapped[str] = mapped_column(Prefixed, primary_key=True, info=KEY)
    v: Mapped[int] = mapped_column(default=0)


class Coloured(Base):
    __tablename__ = "corner_coloured"
    k: Mapped[Colour] = mapped_column(Enum(Colour, native_enum=False), primary_key=True, info=KEY)
    v: Mapped[int] = mapped_column(default=0)


class Unique(Base):
    __tablename__ = "corner_unique"
    k: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, info=KEY)
    v: Mapped[int] = mapped_column(default=0)


class Numbered(Base):
    __tablename__ = "corner_numbered"
    k: Mapped[int] = mapped_column(primary_key=True, info=KEY, autoincrement=False)
    v: Mapped[int] = mapped_column(default=0)


class Node(Base):
    """Self-referential, with a composite key under other names than its columns."""

    __tablename__ = "corner_node"
    __table_args__ = (
        ForeignKeyConstraint(["reg", "org", "up"], ["corner_node.reg", "corner_node.org", "corner_node.id"]),
    )
    region: Mapped[str] = mapped_column("reg", String, primary_key=True, info=KEY)
    organisation: Mapped[int] = mapped_column("org", Integer, primary_key=True, info=KEY, autoincrement=False)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent_id: Mapped[int | None] = mapped_column("up")
    name: Mapped[str] = mapped_column(default="n")
    children: Mapped[list[Node]] = relationship(
        back_populates="parent",
        primaryjoin="and_(Node.region == remote(foreign(Node.region)), "
        "Node.organisation == remote(foreign(Node.organisation)), Node.id == remote(foreign(Node.parent_id)))",
    )
    parent: Mapped[Node | None] = relationship(
        back_populates="children",
        primaryjoin="and_(foreign(Node.region) == remote(Node.region), "
        "foreign(Node.organisation) == remote(Node.organisation), foreign(Node.parent_id) == remote(Node.id))",
        overlaps="children",
    )
    names_below = association_proxy("children", "name")

    @hybrid_property
    def full(self) -> str:
        return f"{self.region}/{self.name}"

    @full.inplace.expression
    @classmethod
    def _full(cls) -> Any:
        return cls.region + "/" + cls.name


_below = aliased(Node)
Node.below = column_property(
    select(func.count(_below.id))
    .where(_below.region == Node.region, _below.organisation == Node.organisation, _below.parent_id == Node.id)
    .correlate_except(_below)
    .scalar_subquery()
)

TABLES = ", ".join(Base.metadata.tables)


@pytest.fixture(scope="module")
def _tables(shop: LocalCluster) -> None:
    with ShardedEngine(shop.url) as engine:
        engine.create_all(Base.metadata)


@pytest.fixture
def corner(_tables: None, shop: LocalCluster, facade: Any) -> Any:
    for server in shop.servers:
        with psycopg.connect(server.dsn) as conn:
            conn.execute(f"TRUNCATE {TABLES}")
    return facade


def values(kind: type[Base]) -> list[Any]:
    if kind is Coloured:
        return list(Colour)
    if kind is Unique:
        return [uuid.UUID(int=n * 7919) for n in range(12)]
    return list(range(12)) if kind is Numbered else [f"k{n}" for n in range(12)]


KINDS = [Decorated, Coloured, Unique, Numbered]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, corner: Any) -> Any:
    found = request.param

    def fill(s: Any) -> None:
        s.add_all([found(k=k, v=n) for n, k in enumerate(values(found))])
        s.commit()

    corner.session(fill, twophase=True)
    return found


def ways(kind: Any, k: Any) -> list[Any]:
    """Statements that name a key, each giving the `v` of its row."""
    return [
        lambda s: s.get(kind, k).v,
        lambda s: s.get(kind, {"k": k}).v,
        lambda s: s.scalars(select(kind).where(kind.k == k)).one().v,
        lambda s: s.scalar(select(kind.v).where(kind.k == k)),
        lambda s: s.scalar(select(kind.v).where(kind.k == bindparam("x")), {"x": k}),
        lambda s: s.scalar(select(kind.v).where(kind.k == bindparam("x", type_=kind.k.type)), {"x": k}),
        lambda s: s.scalar(select(kind.v).where(kind.k.in_([k]))),
        lambda s: s.scalar(select(kind.v).where(literal(k, kind.k.type) == kind.k)),
        lambda s: s.query(kind).filter_by(k=k).one().v,
        lambda s: s.scalars(lambda_stmt(lambda: select(kind).where(kind.k == k))).one().v,
        lambda s: s.get(kind, k, with_for_update=True).v,
        lambda s: s.execute(update(kind).where(kind.k == k).values(v=kind.v).returning(kind.v)).scalar_one(),
        lambda s: s.execute(delete(kind).where(kind.k == k).returning(kind.v)).scalar_one(),
        lambda s: s.execute(
            pg_insert(kind)
            .values(k=k, v=0)
            .on_conflict_do_update(index_elements=["k"], set_={"v": kind.v})
            .returning(kind.v)
        ).scalar_one(),
    ]


def test_every_way_to_name_a_key_finds_its_row(corner: Any, kind: Any) -> None:
    for n, k in enumerate(values(kind)):
        for number, way in enumerate(ways(kind, k)):
            assert corner.session(way) == n, f"way {number}, key {k!r}"
            if not isinstance(k, enum.Enum) and kind is not Decorated:
                assert corner.session(way, k) == n, f"pinned, way {number}, key {k!r}"


def test_a_value_that_passes_another_type_is_found_too(corner: Any) -> None:
    """What is compared is what is stored: the column's decorator does not see such a value."""
    corner.session(lambda s: (s.add_all([Decorated(k=f"k{n}", v=n) for n in range(12)]), s.commit()), twophase=True)
    for n in range(12):
        stored = f"p:k{n}"
        for statement in (
            select(Decorated).where(Decorated.k == literal(stored, String)),
            select(Decorated).where(Decorated.k == bindparam("x", stored, type_=String)),
            select(Decorated).where(type_coerce(Decorated.k, String) == stored),
            select(Decorated).where(cast(Decorated.k, String) == stored),
            select(Decorated).where(Decorated.k.in_([literal(stored, String)])),
        ):
            found = corner.session(lambda s, st=statement: [row.v for row in s.scalars(st)])
            assert found == [n], str(statement)


def test_wrong_types_are_refused_or_found_never_missed(corner: Any) -> None:
    corner.session(lambda s: (s.add_all([Numbered(k=n, v=n) for n in range(12)]), s.commit()), twophase=True)
    corner.session(lambda s: (s.add(Unique(k=uuid.UUID(int=7), v=7)), s.commit()))
    for n in range(12):
        for wrong in (str(n), float(n), bool(n)):
            try:
                found = corner.session(lambda s, w=wrong: s.scalars(select(Numbered.v).where(Numbered.k == w)).all())
            except (errors.ShardlibError, SQLAlchemyError):  # PostgreSQL itself refuses some of them
                continue
            assert found == [int(wrong)]
    assert corner.session(lambda s: s.get(Numbered, 3), "3").v == 3  # 3 and "3" are the same key
    assert corner.session(lambda s: s.scalar(select(Unique.v).where(Unique.k == str(uuid.UUID(int=7))))) == 7


def tree(facade: Any) -> list[tuple[str, int]]:
    tenants = [(region, org) for region in ("eu", "us", "e/u") for org in (1, 2, 11)]

    def fill(s: Any) -> None:
        for region, org in tenants:
            root = Node(region=region, organisation=org, id=1, name="root")
            root.children = [
                Node(id=2, name="a", children=[Node(id=4, name="c")]),
                Node(id=3, name="b"),
            ]
            s.add(root)
        s.commit()

    facade.session(fill, twophase=True)
    return tenants


def test_a_tree_with_composite_keys(corner: Any) -> None:
    """Children get their keys from their parents at the flush, from one generation to the next."""
    tenants = tree(corner)
    for region, org in tenants:

        def body(s: Any, region: str = region, org: int = org) -> None:
            here = (Node.region == region, Node.organisation == org)
            for options in ((), (selectinload(Node.children),), (joinedload(Node.children).joinedload(Node.children),)):
                s.expunge_all()
                root = s.scalars(select(Node).where(*here, Node.id == 1).options(*options)).unique().one()
                assert sorted(root.names_below) == ["a", "b"]
                assert root.below == 2
                assert root.children[0].parent is root
                below = {name for child in root.children for name in child.names_below}
                assert below == {"c"}
            assert s.scalars(select(Node.full).where(*here, Node.full == f"{region}/c")).all() == [f"{region}/c"]
            assert s.get(Node, (region, org, 4)).parent.parent is root

        corner.session(body)
        corner.session(body, (region, org))
    everything = corner.session(lambda s: s.scalars(select(Node).options(joinedload(Node.children))).unique().all())
    assert len(everything) == 4 * len(tenants)


def test_a_composite_key_in_an_error_is_a_tuple(corner: Any) -> None:
    def other(s: Any) -> None:
        s.scalars(select(Node).where(Node.region == "eu", Node.organisation == 8)).all()

    def changed(s: Any) -> None:
        node = Node(region="eu", organisation=7, id=1)
        s.add(node)
        s.flush()
        node.organisation = 8
        s.flush()

    with pytest.raises(errors.ShardKeyMismatch, match=r"has shard key \('eu', '8'\)") as raised:
        corner.session(other, ("eu", 7))
    assert raised.value.found == ("eu", "8")
    with pytest.raises(errors.ShardlibError) as moved:
        corner.session(changed)
    assert "\\x00" not in str(moved.value)


def test_statements_that_write_by_what_they_read(corner: Any) -> None:
    tenants = tree(corner)
    region, org = tenants[4]
    other = aliased(Node)
    here = (Node.region == region, Node.organisation == org)
    same = (other.region == Node.region, other.organisation == Node.organisation)

    def body(s: Any) -> None:
        count = select(func.count()).select_from(other).where(*same, other.parent_id == Node.id).scalar_subquery()
        s.execute(update(Node).where(*here).values(name=func.concat("n", count)))
        assert sorted(s.scalars(select(Node.name).where(*here))) == ["n0", "n0", "n1", "n2"]
        s.execute(update(Node).where(*here, *same, other.parent_id == Node.id).values(name="mother"))
        assert s.scalar(select(func.count()).where(*here, Node.name == "mother").select_from(Node)) == 2
        copied = select(Node.region, Node.organisation, Node.id + 100, Node.name).where(*here)
        s.execute(insert(Node).from_select(["reg", "org", "id", "name"], copied))
        assert s.scalar(select(func.count()).select_from(Node).where(*here)) == 8
        gone = delete(Node).where(*here, Node.id > 100).returning(Node.id).cte("gone")
        assert len(s.execute(select(gone.c.id)).all()) == 4
        s.execute(delete(Node).where(*here, ~select(other.id).where(*same, other.parent_id == Node.id).exists()))
        assert sorted(s.scalars(select(Node.id).where(*here))) == [1, 2]
        s.commit()

    corner.session(body)
    others = corner.session(lambda s: s.scalars(select(Node)).all())
    assert len(others) == 4 * (len(tenants) - 1) + 2


def test_an_insert_from_another_key_is_refused(corner: Any) -> None:
    corner.session(lambda s: (s.add_all([Numbered(k=n, v=n) for n in range(12)]), s.commit()), twophase=True)
    for statement in (
        insert(Numbered).from_select(["k", "v"], select(Numbered.k + 100, Numbered.v).where(Numbered.k == 1)),
        insert(Numbered).from_select(["k", "v"], select(Numbered.v, Numbered.k).where(Numbered.k == 1)),
        update(Numbered).where(Numbered.k == 1).values(k=2),
        update(Numbered).where(Numbered.k == 1).values({Numbered.k: Numbered.v}),
        update(Numbered).where(Numbered.v == 1).values(v=2),
        pg_insert(Numbered).values(k=1).on_conflict_do_update(index_elements=["k"], set_={"k": 50}),
    ):
        for session in ({}, {"twophase": True}):
            with pytest.raises(errors.ShardlibError):
                corner.session(lambda s, st=statement: s.execute(st), **session)


def test_criteria_of_a_loader_option_and_text_fragments(corner: Any) -> None:
    tenants = tree(corner)
    region, org = tenants[7]

    def body(s: Any) -> None:
        option = with_loader_criteria(Node, (Node.region == region) & (Node.organisation == org))
        assert len(s.scalars(select(Node).options(option).order_by(Node.id)).all()) == 4
        found = select(Node.id).where(Node.region == region, Node.organisation == org, text("corner_node.id < 3"))
        assert sorted(s.scalars(found)) == [1, 2]
        loose = select(Node.id).where(Node.region == region, Node.organisation == org, text("1=1 or 1=1"))
        try:
            count = len(s.scalars(loose).all())
        except errors.ShardlibError:
            return
        assert count == 4 * len(tenants)

    corner.session(body)
