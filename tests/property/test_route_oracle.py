"""Random statements against SQLite: one database with all rows, against the parts put together.

What extraction accepts must answer alike: a keyed statement on a database that holds only the rows of its keys, and a
statement over several shards, when it says that no merge is needed, on each part in turn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    and_,
    create_engine,
    exists,
    func,
    literal,
    not_,
    or_,
    select,
    tuple_,
    union,
    union_all,
)
from sqlalchemy.pool import StaticPool
from sqlalchemy.sql.elements import ColumnElement

from shardlib.errors import UnsupportedCrossShardQuery, UnsupportedOperation
from shardlib.key import describe
from shardlib.route import Needs, Scope, needs_of

META = MetaData()
KEY = {"shard_key": True}
A = Table(
    "a", META,
    Column("k", String, primary_key=True, info=KEY), Column("id", Integer, primary_key=True),
    Column("x", String), Column("n", Integer),
)  # fmt: skip
B = Table(
    "b", META,
    Column("k", String, primary_key=True, info=KEY), Column("id", Integer, primary_key=True),
    Column("x", String), Column("n", Integer),
)  # fmt: skip
C = Table(
    "c", META,
    Column("k", String, primary_key=True, info=KEY), Column("n", Integer, primary_key=True, info=KEY),
    Column("id", Integer, primary_key=True), Column("x", String),
)  # fmt: skip
R = Table(
    "r",
    META,
    Column("id", Integer, primary_key=True),
    Column("x", String),
    Column("n", Integer),
    info={"reference": True},
)
KEYS, NUMBERS = ("p", "q", "s"), (1, 2, 3)


def rows_of(rng: random.Random) -> dict[Table, list[dict[str, Any]]]:
    def some(names: str, chance: float) -> list[dict[str, Any]]:
        made = {}
        for k in KEYS:
            for i in NUMBERS:
                for n in NUMBERS:
                    if rng.random() < chance:
                        x = rng.choice((*KEYS, None))
                        row = {"k": k, "id": i, "x": x, "n": n}
                        made[tuple(row[c] for c in names)] = row
        return list(made.values())

    plain = [{"id": i, "x": rng.choice((*KEYS, None)), "n": rng.choice(NUMBERS)} for i in NUMBERS]
    return {A: some(["k", "id"], 0.3), B: some(["k", "id"], 0.3), C: some(["k", "n", "id"], 0.3), R: plain}  # type: ignore[arg-type]


def key_of(table: Table, row: dict[str, Any]) -> bytes:
    return describe(table).encode([row[name] for name in describe(table).key_names])


def database(rows: dict[Table, list[dict[str, Any]]], keys: set[bytes] | None) -> Connection:
    connection = create_engine("sqlite://", poolclass=StaticPool).connect()
    META.create_all(connection)
    for table, all_rows in rows.items():
        mine = [row for row in all_rows if table is R or keys is None or key_of(table, row) in keys]
        if mine:
            connection.execute(table.insert(), mine)
    return connection


class Maker:
    """Makes statements that are valid, often keyed or colocated, and often just beside it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def constant(self, column: ColumnElement[Any]) -> Any:
        return self.rng.choice(KEYS if isinstance(column.type, String) else NUMBERS)

    def columns(self, sources: list[Any]) -> list[ColumnElement[Any]]:
        return [column for source in sources for column in source.c]

    def like(self, column: ColumnElement[Any], sources: list[Any]) -> ColumnElement[Any]:
        found = [c for c in self.columns(sources) if c.type._type_affinity is column.type._type_affinity]
        same = [c for c in found if c.key == column.key and c is not column]
        return self.rng.choice(same if same and self.chance(0.6) else found)

    def column(self, sources: list[Any]) -> ColumnElement[Any]:
        found = self.columns(sources)
        keys = [c for c in found if c.key == "k"]
        return self.rng.choice(keys if keys and self.chance(0.5) else found)

    def comparison(  # noqa: PLR0911
        self, sources: list[Any], outer: list[Any]
    ) -> ColumnElement[bool]:
        column = self.column(sources)
        pick = self.rng.random()
        if pick < 0.3:
            return column == self.constant(column)
        if pick < 0.5:
            return column == self.like(column, sources + outer)
        if pick < 0.62:
            return column.in_(self.rng.sample(KEYS if isinstance(column.type, String) else NUMBERS, 2))
        if pick < 0.68:
            return column != self.constant(column)
        if pick < 0.74:
            return column.is_(None)
        if pick < 0.80:
            found = [s for s in sources if "k" in s.c and "n" in s.c]
            if found:
                source = self.rng.choice(found)
                pairs = [(self.rng.choice(KEYS), self.rng.choice(NUMBERS)) for _ in range(2)]
                return tuple_(source.c.k, source.c.n).in_(pairs)
        if pick < 0.84:
            return column == literal(None, column.type)
        return column > self.constant(column)

    def tree(self, sources: list[Any], outer: list[Any], depth: int) -> ColumnElement[bool]:
        pick = self.rng.random()
        if depth <= 0 or pick < 0.5:
            return self.comparison(sources, outer)
        if pick < 0.62:
            return and_(self.tree(sources, outer, depth - 1), self.tree(sources, outer, depth - 1))
        if pick < 0.76:
            return or_(self.tree(sources, outer, depth - 1), self.tree(sources, outer, depth - 1))
        if pick < 0.82:
            return not_(self.tree(sources, outer, depth - 1))
        return self.subquery(sources, outer, depth)

    def key_link(self, source: Any, sources: list[Any]) -> list[ColumnElement[bool]]:
        """The source's key equal to another's, when both have one."""
        others = [s for s in sources if s is not source and "k" in s.c]
        if "k" not in source.c or not others:
            return []
        other = self.rng.choice(others)
        links = [source.c.k == other.c.k]
        if "n" in source.c and "n" in other.c and self.chance(0.7):
            links.append(source.c.n == other.c.n)
        return links

    def subquery(self, sources: list[Any], outer: list[Any], depth: int) -> ColumnElement[bool]:
        inner_from, inner = self.froms(1 if self.chance(0.7) else 2, depth - 1)
        where = [self.tree(inner, sources + outer, depth - 1)] if self.chance(0.6) else []
        if self.chance(0.6):
            where += self.key_link(self.rng.choice(inner), [*sources, *outer])
        if self.chance(0.5):
            found = exists(select(1).select_from(inner_from).where(*where))
            return found if self.chance(0.6) else ~found
        column = self.column(sources)
        shown = self.like(column, inner) if any(
            c.type._type_affinity is column.type._type_affinity for c in self.columns(inner)
        ) else None  # fmt: skip
        if shown is None:
            return exists(select(1).select_from(inner_from).where(*where))
        query = select(shown).select_from(inner_from).where(*where)
        if self.chance(0.15):
            query = query.order_by(shown).limit(2)
        found = column.in_(query)
        return found if self.chance(0.7) else ~found

    def source(self, depth: int) -> Any:
        if depth > 0 and self.chance(0.25):
            return self.derived(depth - 1)
        return self.rng.choices((A, B, C, R), (4, 3, 2, 2))[0].alias()

    def derived(self, depth: int) -> Any:
        from_, sources = self.froms(1 if self.chance(0.7) else 2, depth)
        first = sources[0]
        shown = [column.label(column.key) for column in first.c]
        query = select(*shown).select_from(from_)
        if self.chance(0.5):
            query = query.where(self.tree(sources, [], depth))
        pick = self.rng.random()
        if pick < 0.15:
            names = [c for c in first.c if c.key in ("k", "n")] or [first.c.x]
            query = select(*(c.label(c.key) for c in names), func.count().label("id"), func.max(first.c.x).label("x"))
            query = query.select_from(from_).group_by(*names)
        elif pick < 0.25:
            query = query.order_by(*shown).limit(2)
        elif pick < 0.35:
            query = query.distinct()
        elif pick < 0.42:
            return union_all(query, query.where(first.c.x.is_not(None))).subquery()
        elif pick < 0.5:
            query = select(*shown[:-1], func.count().over().label(first.c.keys()[-1])).select_from(from_)
        return query.cte() if self.chance(0.3) else query.subquery()

    def froms(self, count: int, depth: int) -> tuple[Any, list[Any]]:
        sources = [self.source(depth)]
        joined = sources[0]
        for _ in range(count - 1):
            new = self.source(depth)
            if self.chance(0.2) and depth > 0:
                right, more = self.froms(2, 0)
            else:
                right, more = new, [new]
            on = self.key_link(more[0], [*sources, more[0]]) if self.chance(0.75) else []
            if not on or self.chance(0.4):
                on = [*on, self.tree([*sources, *more], [], 1)]
            pick = self.rng.random()
            joined = joined.join(right, and_(*on), isouter=pick > 0.5, full=pick > 0.93)
            sources += more
        return joined, sources

    def statement(self) -> Any:
        from_, sources = self.froms(self.rng.choice((1, 1, 2, 2, 3)), 2)
        found = self.columns(sources)
        shown = self.rng.sample(found, min(len(found), self.rng.randint(1, 4)))
        where = [self.tree(sources, [], 2) for _ in range(self.rng.choice((0, 1, 1, 2)))]
        if self.chance(0.25):
            where += self.key_link(sources[0], sources)
        if self.chance(0.25):
            column = sources[0].c[self.rng.choice(sources[0].c.keys())]
            where.append(column == self.constant(column))
        query = select(*(c.label(f"o{i}") for i, c in enumerate(shown))).select_from(from_).where(*where)
        pick = self.rng.random()
        if pick < 0.1:
            groups = [*shown, *(c for c in found if c.key in ("k", "n"))][: self.rng.randint(1, 5)]
            query = select(*groups, func.count(), func.min(shown[0])).select_from(from_).where(*where).group_by(*groups)
            if self.chance(0.3):
                query = query.having(func.count() > 1)
        elif pick < 0.15:
            query = select(func.count(), func.max(shown[0])).select_from(from_).where(*where)
        elif pick < 0.22:
            query = query.distinct()
        elif pick < 0.3:
            query = query.order_by(*query.selected_columns).limit(2)
        elif pick < 0.38:
            other = (
                select(*(c.label(f"o{i}") for i, c in enumerate(shown)))
                .select_from(from_)
                .where(self.tree(sources, [], 1))
            )
            return self.rng.choice((union_all, union))(query, other)
        elif pick < 0.45:
            inner = self.rng.choice((A, B)).alias()
            query = query.add_columns(
                select(func.count())
                .select_from(inner)
                .where(*self.key_link(inner, sources))
                .scalar_subquery()
                .label("o9")
            )
        return query


