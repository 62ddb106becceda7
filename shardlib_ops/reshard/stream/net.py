"""What many changes of a table come to: for each row the one thing that is left to do. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from shardlib_ops.reshard.stream.decode import UNCHANGED, Value
from shardlib_ops.reshard.stream.filter import DELETE, INSERT, Change

__all__ = ["Net", "copy_line", "net_of"]


@dataclass(eq=False, slots=True)
class Net:
    """What is left to do with the rows of a table; no row is in two of these.

    Attributes:
        inserts: rows that were not there before.
        upserts: rows that are there, to be overwritten whole.
        partials: rows of which some values are not carried, by the columns that are.
        deletes: rows that go, of which only the identity need be carried.
    """

    inserts: list[list[Value]] = field(default_factory=list)
    upserts: list[list[Value]] = field(default_factory=list)
    partials: dict[tuple[int, ...], list[list[Value]]] = field(default_factory=dict)
    deletes: list[list[Value]] = field(default_factory=list)


_INSERT, _UPSERT, _PARTIAL, _DELETE = range(4)
_State = tuple[int, list[Value]]


def net_of(changes: Iterable[Change], match_at: Sequence[int]) -> Net | None:
    """The net effect of the changes of one table, none of them a TRUNCATE, by the columns that identify a row.

    Returns:
        None if it cannot be told: a row gets another identity while values of it are not carried, or a row is
        inserted twice, which the sink shall refuse.
    """
    rows: dict[object, _State] = {}
    identity = itemgetter(*match_at)
    for kind, _, old, new in changes:
        if kind == DELETE:
            assert old is not None  # noqa: S101 - a deletion has an old row
            if not _deleted(rows, identity(old), old):
                return None
            continue
        assert new is not None  # noqa: S101 - so has everything else a new one
        row = identity(new)
        if kind == INSERT:
            if row not in rows:
                rows[row] = (_INSERT, new)
            elif not _inserted(rows, row, new):
                return None
            continue
        if old is not None and (before := identity(old)) != row:
            had = rows.get(before)
            whole = new
            if UNCHANGED in new:
                if had is None or had[0] in (_PARTIAL, _DELETE):
                    return None
                whole = _filled(new, had[1])
            if not (_deleted(rows, before, old) and _inserted(rows, row, whole)):
                return None
        elif not _updated(rows, row, new):
            return None
    return _sorted_out(rows)


def _deleted(rows: dict[object, _State], row: object, old: list[Value]) -> bool:
    had = rows.get(row)
    if had is not None and had[0] == _DELETE:
        return False
    if had is not None and had[0] == _INSERT:
        del rows[row]
    else:
        rows[row] = (_DELETE, old)
    return True


def _inserted(rows: dict[object, _State], row: object, new: list[Value]) -> bool:
    had = rows.get(row)
    if had is None:
        rows[row] = (_INSERT, new)
    elif had[0] == _DELETE:
        rows[row] = (_UPSERT, new)
    else:
        return False
    return True


def _updated(rows: dict[object, _State], row: object, new: list[Value]) -> bool:
    had = rows.get(row)
    state = _UPSERT
    if had is not None and had[0] == _DELETE:
        return False
    if UNCHANGED in new:
        new = new if had is None else _filled(new, had[1])
        state = _PARTIAL if had is None else had[0]
        if state == _PARTIAL and UNCHANGED not in new:
            state = _UPSERT
    elif had is not None and had[0] == _INSERT:
        state = _INSERT
    rows[row] = (state, new)
    return True


def _filled(new: list[Value], had: list[Value]) -> list[Value]:
    return [before if value is UNCHANGED else value for value, before in zip(new, had, strict=True)]


def _sorted_out(rows: dict[object, _State]) -> Net:
    net = Net()
    lists = {_INSERT: net.inserts, _UPSERT: net.upserts, _DELETE: net.deletes}
    for state, values in rows.values():
        if state == _PARTIAL:
            sent = tuple([at for at, value in enumerate(values) if value is not UNCHANGED])
            net.partials.setdefault(sent, []).append(values)
        else:
            lists[state].append(values)
    return net


def copy_line(values: Sequence[Value]) -> bytes:
    r"""A row as text COPY reads it, without the newline; what is not carried is NULL."""
    try:
        line = b"\t".join(values)  # type: ignore[arg-type]
    except TypeError:
        return b"\t".join([_field(value) for value in values])
    if b"\\" in line or b"\n" in line or b"\r" in line or line.count(b"\t") != len(values) - 1:
        return b"\t".join([_field(value) for value in values])
    return line


def _field(value: Value) -> bytes:
    if value.__class__ is not bytes:
        return b"\\N"
    if b"\\" in value or b"\t" in value or b"\n" in value or b"\r" in value:
        value = value.replace(b"\\", b"\\\\").replace(b"\t", b"\\t").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return value
