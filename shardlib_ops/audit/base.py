"""The contract between the audit log and the place where it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

from shardlib_ops.audit.entry import Damaged, Draft, Entry, Head

__all__ = ["PAGE", "AuditStore", "Page", "walk"]

PAGE: Final = 500
"""Entries that are read at a time unless somebody says otherwise."""


class Page(NamedTuple):
    """A part of the log, in the order of its places."""

    items: tuple[Entry | Damaged, ...]
    after: int
    """Give it to `read` for what comes next."""
    more: bool
    """Whether something may come next now."""


class AuditStore(Protocol):
    """Where the entries are. Every method blocks, and every method may be called from any thread.

    `append` is the only way in, and nothing is ever changed. Of any number of writers, in any number of processes,
    one takes a place: the others take the next. So the chain has no forks.
    """

    safe_url: str
    """The URL without secrets, for messages."""

    def append(self, new: Draft) -> Entry:
        """Store an entry at the end, durably. Its cost does not grow with the log.

        A lost reply is settled by reading back.

        Raises:
            AuditUnavailable: it is not known to be stored. It may be.
        """
        ...

    def head(self) -> Head:
        """The end of the log, of number 0 if it is empty.

        Raises:
            AuditUnavailable: no answer.
        """
        ...

    def read(self, after: int = 0, limit: int = PAGE) -> Page:
        """What comes after a place: 0 for the beginning, else `after` of the page before.

        Args:
            after: where to go on.
            limit: entries in the page, about.

        Raises:
            AuditUnavailable: no answer.
        """
        ...

    def last(self, limit: int) -> Page:
        """The newest entries, at most so many, oldest first.

        Raises:
            AuditUnavailable: no answer.
        """
        ...

    def cut(self, through: int) -> int:
        """Let go of the content of the entries up to a number, which must not be the newest. See `archive`.

        Returns how many there were. What was interrupted is completed by the same again.

        Raises:
            AuditUnavailable: no answer; some may be gone.
        """
        ...

    def close(self) -> None:
        """Close what was opened; idempotent. A catalog that was handed in stays open."""
        ...


def walk(store: AuditStore, after: int = 0) -> Iterator[Entry | Damaged]:
    """Everything after a place, page by page.

    Raises:
        AuditUnavailable: no answer.
    """
    while True:
        page = store.read(after)
        yield from page.items
        if not page.more:
            return
        after = page.after
