"""The list of rows that a stream was asked to change: complete from an LSN on, or it says that it is not."""

from __future__ import annotations

import random

import pytest

from shardlib.topology import Table
from shardlib_ops.reshard.rows import Column, Identity, TableShape
from shardlib_ops.reshard.stream.decode import Relation, RelationColumn, Value
from shardlib_ops.reshard.stream.filter import DELETE, INSERT, TRUNCATE, UPDATE, Change, Source
from shardlib_ops.reshard.stream.recent import Recent


def source(name: str = "item", *, key: tuple[str, ...] = ("id",), full: bool = False) -> Source:
    """A table (k, id, v) with a primary key; `full` with the whole old row in the stream."""
    names = ("k", "id", "v")
    columns = tuple(Column(column, "text", "text", False, True) for column in names)
    shape = TableShape(
        Table(name, ("k",)), 1, columns, key, Identity.FULL if full else Identity.KEY, names if full else key
    )
    relation = Relation(
        b"oid.", "public", name, full, tuple(RelationColumn(c, full or c in key, 25, -1) for c in names)
    )
    at = tuple(range(3)) if full else tuple(map(names.index, key))
    return Source(shape, relation, names, (0,), at, full, 0)


def row(*texts: str) -> list[Value]:
    return [text.encode() for text in texts]


def rows_of(recent: Recent, since: int, table: str = "item") -> set[tuple[bytes, ...]]:
    found = recent.after(since)
    assert found is not None
    lists = found.get(table, ())
    assert lists is not None
    return {row for some in lists for row in some.rows}


def test_nothing_is_remembered_before_a_comparison_begins() -> None:
    recent = Recent()
    recent.add([(INSERT, source(), None, row("a", "1", "x"))], 10)
    assert len(recent) == 0
    assert recent.after(5) is None
    recent.begin(20)
    assert recent.after(19) is None, "what was changed before is not known"
    assert recent.after(20) == {}


def test_former_identities_and_deleted_rows_are_remembered() -> None:
    recent, item = Recent(), source(key=("k", "id"))
    recent.begin(0)
    recent.add([(INSERT, item, None, row("a", "1", "x")), (UPDATE, item, None, row("a", "2", "x"))], 10)
    recent.add([(UPDATE, item, row("a", "3", ""), row("b", "4", "x")), (DELETE, item, row("a", "5", ""), None)], 20)
    assert rows_of(recent, 0) == {(b"a", b"1"), (b"a", b"2"), (b"a", b"3"), (b"b", b"4"), (b"a", b"5")}
    assert rows_of(recent, 11) == {(b"a", b"3"), (b"b", b"4"), (b"a", b"5")}
    (some,) = (recent.after(0) or {})["item"] or ()
    assert (some.columns, some.unique) == (("k", "id"), True)


def test_of_a_table_where_nothing_identifies_a_row_the_keys_are_remembered() -> None:
    recent, bag = Recent(), source(key=(), full=True)
    recent.begin(0)
    recent.add([(INSERT, bag, None, row("a", "1", "x")), (DELETE, bag, row("b", "1", "x"), None)], 10)
    (some,) = (recent.after(0) or {})["item"] or ()
    assert (some.columns, some.unique, set(some.rows)) == (("k",), False, {(b"a",), (b"b",)})


def test_with_the_whole_old_row_in_the_stream_the_primary_key_identifies() -> None:
    recent = Recent()
    recent.begin(0)
    recent.add([(UPDATE, source(full=True), row("a", "1", "x"), row("a", "1", "y"))], 10)
    assert rows_of(recent, 0) == {(b"1",)}


def test_of_an_emptied_table_nothing_is_known_until_the_next_comparison() -> None:
    recent, item, other = Recent(), source(), source("other")
    recent.begin(0)
    recent.add([(INSERT, item, None, row("a", "1", "x")), (INSERT, other, None, row("a", "1", "x"))], 10)
    recent.add([(TRUNCATE, item, None, None)], 20)
    recent.add([(INSERT, item, None, row("a", "2", "x"))], 30)
    found = recent.after(0)
    assert found is not None
    assert found["item"] is None
    assert rows_of(recent, 0, "other") == {(b"1",)}
    assert rows_of(recent, 25) == {(b"2",)}
    recent.forget(25)
    assert rows_of(recent, 25) == {(b"2",)}
    assert rows_of(recent, 25, "other") == set()
    assert recent.after(24) is None


def test_too_many_rows_are_given_up_until_the_next_comparison() -> None:
    recent, item = Recent(limit=10), source()
    recent.begin(0)
    for number in range(10):
        recent.add([(INSERT, item, None, row("a", str(number), "x"))] * 3, number)
    assert len(recent) == 10, "a row that is changed again counts once"
    recent.add([(INSERT, item, None, row("a", "10", "x"))], 11)
    assert len(recent) == 0
    assert recent.after(11) is None
    assert recent.count(11) == 10, "many, not none: no range is closed as if little had changed"
    recent.begin(20)
    assert recent.count(20) == 0
    recent.add([(INSERT, item, None, row("a", "11", "x"))], 21)
    assert rows_of(recent, 20) == {(b"11",)}
    assert recent.after(11) is None


@pytest.mark.parametrize("_", range(20))
def test_random_changes(_: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    recent, tables = Recent(), [source("one"), source("two", key=("k", "id"))]
    recent.begin(0)
    told: list[tuple[int, str, tuple[Value, ...]]] = []
    since = 0
    for lsn in range(1, 200):
        changes: list[Change] = []
        for _ in range(rng.randrange(4)):
            at = rng.choice(tables)
            old, new = (row(rng.choice("ab"), str(rng.randrange(30)), "x") for _ in range(2))
            kind = rng.choice((INSERT, UPDATE, DELETE))
            before = None if kind == INSERT else old
            after = None if kind == DELETE else new
            changes.append((kind, at, before, after))
            told += [
                (lsn, at.shape.table.name, tuple(values[n] for n in at.match_at))
                for values in (before, after)
                if values is not None
            ]
        recent.add(changes, lsn)
        if rng.random() < 0.05:
            since = rng.randint(since, lsn)
            recent.forget(since)
        asked = rng.randint(since, lsn)
        for table in ("one", "two"):
            assert rows_of(recent, asked, table) == {
                values for at, name, values in told if at >= asked and name == table
            }
        assert recent.count(asked) == len({(name, values) for at, name, values in told if at >= asked})
