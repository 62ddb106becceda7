"""Which rows a stream was asked to change lately: of keys with very many rows, these alone are compared again. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

from shardlib_ops.reshard.stream.decode import Value
from shardlib_ops.reshard.stream.filter import Change, Source

__all__ = ["Recent", "RowList"]

_ROWS_MAX: Final = 500_000

_ZERO: Final = b"\0"
"""Between the values of an identity, whose texts have none. Tuples would cost ten times as much: they keep each value
alive among rows that go, and the garbage collector busy."""

_Identities = dict[bytes, int]
"""Identity -> LSN of the last change."""


@dataclass(frozen=True, slots=True)
class RowList:
    """Rows of a table that were changed, deleted ones and former identities included.

    Attributes:
        columns: that identify a row; or, of a table where nothing does, those of the shard key.
        unique: whether they identify one row.
        rows: the texts of these columns' values.
    """

    columns: tuple[str, ...]
    unique: bool
    rows: Sequence[tuple[bytes, ...]]


class Recent:
    """The identities of the rows that were changed since a comparison began, each with the last LSN of its changes.

    It begins when it is told to, so that catching up after a copy pays nothing for it. One that has grown too large
    is given up, until the next comparison begins.

    Args:
        limit: identities that are kept at most; one takes about 150 bytes.
    """

    def __init__(self, limit: int = _ROWS_MAX) -> None:
        self._limit = limit
        self._since: int | None = None
        self._found: dict[Source, tuple[Callable[[Sequence[Value]], bytes], _Identities]] = {}
        self._emptied: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._found.values())

    def begin(self, lsn: int) -> None:
        """Remember from here on, if it does not yet.

        Args:
            lsn: nothing of a transaction whose commit record begins at or after it is applied yet.
        """
        if self._since is None:
            self._since = lsn

    def forget(self, before: int) -> None:
        """Let go of what was changed last before an LSN at which both sides were found equal."""
        if self._since is None or before <= self._since:
            return
        self._since = before
        for source, (of, rows) in list(self._found.items()):
            self._found[source] = of, {row: lsn for row, lsn in rows.items() if lsn >= before}
        self._emptied = {table: lsn for table, lsn in self._emptied.items() if lsn >= before}

    def add(self, changes: Iterable[Change], lsn: int) -> None:
        """Remember the rows of changes that were applied.

        Args:
            changes: of whole transactions, or parts of one.
            lsn: past the beginning of the last commit record among them.
        """
        if self._since is None:
            return
        source = None
        for _, at, old, new in changes:
            if at is not source:
                source = at
                of, rows = self._of(at)
            if new is not None:
                rows[of(new)] = lsn
            if old is not None:
                rows[of(old)] = lsn
            elif new is None:
                self._emptied[at.shape.table.fullname] = lsn
        if len(self) > self._limit:
            self._since = None
            self._found.clear()
            self._emptied.clear()

    def count(self, since: int) -> int:
        """How many rows were changed at or after an LSN; as many as can be kept if they were given up."""
        if self._since is None:
            return self._limit
        return sum(lsn >= since for _, rows in self._found.values() for lsn in rows.values())

    def after(self, since: int) -> Mapping[str, Sequence[RowList] | None] | None:
        """The rows that were changed at or after an LSN, by the table's full name.

        Returns:
            None if not all of them are known; so is that of a table that was emptied by TRUNCATE.
        """
        if self._since is None or self._since > since:
            return None
        found: dict[str, list[RowList] | None] = {table: None for table, lsn in self._emptied.items() if lsn >= since}
        for source, (_, rows) in self._found.items():
            if (lists := found.setdefault(source.shape.table.fullname, [])) is None:
                continue
            some = [tuple(row.split(_ZERO)) for row, lsn in rows.items() if lsn >= since]
            columns = tuple(source.names[at] for at in _identifying(source))
            lists.append(RowList(columns, bool(source.match_at), some))
        return found

    def _of(self, source: Source) -> tuple[Callable[[Sequence[Value]], bytes], _Identities]:
        had = self._found.get(source)
        if had is None:
            had = self._found[source] = _reader(_identifying(source)), {}
        return had


def _reader(places: Sequence[int]) -> Callable[[Sequence[Value]], bytes]:
    get: Callable[[Sequence[Value]], Any] = itemgetter(*places)
    if len(places) == 1:
        return get
    join = _ZERO.join
    return lambda values: join(get(values))


def _identifying(source: Source) -> tuple[int, ...]:
    """Where the columns of a row's identity are; without one, those of its shard key."""
    return source.match_at or source.key_at
