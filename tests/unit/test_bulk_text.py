"""Rows as the text of COPY, and the shape of rows, without a server."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Boolean, Column, Integer, MetaData, String, Table, func, types
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from shardlib.engine.bulk_rows import Target, portions
from shardlib.engine.bulk_text import TableText, block_of, escaped
from shardlib.errors import BulkLoadIncomplete, InvalidArgument, UnsupportedOperation
from shardlib.waits import ThreadWaits

DIALECT = PGDialect_psycopg(dbapi=PGDialect_psycopg.import_dbapi())  # type: ignore[no-untyped-call]


def unescaped(field: str) -> str | None:
    """A field of COPY's text as PostgreSQL's documentation says it is read."""
    if field == "\\N":
        return None
    out, at = [], 0
    while at < len(field):
        if field[at] == "\\":
            out.append({"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}[field[at + 1]])
            at += 2
        else:
            out.append(field[at])
            at += 1
    return "".join(out)


def lines(columns: Sequence[Column[Any]], *rows: tuple[Any, ...]) -> list[str]:
    table = Table("t", MetaData(), *columns)
    return TableText(list(table.columns), DIALECT).lines(list(zip(*rows, strict=True)), 1)


def test_random_texts_are_read_back(rng: random.Random) -> None:
    rows = [
        tuple(None if rng.random() < 0.1 else "".join(rng.choices("\\\t\n\rNab☃.", k=rng.randrange(8))) for _ in "ab")
        for _ in range(2000)
    ]
    block = block_of(lines([Column("a", String), Column("b", String)], *rows)).decode()
    assert block.endswith("\n")
    found = [tuple(map(unescaped, line.split("\t"))) for line in block[:-1].split("\n")]
    assert found == rows


def test_a_column_of_several_types_is_written_value_by_value() -> None:
    assert lines([Column("a", types.Numeric)], (1,), (None,), (2.5,), ("x\ty",)) == ["1", "\\N", "2.5", "x\\ty"]


def test_a_subclass_does_not_decide_how_it_is_written() -> None:
    class Loud(str):
        def __str__(self) -> str:
            return "LOUD"

    assert lines([Column("a", String)], (Loud("quiet"),)) == ["quiet"]


def test_booleans_are_checked_as_in_an_insert() -> None:
    assert lines([Column("a", Boolean)], (True,), (None,), (False,)) == ["t", "\\N", "f"]
    with pytest.raises(TypeError, match="Not a boolean value") as caught:
        lines([Column("a", Boolean)], (True,), ("yes",))
    assert str(caught.value).endswith("(row 2 of the load, column 't.a')")


def test_zero_characters_are_named() -> None:
    with pytest.raises(InvalidArgument, match="zero character") as caught:
        lines([Column("a", String)], ("x",), ("y",), ("a\0b",))
    assert str(caught.value).endswith("(row 3 of the load, column 't.a')")


def test_texts_without_anything_special_are_not_copied() -> None:
    texts = ["a", "b", ""]
    assert escaped(texts) is texts
    assert escaped([""]) == [""]


def test_a_type_that_needs_sql_is_refused() -> None:
    class Lower(types.UserDefinedType[str]):
        def bind_expression(self, bindvalue: Any) -> Any:
            return func.lower(bindvalue)

    with pytest.raises(UnsupportedOperation, match="bind_expression"):
        lines([Column("a", Lower())], ("x",))


def test_a_default_that_is_sql_is_refused_unless_the_rows_give_the_column() -> None:
    target = Target(Table("t", MetaData(), Column("a", Integer), Column("b", Integer, default=func.random())))
    with pytest.raises(UnsupportedOperation, match=r"t\.b"):
        target.shape(["a"], "columns")
    assert target.shape(["a", "b"], "columns").values([(1, 2)], 1) == [(1,), (2,)]


def test_rows_are_mappings_or_sequences_of_the_same_columns() -> None:
    shape = Target(Table("t", MetaData(), Column("a", Integer), Column("bb", Integer, key="b"))).shape(
        ["bb", "a"], "columns"
    )
    assert [list(column) for column in shape.values([{"a": 1, "bb": 2}, {"bb": 4, "a": 3}], 1)] == [[2, 4], [1, 3]]
    assert [list(column) for column in shape.values([(1, 2), [3, 4]], 1)] == [[1, 3], [2, 4]]
    for rows, row in (
        ([(1, 2), (3,)], "row 8="),
        ([(1, 2), "xy"], "row 8="),
        ([(1, 2), 5], "row 8="),
        ([{"a": 1, "bb": 2}, {"a": 1, "c": 2}], "row 8="),
        ([{"a": 1, "bb": 2}, (1, 2)], "all mappings"),
    ):
        with pytest.raises(InvalidArgument, match=row):
            shape.values(rows, 7)


def test_portions_are_bounded_and_end() -> None:
    read = []

    def rows() -> Any:
        for i in range(200):
            read.append(i)
            yield i

    take = portions(rows(), ThreadWaits())
    assert take(100) == list(range(100))
    assert read == list(range(100)), "nothing is read ahead"
    assert take(150) == list(range(100, 200))
    assert take(10) == []
    with pytest.raises(InvalidArgument, match="iterable"):
        portions(5, ThreadWaits())


def test_an_incomplete_load_tells_what_is_where() -> None:
    error = BulkLoadIncomplete("orders", {"a": 3}, ["b"], ["c"], "lost")
    again = pickle.loads(pickle.dumps(error))
    assert (again.committed, again.failed, again.unknown) == ({"a": 3}, ("b",), ("c",))
    assert "'a' (3 rows)" in str(again)
    assert "'b' since is not" in str(again)
    assert "'c' is unknown" in str(again)
