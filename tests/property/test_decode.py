"""Any row can be read back, no bytes crash the decoder, and the net effect of changes is their effect one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardlib.topology import Table
from shardlib_ops.reshard.rows import Column, Identity, TableShape
from shardlib_ops.reshard.stream import CannotFollow, MalformedStream, SchemaChanged
from shardlib_ops.reshard.stream.decode import UNCHANGED, Value, read_field, read_tuple
from shardlib_ops.reshard.stream.filter import DELETE, INSERT, UPDATE, Change, Filter
from shardlib_ops.reshard.stream.net import copy_line, net_of
from tests.support.pgoutput import begin, commit, delete, insert, relation, row, truncate, update

OID = 16_400
values = st.one_of(st.binary(max_size=300), st.none(), st.just(UNCHANGED))


def a_filter() -> Filter:
    columns = tuple(Column(name, "text", "text", False, True) for name in ("k", "v"))
    shape = TableShape(Table("t", ("k",)), 1, columns, ("k",), Identity.KEY, ("k",))
    known = {("public", "t"): [("k", 25, -1), ("v", 25, -1)]}
    return Filter([shape], lambda key: True, columns=known, position=0, copied={}, limit=9, limit_bytes=1 << 20)


ANNOUNCED = relation(OID, "public", "t", False, [(True, "k", 25, -1), (False, "v", 25, -1)])


@given(st.lists(values, max_size=20), st.binary(max_size=9))
def test_a_row_is_read_back(written: list[Value], before: bytes) -> None:
    message = before + row(written)
    assert read_tuple(message, len(before)) == (written, len(message))
    for at, value in enumerate(written):
        assert read_field(message, len(before), at) == value


@given(st.lists(st.binary(max_size=40), max_size=6), st.randoms(use_true_random=False))
def test_no_bytes_crash_the_decoder(noise: list[bytes], random: object) -> None:
    good = [
        begin(9), ANNOUNCED, insert(OID, [b"a", b"1"]), update(OID, (b"K", [b"a", None]), [b"b", UNCHANGED]),
        delete(OID, (b"K", [b"b", None])), truncate([OID]), commit(9, 12),
    ]  # fmt: skip
    changes = a_filter()
    for message in good:
        changes.feed([message])
        for junk in noise:
            cut = len(junk) % (len(message) - 24)
            for broken in (b"w" + bytes(24) + junk, message[: len(message) - cut] + junk, message + junk):
                other = a_filter()
                try:
                    other.feed([begin(9), ANNOUNCED, broken])
                except (MalformedStream, SchemaChanged, CannotFollow):
                    pass
    assert changes.complete == 12


Step = tuple[str, int, int, int]
steps = st.lists(
    st.tuples(st.sampled_from(["insert", "update", "toast", "move", "move toast", "delete"]), st.integers(0, 4),
              st.integers(0, 4), st.integers(0, 99)),
    max_size=40,
)  # fmt: skip


@given(st.sets(st.integers(0, 4)), steps)
def test_the_net_effect_is_the_effect_one_by_one(there: set[int], script: list[Step]) -> None:
    """A table of (key, small, large), of which the stream leaves out `large` when it did not change."""
    source = a_filter()  # any object will do: the changes of one table are given
    start: dict[bytes, list[Value]] = {b"%d" % key: [b"%d" % key, b"old", b"large"] for key in there}
    table = {key: list(values) for key, values in start.items()}
    changes: list[Change] = []
    for what, number, other, value in script:
        key, new_key, text = b"%d" % number, b"%d" % other, b"%d" % value
        if what == "insert" and key not in table:
            table[key] = [key, text, text]
            changes.append((INSERT, source, None, [key, text, text]))  # type: ignore[arg-type]
        elif what in ("update", "toast") and key in table:
            table[key] = [key, text, table[key][2] if what == "toast" else text]
            sent = [key, text, UNCHANGED if what == "toast" else text]
            changes.append((UPDATE, source, None, sent))  # type: ignore[arg-type]
        elif what.startswith("move") and key in table and new_key not in table:
            had = table.pop(key)
            table[new_key] = [new_key, text, had[2] if "toast" in what else text]
            sent = [new_key, text, UNCHANGED if "toast" in what else text]
            changes.append((UPDATE, source, [key, None, None], sent))  # type: ignore[arg-type]
        elif what == "delete" and key in table:
            del table[key]
            changes.append((DELETE, source, [key, None, None], None))  # type: ignore[arg-type]
    net = net_of(changes, (0,))
    if net is None:
        assert any(kind == UPDATE and old is not None and UNCHANGED in (new or ()) for kind, _, old, new in changes)
        return
    result = {key: list(values) for key, values in start.items()}
    for gone in net.deletes:
        assert result.pop(gone[0], None) is not None  # type: ignore[arg-type]
    for whole in net.upserts:
        assert whole[0] in result
        result[whole[0]] = whole  # type: ignore[index]
    for sent_at, parts in net.partials.items():
        for part in parts:
            for at in sent_at:
                result[part[0]][at] = part[at]  # type: ignore[index]
    for fresh in net.inserts:
        assert fresh[0] not in result
        result[fresh[0]] = fresh  # type: ignore[index]
    assert result == table


@given(st.lists(values, min_size=1, max_size=8))
def test_a_copy_line_can_be_read_back(written: list[Value]) -> None:
    line = copy_line(written)
    assert b"\n" not in line
    assert b"\r" not in line
    fields = line.split(b"\t")
    back: list[Value] = [
        None if field == b"\\N" else field.decode("latin-1").replace("\\\\", "\0").replace("\\t", "\t")
        .replace("\\n", "\n").replace("\\r", "\r").replace("\0", "\\").encode("latin-1")
        for field in fields
    ]  # fmt: skip
    if all(value.__class__ is not bytes or b"\0" not in value for value in written):
        assert back == [None if value is UNCHANGED else value for value in written]
