"""The audit log in the catalog: one document for each entry, `audit/000000000042`.

An entry is a document that must not be there yet: by that compare-and-swap one writer has the place. Finding the end
costs the same however long the log is: a writer remembers where it was and looks at what came since, and one that has
just started begins at a mark (`audit-head`), which is written every now and then.

A document whose place was cut stays, empty: a writer that has slept for long must not find the place free.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import Final

import msgspec

from shardlib.catalog import Catalog, Conflict, Document
from shardlib.catalog.store import Deadline
from shardlib.errors import CatalogUnavailable
from shardlib_ops.audit.base import PAGE, Page
from shardlib_ops.audit.entry import GENESIS, SEQ_MAX, Damaged, Draft, Entry, Head, decode, encode, seal
from shardlib_ops.audit.errors import AuditUnavailable

__all__ = ["CatalogAudit"]

_log = logging.getLogger("shardlib.ops.audit")
_MARK: Final = "audit-head"
_MARK_EVERY: Final = 32
_HUNDRED: Final = 100
_PAUSE_FIRST_S: Final = 0.005
_PAUSE_MAX_S: Final = 0.25


class _Mark(msgspec.Struct, frozen=True):
    """How far the log was when this was written, and where it begins since it was cut."""

    seq: int = 0
    hash: str = GENESIS.hash
    first: int = 1


class CatalogAudit:
    """The log `catalog:`.

    Args:
        catalog: whoever hands it in closes it. Its time limit is that of each step.
        timeout_s: longest time for an append against others that append.
    """

    def __init__(self, catalog: Catalog, *, timeout_s: float = 10.0) -> None:
        self.safe_url = f"catalog:{catalog.safe_url}"
        self._catalog, self._timeout_s = catalog, timeout_s
        self._lock = threading.Lock()
        self._known: Head | None = None
        self._marked = 0

    def append(self, new: Draft) -> Entry:
        """See `AuditStore.append`."""
        deadline = Deadline(self._timeout_s)
        if not self._lock.acquire(timeout=self._timeout_s):
            raise AuditUnavailable(self.safe_url, f"other entries were waited for, {self._timeout_s:g} s")
        try:
            entry = self._append(new, deadline)
            self._known = entry.head
        finally:
            self._lock.release()
        if entry.seq - self._marked >= _MARK_EVERY:
            self._mark(entry.head)
        return entry

    def _append(self, new: Draft, deadline: Deadline) -> Entry:
        """Take the next place, for as long as there is time.

        A write whose outcome is unknown is made again, in the same place and with the same bytes: it happens once at
        most, and is known when it is found there.
        """
        pause_s = _PAUSE_FIRST_S
        entry: Entry | None = None
        while True:
            try:
                entry = entry or seal(new, self._known or self._end())
                if self._placed(entry):
                    return entry
                entry, reason = None, f"others took each place for {self._timeout_s:g} s"
            except CatalogUnavailable as error:
                if error.final:
                    raise AuditUnavailable(self.safe_url, error.reason) from error
                reason = error.reason
            if deadline.left() < pause_s:
                raise AuditUnavailable(self.safe_url, reason)
            time.sleep(pause_s * random.random())  # noqa: S311 - jitter
            pause_s = min(_PAUSE_MAX_S, pause_s * 2)

    def _placed(self, entry: Entry) -> bool:
        """Whether an entry has its place. If another has it, the end has been looked for anew."""
        data = encode(entry)
        try:
            self._catalog.write_document(_name(entry.seq), data, expected=None)
        except Conflict:
            there = self._catalog.read_document(_name(entry.seq))
            if there is None or there.data != data:
                self._known = self._forward(Head(entry.seq - 1, entry.prev))
                return False
        return True

    def head(self) -> Head:
        """See `AuditStore.head`."""
        try:
            return self._forward(self._known or self._end())
        except CatalogUnavailable as error:
            raise AuditUnavailable(self.safe_url, error.reason) from error

    def read(self, after: int = 0, limit: int = PAGE) -> Page:
        """See `AuditStore.read`. A place is the number of an entry."""
        try:
            mark, _ = self._read_mark()
            after = max(after, mark.first - 1)
            items: list[Entry | Damaged] = []
            while True:
                hundred, found = (after + 1) // _HUNDRED, self._hundred(after + 1)
                taken = [seq for seq in found if seq > after]
                items += [_entry(found[seq], seq) for seq in taken if found[seq].data]
                # One that stands full, or beyond which the log was seen, is followed by another.
                last = hundred * _HUNDRED + _HUNDRED - 1
                if max(taken, default=after) < last and mark.seq <= last:
                    return Page(tuple(items), max(taken, default=after), more=False)
                after = last
                if len(items) >= limit:
                    return Page(tuple(items), after, more=True)
        except CatalogUnavailable as error:
            raise AuditUnavailable(self.safe_url, error.reason) from error

    def last(self, limit: int) -> Page:
        """See `AuditStore.last`."""
        page = self.read(max(0, self.head().seq - limit), limit)
        return page._replace(items=page.items[-limit:])

    def cut(self, through: int) -> int:
        """See `AuditStore.cut`. Each document is emptied; its name and about 60 bytes of it stay."""
        try:
            mark, _ = self._read_mark()
            count, seq = 0, mark.first
            while seq <= through:
                for number, document in self._hundred(seq).items():
                    if number <= through and document.data:
                        self._empty(number, document.revision)
                        count += 1
                seq = (seq // _HUNDRED + 1) * _HUNDRED
            self._mark(self._forward(self._known or self._end()), first=through + 1)
        except CatalogUnavailable as error:
            raise AuditUnavailable(self.safe_url, error.reason) from error
        return count

    def _empty(self, seq: int, revision: int) -> None:
        try:
            self._catalog.write_document(_name(seq), b"", expected=revision)
        except Conflict:
            pass  # another archive cuts the same: nobody else writes a document that is there

    def close(self) -> None:
        """See `AuditStore.close`. Leaves a mark, so that the next one finds the end at once."""
        with self._lock:
            known = self._known
        if known is not None and known.seq > self._marked:
            self._mark(known)

    def _hundred(self, seq: int) -> dict[int, Document]:
        """The documents among whose numbers `seq` is, by number: those that differ in the last two digits only."""
        found = self._catalog.list_documents(_name(seq)[:-2])
        return {number: document for name, document in found.items() if (number := _number(name)) is not None}

    def _forward(self, head: Head) -> Head:
        """The end, looked for from a place that was the end once."""
        while True:
            found = [(seq, one) for seq, one in self._hundred(head.seq + 1).items() if seq > head.seq]
            if not found:
                return head
            seq, document = found[-1]
            head = Head(seq, _entry(document, seq).hash)

    def _end(self) -> Head:
        """The end, from the mark; without one by a search that doubles its steps.

        A log that is shorter than its mark says was cut: it goes on after the mark, and what is missing stays missing.
        """
        mark, _ = self._read_mark()
        if mark.seq:
            self._marked = mark.seq
            there = self._catalog.read_document(_name(mark.seq))
            return self._forward(Head(mark.seq, _entry(there, mark.seq).hash if there else mark.hash))
        low, high = 0, 1
        while high < SEQ_MAX and self._catalog.read_document(_name(high)) is not None:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            taken = self._catalog.read_document(_name(middle)) is not None
            low, high = (middle, high) if taken else (low, middle)
        if not low:
            return GENESIS
        document = self._catalog.read_document(_name(low))
        head = GENESIS if document is None else Head(low, _entry(document, low).hash)
        return self._forward(head)

    def _read_mark(self) -> tuple[_Mark, int | None]:
        document = self._catalog.read_document(_MARK)
        if document is None:
            return _Mark(), None
        try:
            return msgspec.json.decode(document.data, type=_Mark), document.revision
        except msgspec.MsgspecError:
            _log.warning("the document %s of %s cannot be read; it is written anew", _MARK, self.safe_url)
            return _Mark(), document.revision

    def _mark(self, head: Head, first: int = 0) -> None:
        """Say how far the log is. It never goes back; a failure costs the next one a longer search only."""
        try:
            old, revision = self._read_mark()
            new = _Mark(head.seq, head.hash) if head.seq > old.seq else old
            new = msgspec.structs.replace(new, first=max(old.first, first))
            if new != old:
                self._catalog.write_document(_MARK, msgspec.json.encode(new), expected=revision)
            self._marked = new.seq
        except Conflict:
            pass  # another writer has just said it
        except CatalogUnavailable as error:
            _log.info("the mark of the audit log stays behind: %s", error.reason)


def _name(seq: int) -> str:
    return f"audit/{seq:012d}"


def _number(name: str) -> int | None:
    digits = name.rpartition("/")[2]
    return int(digits) if len(digits) == 12 and digits.isascii() and digits.isdigit() else None


def _entry(document: Document, seq: int) -> Entry | Damaged:
    return decode(document.data, seq)
