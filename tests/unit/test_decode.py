"""Messages of the logical stream, byte by byte as the protocol has them."""

from __future__ import annotations

import random
import struct

import pytest

from shardlib.ring import TokenRange, merge_ranges
from shardlib.ring.ranges import ranges_contain
from shardlib.token import hash_of
from shardlib.topology import Table
from shardlib_ops.reshard.rows import Column, Identity, TableShape
from shardlib_ops.reshard.stream import MalformedStream, SchemaChanged, lsn_number, lsn_text, mover
from shardlib_ops.reshard.stream.decode import UNCHANGED, read_field, read_message, read_relation, read_tuple
from shardlib_ops.reshard.stream.filter import DELETE, INSERT, TRUNCATE, UPDATE, Filter
from shardlib_ops.reshard.stream.net import copy_line, net_of
from tests.support.pgoutput import begin, commit, delete, insert, logical, relation, row, truncate, update

OID = 16_400
COLUMNS = [("k", 25, -1), ("id", 23, -1), ("v", 25, -1)]


def shape() -> TableShape:
    columns = tuple(Column(name, "text", "text", False, name != "v") for name, _, _ in COLUMNS)
    return TableShape(Table("t", ("k",)), 1, columns, ("k", "id"), Identity.KEY, ("k", "id"))


def filter_of(*, position: int = 0, copied: int = 0, limit: int = 1_000) -> Filter:
    return Filter(
        [shape()],
        lambda key: key.startswith(b"m"),
        columns={("public", "t"): COLUMNS},
        position=position,
        copied={("public", "t"): copied},
        limit=limit,
        limit_bytes=1 << 30,
    )


def announced(full: bool = False) -> bytes:
    return relation(OID, "public", "t", full, [(full or name != "v", name, oid, mod) for name, oid, mod in COLUMNS])


def test_a_row_is_read_whole_and_a_field_alone() -> None:
    message = b"w" * 31 + row([b"key", None, UNCHANGED, b"", b"x" * 70_000])
    values, end = read_tuple(message, 31)
    assert values == [b"key", None, UNCHANGED, b"", b"x" * 70_000]
    assert end == len(message)
    assert [read_field(message, 31, at) for at in range(5)] == values


def test_what_concerns_the_leg_is_found_and_no_more() -> None:
    changes = filter_of()
    changes.feed([
        begin(100), announced(),
        insert(OID, [b"m1", b"1", b"a"]), insert(OID, [b"s1", b"1", b"a"]), insert(OID, [None, b"1", b"a"]),
        update(OID, None, [b"m1", b"1", UNCHANGED]),
        update(OID, (b"K", [b"m1", b"1", None]), [b"m1", b"2", UNCHANGED]),
        update(OID, (b"K", [b"m1", b"2", None]), [b"s9", b"2", b"b"]),
        update(OID, (b"K", [b"s2", b"2", None]), [b"m2", b"2", b"b"]),
        update(OID, (b"K", [b"s2", b"2", None]), [b"s3", b"2", b"b"]),
        delete(OID, (b"K", [b"m2", b"2", None])), delete(OID, (b"K", [b"s2", b"2", None])),
        truncate([OID]), commit(100, 150),
    ])  # fmt: skip
    (found,) = changes.take()
    assert (found.commit, found.end, changes.complete) == (100, 150, 150)
    assert [(kind, old, new) for kind, _, old, new in found.changes] == [
        (INSERT, None, [b"m1", b"1", b"a"]),
        (UPDATE, None, [b"m1", b"1", UNCHANGED]),
        (UPDATE, [b"m1", b"1", None], [b"m1", b"2", UNCHANGED]),
        (DELETE, [b"m1", b"2", None], None),
        (INSERT, None, [b"m2", b"2", b"b"]),
        (DELETE, [b"m2", b"2", None], None),
        (TRUNCATE, None, None),
    ]
    assert list(found.keys) == [b"m1", b"m2"]


def test_a_whole_old_row_fills_what_the_new_one_leaves_out() -> None:
    changes = filter_of()
    old = [b"s1", b"1", b"long"]
    changes.feed([
        begin(100), announced(full=True), update(OID, (b"O", old), [b"m1", UNCHANGED, UNCHANGED]), commit(100, 150)
    ])  # fmt: skip
    (found,) = changes.take()
    assert found.changes[0][3] == [b"m1", b"1", b"long"]


def test_transactions_are_skipped_by_where_their_commit_begins() -> None:
    changes = filter_of(position=150, copied=250)
    for start in (100, 149, 150, 249, 250):
        changes.feed([begin(start), announced(), insert(OID, [b"m%d" % start, b"1", b""]), commit(start, start + 1)])
    assert [list(found.keys) for found in changes.take()] == [[b"m250"]]
    assert changes.complete == 251
    changes = filter_of(position=150)
    for start in (149, 150):
        changes.feed([begin(start), announced(), insert(OID, [b"m%d" % start, b"1", b""]), commit(start, start + 1)])
    assert [list(found.keys) for found in changes.take()] == [[b"m150"]]


