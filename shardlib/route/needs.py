"""What a statement needs: the answer of extraction, read by the session on every statement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from sqlalchemy import Table

__all__ = ["Describe", "Needs", "Scope", "TableKey"]


class Scope(Enum):
    """How much of the cluster a statement touches."""

    KEYED = "keyed"
    """Only rows of the keys named in `Needs.keys`."""
    REFERENCE = "reference"
    """Reference tables only, or no table at all: any shard gives the answer."""
    SCAN = "scan"
    """Sharded tables without a key: every shard holds a part of the answer."""
    RAW = "raw"
    """Text, DDL or system tables: not understood, so only a session pinned to a shard may run it."""


class TableKey(Protocol):
    """How one table is placed: what `describe(table)` answers."""

    @property
    def key_names(self) -> tuple[str, ...]:
        """Names of the shard key's columns, in order; empty for a reference table."""

    @property
    def reference(self) -> bool:
        """Whether every shard holds the same full copy."""

    def encode(self, values: tuple[Any, ...], /) -> bytes:
        """Key bytes of one row's values, in the order of `key_names`; raises InvalidShardKey."""


class Describe(Protocol):
    """Answers how a table is placed; raises ShardKeyRequired for one that is neither sharded nor reference."""

    def __call__(self, table: Table, /) -> TableKey:
        """Return the placement of a table."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Which keys a statement touches, and whether concatenating the shards' rows answers it.

    Attributes:
        scope: see `Scope`.
        keys: unique key bytes in order of first appearance. KEYED with no key means that no row can match: any
            one shard gives the right answer.
        writes: INSERT, UPDATE or DELETE, also inside a CTE.
        tables: the sharded tables met.
        merge: None when the rows of the shards, each read once, put together in any order are the answer; else
            what would need a merge ("ORDER BY", "the aggregate max()", ...). It says nothing when one shard owns
            all keys.
        per_key_rows: for several rows or parameter sets, which of them (indexes) go to each key; else None. Each of
            them is for itself: `merge` then says nothing of the rows of several sets.
        together: beside `per_key_rows`, the keys that one row or set needs in one place, as what it writes follows
            from rows of all of them.
        calls: functions that are not PostgreSQL's own: each may be an aggregate, or read any rows of its shard.
    """

    scope: Scope
    keys: tuple[bytes, ...] = ()
    writes: bool = False
    tables: tuple[Table, ...] = ()
    merge: str | None = None
    per_key_rows: Mapping[bytes, tuple[int, ...]] | None = None
    together: tuple[tuple[bytes, ...], ...] = ()
    calls: tuple[str, ...] = ()
