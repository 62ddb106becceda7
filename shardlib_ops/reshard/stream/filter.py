"""Of a stream of messages, the changes that concern a leg: of its tables, of its token ranges, not yet applied.

A key is hashed where it stands in the message; the row around it is read only if it moves.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from shardlib.ring import TokenRange, merge_ranges
from shardlib.token import hash_of
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.stream.decode import (
    BODY,
    UNCHANGED,
    Relation,
    Value,
    lsn_text,
    malformed,
    read_begin,
    read_commit,
    read_field,
    read_message,
    read_relation,
    read_truncate,
    read_tuple,
)
from shardlib_ops.reshard.stream.faults import CannotFollow, SchemaChanged

__all__ = ["DELETE", "INSERT", "TRUNCATE", "UPDATE", "Change", "Filter", "Source", "Transaction", "mover"]

INSERT: Final = 0x49
UPDATE: Final = 0x55
DELETE: Final = 0x44
TRUNCATE: Final = 0x54

_ROWS: Final = frozenset({INSERT, UPDATE, DELETE})
_BEGIN: Final = 0x42
_COMMIT: Final = 0x43
_RELATION: Final = 0x52
_MESSAGE: Final = 0x4D
_ORIGIN: Final = 0x4F
_TYPE: Final = 0x59
_NEW: Final = 0x4E
_OLD_WHOLE: Final = 0x4F
_OLD_KEY: Final = 0x4B

_PREFIX: Final = "shardlib"
_ZERO: Final = b"\0"


def mover(ranges: Iterable[TokenRange], hash_function: str) -> Callable[[bytes], bool]:
    """Whether key bytes are of these ranges: the first 16 bits of the token tell it nearly always, by one look-up.

    Raises:
        InvalidArgument: there is no such hash function.
    """
    digest, merged = hash_of(hash_function), merge_ranges(ranges)
    bounds = [bound for first, last in merged for bound in (first, last + 1)]
    table = bytearray(1 << 16)
    for prefix in range(1 << 16):
        first = prefix << 48
        inside, after = bisect_right(bounds, first), bisect_right(bounds, first | 0xFFFF_FFFF_FFFF)
        table[prefix] = inside & 1 if inside == after else 2
    whole = bytes(table)

    def moves(key: bytes) -> bool:
        token = digest(key)
        told = whole[token >> 48]
        return told == 1 or (told == 2 and bisect_right(bounds, token) & 1 == 1)

    return moves


@dataclass(eq=False, slots=True)
class Source:
    """A table of the stream as its last announcement has it.

    Attributes:
        shape: as the job knows it.
        relation: the announcement.
        names: of the columns, in the order of the values.
        key_at: where the parts of the shard key are among them.
        identity_at: where the columns of the old row's image are.
        full: whether that image is whole.
        first: transactions whose commit record begins before this LSN are in the copy of this table already.
    """

    shape: TableShape
    relation: Relation
    names: tuple[str, ...]
    key_at: tuple[int, ...]
    identity_at: tuple[int, ...]
    full: bool
    first: int

    @property
    def match_at(self) -> tuple[int, ...]:
        """Where the columns that tell one row from all others are; empty for a bag, where equal rows are alike."""
        return tuple(map(self.names.index, self.shape.primary_key)) if self.full else self.identity_at

    def key(self, values: Sequence[Value]) -> bytes | None:
        """The key bytes of a row; None if a part is NULL or not carried."""
        parts = [values[at] for at in self.key_at]
        return _ZERO.join(parts) if all(part.__class__ is bytes for part in parts) else None  # type: ignore[arg-type]


Change = tuple[int, Source, list[Value] | None, list[Value] | None]
"""(INSERT, UPDATE, DELETE or TRUNCATE; table; old row, or of it the identity; new row)."""


@dataclass(eq=False, slots=True)
class Transaction:
    """A transaction of the origin, or a part of a large one.

    Attributes:
        commit: LSN at which its commit record begins.
        end: LSN just after its commit record; None while more of it is to come.
        changes: those that concern the leg, in order.
        keys: key bytes of the rows in them.
        messages: the contents of the logical messages in it.
        size: about how many bytes of rows it holds.
    """

    commit: int
    end: int | None = None
    changes: list[Change] = field(default_factory=list)
    keys: dict[bytes, None] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    size: int = 0


class Filter:
    """Turns messages into transactions of what concerns a leg.

    Args:
        shapes: every table of the publication.
        moves: whether key bytes are of the leg's ranges.
        columns: (schema, table) -> (name, type oid, modifier) of its columns at the origin, when the stream starts.
        position: transactions that end at or before this LSN are applied already.
        copied: (schema, table) -> LSN: what committed before it is in the copy.
        limit: changes after which a transaction is given out in parts.
        limit_bytes: the same for the bytes of its rows.
    """

    def __init__(
        self,
        shapes: Iterable[TableShape],
        moves: Callable[[bytes], bool],
        *,
        columns: Mapping[tuple[str, str], Sequence[tuple[str, int, int]]],
        position: int,
        copied: Mapping[tuple[str, str], int],
        limit: int,
        limit_bytes: int,
    ) -> None:
        self._shapes = {(shape.table.schema or "public", shape.table.name): shape for shape in shapes}
        self._moves, self._columns, self._position, self._copied = moves, columns, position, copied
        self._limit, self._limit_bytes = limit, limit_bytes
        self._sources: dict[bytes, Source] = {}
        self._foreign: dict[bytes, str] = {}
        self._open: Transaction | None = None
        self._skipping = self._parted = False
        self._ready: list[Transaction] = []
        self.complete = position
        """Everything of transactions that end at or before this LSN was given out."""

    @property
    def between(self) -> bool:
        """Whether no transaction is under way."""
        return self._open is None

    def feed(self, messages: Iterable[bytes]) -> None:
        """Take `w` messages, in their order.

        Raises:
            SchemaChanged: a table is not any more what `columns` says, or is none of the shapes.
            CannotFollow: a row comes into the ranges and a value of it is not in the stream.
            MalformedStream: it cannot be read.
        """
        message = b""
        sources = self._sources
        try:
            for message in messages:
                kind = message[BODY]
                if kind not in _ROWS:
                    self._event(kind, message)
                elif not self._skipping:
                    source, transaction = sources.get(message[26:30]), self._open
                    if source is None or transaction is None:
                        self._unknown(message, message[26:30])
                    if transaction.commit >= source.first:
                        if message[30] == _NEW:
                            self._placed(kind, message, source, transaction)
                        elif kind == UPDATE:
                            self._update(message, source, transaction)
                        else:
                            self._delete(message, source, transaction)
        except (IndexError, ValueError, struct.error) as error:
            raise malformed(message, str(error)) from error

    def at_rest(self, lsn: int) -> None:
        """The origin has sent everything up to this LSN."""
        if self._open is None and lsn > self.complete:
            self.complete = lsn

    def _event(self, kind: int, message: bytes) -> None:
        if kind == _BEGIN:
            self._open = Transaction(read_begin(message))
            self._skipping = self._open.commit < self._position
        elif kind == _COMMIT:
            self._commit(read_commit(message))
        elif kind == _RELATION:
            self._announced(read_relation(message))
        elif kind == _MESSAGE:
            self._told(message)
        elif kind == TRUNCATE:
            self._truncated(message)
        elif kind not in (_ORIGIN, _TYPE):
            raise malformed(message, "it is of a kind that was not asked for")

    def _placed(self, kind: int, message: bytes, source: Source, transaction: Transaction) -> None:
        """An INSERT, or an UPDATE that leaves the identity, hence the key, as it was."""
        key_at = source.key_at
        if len(key_at) == 1:
            key = read_field(message, 31, key_at[0])
            if key.__class__ is not bytes or not self._moves(key):
                if key is UNCHANGED:
                    raise malformed(message, "the shard key is not in it")
                return
            new, end = read_tuple(message, 31)
        else:
            new, end = read_tuple(message, 31)
            key = source.key(new)
            if key is None or not self._moves(key):
                if any(new[at] is UNCHANGED for at in key_at):
                    raise malformed(message, "the shard key is not in it")
                return
        if end != len(message) or len(new) != len(source.names):
            raise malformed(message, "its row has another length")
        for at in source.identity_at:
            if new[at] is UNCHANGED:
                raise malformed(message, "the identity of the row is not in it")
        transaction.keys[key] = None
        changes = transaction.changes
        changes.append((kind, source, None, new))
        transaction.size += end
        if len(changes) >= self._limit or transaction.size >= self._limit_bytes:
            self._part(transaction)

    def _update(self, message: bytes, source: Source, transaction: Transaction) -> None:
        old, at = self._old(message, source)
        if message[at] != _NEW:
            raise malformed(message, "no new row after the old one")
        new, end = read_tuple(message, at + 1)
        if end != len(message) or len(new) != len(old):
            raise malformed(message, "its row has another length")
        for index in range(len(new)) if source.full else source.identity_at:
            if new[index] is UNCHANGED:
                new[index] = old[index]
        before, after = source.key(old), source.key(new)
        leaves = before is not None and self._moves(before)
        comes = after is not None and self._moves(after)
        if leaves:
            transaction.keys[before] = None  # type: ignore[index]
        if comes:
            transaction.keys[after] = None  # type: ignore[index]
        if leaves and comes:
            self._add(transaction, (UPDATE, source, old, new), end)
        elif leaves:
            self._add(transaction, (DELETE, source, old, None), end)
        elif comes:
            missing = [source.names[index] for index, value in enumerate(new) if value is UNCHANGED]
            if missing:
                raise CannotFollow(
                    f"an UPDATE of table {source.shape.table.fullname!r} gave a row a shard key of the moving ranges,"
                    f" and its unchanged column {missing[0]!r} is not in the stream",
                    "copy anew, with ALTER TABLE … REPLICA IDENTITY FULL on it if such updates are usual",
                )
            self._add(transaction, (INSERT, source, None, new), end)

    def _delete(self, message: bytes, source: Source, transaction: Transaction) -> None:
        old, end = self._old(message, source)
        if end != len(message):
            raise malformed(message, "bytes after its row")
        key = source.key(old)
        if key is not None and self._moves(key):
            transaction.keys[key] = None
            self._add(transaction, (DELETE, source, old, None), end)

    def _old(self, message: bytes, source: Source) -> tuple[list[Value], int]:
        if message[30] not in (_OLD_KEY, _OLD_WHOLE):
            raise malformed(message, "it has no old row")
        old, at = read_tuple(message, 31)
        if len(old) != len(source.names):
            raise malformed(message, f"{len(old)} columns, not {len(source.names)}")
        return old, at

    def _add(self, transaction: Transaction, change: Change, size: int) -> None:
        changes = transaction.changes
        changes.append(change)
        transaction.size += size
        if len(changes) >= self._limit or transaction.size >= self._limit_bytes:
            self._part(transaction)

    def _part(self, transaction: Transaction) -> None:
        self._ready.append(transaction)
        self._open, self._parted = Transaction(transaction.commit), True

    def _commit(self, end: int) -> None:
        transaction = self._open
        if transaction is None:
            raise ValueError("a transaction ends that did not begin")
        self._open = None
        self.complete = max(self.complete, end)
        if self._skipping:
            self._skipping = False
            return
        transaction.end = end
        if transaction.changes or transaction.messages or self._parted:
            self._ready.append(transaction)
        self._parted = False

    def take(self) -> list[Transaction]:
        """What was found since the last call. A part of a large transaction has no `end`; its rest follows it."""
        taken, self._ready = self._ready, []
        return taken

    def _told(self, message: bytes) -> None:
        transactional, lsn, prefix, content = read_message(message)
        if prefix != _PREFIX or self._skipping:
            return
        text = content.decode()
        if transactional and self._open is not None:
            self._open.messages.append(text)
        else:
            self._ready.append(Transaction(lsn, lsn, messages=[text]))

    def _truncated(self, message: bytes) -> None:
        if self._skipping:
            return
        for oid in read_truncate(message):
            source = self._sources.get(oid)
            if source is None or self._open is None:
                self._unknown(message, oid)
            if self._open.commit >= source.first:
                self._add(self._open, (TRUNCATE, source, None, None), 0)

    def _unknown(self, message: bytes, oid: bytes) -> NoReturn:
        if oid not in self._foreign:
            raise malformed(message, "its table was not announced, or no transaction began")
        raise SchemaChanged(
            f"the stream has changes of table {self._foreign[oid]!r}, which is none of the job's tables",
            "if one of them was renamed, rename it back; otherwise cancel the job and start it again",
        )

    def _announced(self, relation: Relation) -> None:
        place = (relation.schema or "pg_catalog", relation.name)
        shape, known = self._shapes.get(place), self._columns.get(place)
        had = self._sources.get(relation.oid)
        if had is not None and had.relation == relation:
            return
        if shape is None or known is None:
            # A partition is announced beside its table, and never has changes of its own.
            self._sources.pop(relation.oid, None)
            self._foreign[relation.oid] = ".".join(place)
            return
        told = [(column.name, column.type_oid, column.modifier) for column in relation.columns]
        if told != list(known):
            raise SchemaChanged(
                f"table {shape.table.fullname!r} was changed while its rows move: {_difference(known, told)}"
                f" (seen before LSN {lsn_text(self.complete)})",
                "cancel the job and start it again with the new tables, or undo the change and run it again",
            )
        names = tuple(column.name for column in relation.columns)
        self._sources[relation.oid] = Source(
            shape=shape,
            relation=relation,
            names=names,
            key_at=tuple(names.index(part) for part in shape.table.key),
            identity_at=tuple(index for index, column in enumerate(relation.columns) if column.identity),
            full=relation.full,
            first=self._copied.get(place, 0),
        )


def _difference(known: Sequence[tuple[str, int, int]], told: Sequence[tuple[str, int, int]]) -> str:
    before, after = {name: kind for name, *kind in known}, {name: kind for name, *kind in told}
    parts = [f"column {name!r} is there now and was not in the stream's time" for name in before if name not in after]
    parts += [f"column {name!r} is in the stream and not in the table" for name in after if name not in before]
    parts += [f"column {name!r} has another type" for name in before if after.get(name, before[name]) != before[name]]
    return "; ".join(parts) or "the order of its columns"