def test_a_large_transaction_comes_in_parts_that_end_with_it() -> None:
    changes = filter_of(limit=2)
    changes.feed([begin(100), announced(), *(insert(OID, [b"m%d" % n, b"1", b""]) for n in range(4))])
    assert [(len(part.changes), part.end) for part in changes.take()] == [(2, None), (2, None)]
    assert not changes.between
    changes.feed([commit(100, 120)])
    assert [(len(part.changes), part.end) for part in changes.take()] == [(0, 120)]
    changes.feed([begin(130), commit(130, 140)])
    assert changes.take() == []
    assert changes.complete == 140


def test_keepalives_count_between_transactions_only() -> None:
    changes = filter_of()
    changes.at_rest(50)
    assert changes.complete == 50
    changes.feed([begin(100)])
    changes.at_rest(300)
    assert changes.complete == 50
    changes.feed([commit(100, 110)])
    assert changes.complete == 110


def test_messages_are_heard_with_their_transaction() -> None:
    changes = filter_of()
    message = logical(True, 90, "shardlib", b"fence-7")
    changes.feed([begin(100), message, logical(True, 91, "other", b"no"), commit(100, 120)])
    changes.feed([logical(False, 130, "shardlib", b"alone")])
    assert [(found.messages, found.end) for found in changes.take()] == [(["fence-7"], 120), (["alone"], 130)]
    assert read_message(message) == (True, 90, "shardlib", b"fence-7")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ([*COLUMNS, ("w", 23, -1)], "'w' is in the stream and not in the table"),
        (COLUMNS[:2], "'v' is there now and was not in the stream"),
        ([*COLUMNS[:2], ("v", 25, 12)], "'v' has another type"),
        ([COLUMNS[1], COLUMNS[0], COLUMNS[2]], "the order of its columns"),
    ],
)
def test_a_changed_table_says_what_changed(columns: list[tuple[str, int, int]], told: str) -> None:
    message = relation(OID, "public", "t", False, [(False, *column) for column in columns])
    with pytest.raises(SchemaChanged, match=told):
        filter_of().feed([begin(100), message])


def test_a_partition_may_be_announced_and_have_no_changes_of_its_own() -> None:
    changes = filter_of()
    changes.feed([begin(100), announced(), relation(7, "public", "t_1", False, [])])
    with pytest.raises(SchemaChanged, match=r"'public\.t_1', which is none"):
        changes.feed([insert(7, [b"m"])])


@pytest.mark.parametrize(
    "message",
    [
        insert(OID, [b"m1", b"1", b"a"])[:-1],
        insert(OID, [b"m1", b"1", b"a"]) + b"x",
        insert(OID, [b"m1", b"1"]),
        insert(99, [b"m1", b"1", b"a"]),
        update(OID, None, [UNCHANGED, b"1", b"a"]),
        update(OID, None, [b"m1", UNCHANGED, b"a"]),
        delete(OID, (b"X", [b"m1", b"1", None])),
        b"w" + bytes(24) + b"?",
        b"w" + bytes(24) + b"I",
        b"w" + bytes(10),
        announced()[:-3],
    ],
)
def test_what_cannot_be_read_is_an_error_that_shows_no_row(message: bytes) -> None:
    changes = filter_of()
    changes.feed([begin(100), announced()])
    with pytest.raises(MalformedStream) as refused:
        changes.feed([message])
    assert "m1" not in str(refused.value)


def test_a_relation_is_read() -> None:
    found = read_relation(announced())
    assert (found.oid, found.schema, found.name, found.full) == (struct.pack("!I", OID), "public", "t", False)
    assert [(column.name, column.identity, column.type_oid, column.modifier) for column in found.columns] == [
        ("k", True, 25, -1), ("id", True, 23, -1), ("v", False, 25, -1),
    ]  # fmt: skip


def test_lsns_are_numbers() -> None:
    assert lsn_number("16/B374D848") == 0x16B374D848
    assert lsn_text(0x16B374D848) == "16/B374D848"
    assert lsn_text(0) == "0/0"


@pytest.mark.parametrize("name", ["murmur3", "xxhash"])
def test_a_mover_agrees_with_the_ranges(rng: random.Random, name: str) -> None:
    token = hash_of(name)
    keys = [f"key-{rng.random()}".encode() for _ in range(3_000)]
    for parts in (0, 1, 2, 40):
        bounds = [tuple(sorted((token(rng.choice(keys)), token(rng.choice(keys))))) for _ in range(parts)]
        ranges = merge_ranges(TokenRange(*pair) for pair in bounds)
        moves = mover(ranges, name)
        assert [moves(key) for key in keys] == [ranges_contain(ranges, token(key)) for key in keys]
    whole = mover([TokenRange(0, (1 << 64) - 1)], name)
    assert all(map(whole, keys))


def test_a_copy_line_escapes_what_copy_takes_for_its_own() -> None:
    assert copy_line([b"a", b"", b"b"]) == b"a\t\tb"
    assert copy_line([b"a\tb", b"c\\N", None, b"\n\r", UNCHANGED]) == b"a\\tb\tc\\\\N\t\\N\t\\n\\r\t\\N"


def test_a_row_that_gets_another_identity_without_its_values_has_no_net_effect() -> None:
    changes = filter_of()
    changes.feed(
        [begin(1), announced(), update(OID, (b"K", [b"m", b"1", None]), [b"m", b"2", UNCHANGED]), commit(1, 2)]
    )
    assert net_of(changes.take()[0].changes, (0, 1)) is None