class World:
    """One random set of rows, whole and in parts."""

    def __init__(self, rng: random.Random) -> None:
        self.rows = rows_of(rng)
        self.whole = database(self.rows, None)
        self._parts: dict[frozenset[bytes], Connection] = {}
        self.keys = {key_of(t, row) for t, rows in self.rows.items() if t is not R for row in rows}
        # Keys of one column and of two live apart or together by their first part.
        self.shards = [{key for key in self.keys if key[:1] == k.encode()} for k in KEYS]

    def part(self, keys: set[bytes]) -> Connection:
        mark = frozenset(keys & self.keys)
        if mark not in self._parts:
            self._parts[mark] = database(self.rows, set(mark))
        return self._parts[mark]

    def close(self) -> None:
        for connection in (self.whole, *self._parts.values()):
            connection.close()
            connection.engine.dispose()


def answer(connection: Connection, statement: Any) -> Counter[Any]:
    return Counter(tuple(row) for row in connection.execute(statement))


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(random.Random(request.param))
    yield made
    made.close()


def check(world: World, statement: Any, needs: Needs) -> str:
    whole = answer(world.whole, statement)
    if needs.scope is Scope.REFERENCE:
        assert answer(world.part(set()), statement) == whole
        return "reference"
    if needs.scope is Scope.KEYED:
        assert answer(world.part(set(needs.keys)), statement) == whole, f"on the rows of {needs.keys} alone"
        if needs.merge is None and needs.keys:
            apart = sum((answer(world.part({key}), statement) for key in needs.keys), Counter())
            assert apart == whole, f"on the rows of each of {needs.keys} apart"
            return "keyed, apart" if len(needs.keys) > 1 else "keyed"
        return "keyed"
    if needs.merge is not None:
        return "merge"
    # By key value: the finest way to place rows, so what holds here holds for any ring.
    fine = sum((answer(world.part({key}), statement) for key in sorted(world.keys)), Counter())
    assert fine == whole, "on every key apart"
    return "scan"


@pytest.mark.parametrize("world", range(12), indirect=True)
def test_accepted_statements_answer_as_one_database(world: World, request: pytest.FixtureRequest) -> None:
    seed = request.node.callspec.params["world"]
    print(f"seed {seed}")
    rng = random.Random(f"statements {seed}")
    seen: Counter[str] = Counter()
    for number in range(250):
        statement = Maker(rng).statement()
        try:
            needs = needs_of(statement, None, describe)
        except (UnsupportedCrossShardQuery, UnsupportedOperation):
            seen["refused"] += 1
            continue
        try:
            seen[check(world, statement, needs)] += 1
        except AssertionError as error:
            text = statement.compile(compile_kwargs={"literal_binds": True})
            raise AssertionError(f"seed {seed}, statement {number}: {error}\n{needs}\n{text}") from None
    print(dict(seen))
    assert min(seen["keyed"], seen["scan"], seen["refused"]) >= 15, seen
