"""Random statements: a database with hidden rows answers as one that does not have them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData, Table, create_engine, delete, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from shardlib.key.composite import SEPARATOR
from shardlib.shard.dialect import SharedDialect
from shardlib_ops import LocalCluster
from tests.property.test_route_oracle import META, A, B, C, Maker, R, key_of, rows_of

JOBS = (7, 12)


class Databases:
    """Two schemas of one server: one with all rows and the key tables of two jobs, one without the hidden rows."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), enable_from_linting=False)
        dialect = SharedDialect(False, {}).dialect
        self.mixed, self.plain = self._engine.connect(), self._engine.connect()
        dialect.__dict__.update({**self.mixed.dialect.__dict__, "statement_compiler": dialect.statement_compiler})
        self.mixed.dialect = dialect.without_rows_of(JOBS)
        for conn, schema in ((self.mixed, "mixed"), (self.plain, "plain")):
            conn.execute(text(f"CREATE SCHEMA {schema}"))
            conn.execute(text(f"SET search_path = {schema}"))
            META.create_all(conn)
        for job in JOBS:
            self.mixed.execute(
                text(f"CREATE TABLE shardlib.job_{job}_keys (k text, more text[], PRIMARY KEY (k, more))")
            )
        self.commit()

    def commit(self) -> None:
        self.mixed.commit()
        self.plain.commit()

    def close(self) -> None:
        self.mixed.close()
        self.plain.close()
        self._engine.dispose()

    def fill(self, rng: random.Random) -> int:
        """New rows in both; the number of those that are hidden."""
        for job in JOBS:
            self.mixed.execute(text(f"DELETE FROM shardlib.job_{job}_keys"))
        rows = rows_of(rng)
        keys = sorted({key_of(table, row) for table in (A, B, C) for row in rows[table]})
        hidden = {key: rng.choice(JOBS) for key in keys if rng.random() < 0.4}
        for key, job in hidden.items():
            first, *more = (part.decode() for part in key.split(SEPARATOR))
            insert = f"INSERT INTO shardlib.job_{job}_keys (k, more) VALUES (:k, CAST(:more AS text[]))"
            self.mixed.execute(text(insert), {"k": first, "more": more})
        count = 0
        for table in (A, B, C, R):
            seen = [row for row in rows[table] if table is R or key_of(table, row) not in hidden]
            count += len(rows[table]) - len(seen)
            for conn, mine in ((self.mixed, rows[table]), (self.plain, seen)):
                conn.exec_driver_sql(f"DELETE FROM {table.name}")
                if mine:
                    conn.execute(table.insert(), mine)
        self.commit()
        return count


@pytest.fixture(scope="module")
def databases() -> Iterator[Databases]:
    with LocalCluster(shards=1) as cluster:
        made = Databases(str(cluster.servers[0].dsn))
        yield made
        made.close()


def answer(conn: Connection, statement: Any) -> Counter[Any] | str:
    """The rows, or the SQLSTATE of a statement that PostgreSQL does not take."""
    try:
        return Counter(tuple(row) for row in conn.execute(statement))
    except DBAPIError as error:
        conn.rollback()
        conn.execute(text(f"SET search_path = {'plain' if conn.dialect is conn.engine.dialect else 'mixed'}"))
        conn.commit()
        return str(error.orig and error.orig.sqlstate)  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(6))
def test_any_statement_sees_what_is_not_hidden(databases: Databases, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(f"hidden {seed}")
    seen: Counter[str] = Counter()
    for _ in range(5):
        seen["hidden rows"] += databases.fill(rng)
        for number in range(60):
            statement = Maker(rng).statement()
            expected, found = answer(databases.plain, statement), answer(databases.mixed, statement)
            assert found == expected, f"seed {seed}, statement {number}:\n{statement.compile(databases.mixed.engine)}"
            seen["refused" if isinstance(expected, str) else "some" if expected else "none"] += 1
    print(dict(seen))
    assert seen["some"] > 100, seen
    assert seen["refused"] < 60, seen
    assert seen["hidden rows"] > 20, seen


@pytest.mark.parametrize("seed", range(4))
def test_any_write_changes_what_is_not_hidden(databases: Databases, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(f"hidden writes {seed}")
    changed = 0
    for _ in range(5):
        databases.fill(rng)
        for number in range(30):
            target: Any = rng.choice((A, B, C))
            maker = Maker(rng)
            beside = [maker.source(0)] if rng.random() < 0.5 else []
            where = [maker.tree([target, *beside], [], 2)]
            if beside and rng.random() < 0.7:
                where += maker.key_link(target, [target, *beside])
            write = update(target).values(x="new") if rng.random() < 0.5 else delete(target)
            statement = write.where(*where).returning(*target.c)
            expected, found = answer(databases.plain, statement), answer(databases.mixed, statement)
            assert found == expected, f"seed {seed}, statement {number}:\n{statement.compile(databases.mixed.engine)}"
            changed += 0 if isinstance(expected, str) else len(expected)
            databases.mixed.rollback()
            databases.plain.rollback()
    assert changed > 100, changed


def test_schemas_and_their_translation(databases: Databases) -> None:
    """A table in a schema of its own, by its name and under an alias, and one whose schema is chosen at execution."""
    databases.fill(random.Random(3))
    there = Table(A.name, MetaData(), *(column._copy() for column in A.c), schema="mixed")
    with databases._engine.connect() as conn:
        expected = {tuple(row) for row in databases.plain.execute(A.select())}
        conn.dialect = databases.mixed.dialect
        assert {tuple(row) for row in conn.execute(there.select())} == expected
        assert {tuple(row) for row in conn.execute(there.alias().select())} == expected
        options = {"schema_translate_map": {None: "mixed"}}
        assert {tuple(row) for row in conn.execute(A.select(), execution_options=options)} == expected
