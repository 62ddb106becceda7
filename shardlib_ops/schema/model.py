"""What is told of the tables of all shards."""

from __future__ import annotations

from dataclasses import dataclass

from shardlib_ops.reshard.schema.change import Change

__all__ = ["Applied", "SchemaStatus", "Script", "ShardRevision"]


@dataclass(frozen=True, slots=True)
class ShardRevision:
    """One shard.

    Attributes:
        id: the shard's.
        name: the shard's.
        revision: what its tables are at; empty if no migration was ever applied there.
        tables: whether it has any; a shard that owns nothing yet may have none.
        error: why the rest is not known.
    """

    id: str
    name: str
    revision: tuple[str, ...] = ()
    tables: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SchemaStatus:
    """All shards.

    Attributes:
        heads: the newest revisions among the migration files; empty if these are not here.
        shards: each of them, in the order in which they were made.
        drift: where their tables differ, a line each.
        unlike_metadata: where they are not as the metadata says; empty without metadata.
        unknown: tables that are on the shards, and that the cluster does not know.
        not_compared: shards that were left out of `drift`, and why.
        change: the last change of all shards, None if there was none.
    """

    heads: tuple[str, ...]
    shards: tuple[ShardRevision, ...]
    drift: tuple[str, ...] = ()
    unlike_metadata: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()
    change: Change | None = None

    @property
    def at_one_revision(self) -> bool:
        """Whether every shard that has tables is at one revision, and at the newest if that is known."""
        found = {shard.revision for shard in self.shards if shard.tables or shard.revision}
        return not any(shard.error for shard in self.shards) and found <= (
            {self.heads} if self.heads else set(list(found)[:1])
        )


@dataclass(frozen=True, slots=True)
class Applied:
    """What a change has done.

    Attributes:
        target: the revisions that every shard has now.
        changed: names of the shards that were changed.
        unchanged: names of those that had it already.
        registered: tables that the cluster knows since.
        unknown: tables that are on the shards and that the cluster does not know.
    """

    target: tuple[str, ...]
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    registered: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Script:
    """What an upgrade would run.

    Attributes:
        shards: names of the shards that are at one revision.
        start: that revision; empty: nothing yet.
        sql: the statements; empty if nothing is to be done.
    """

    shards: tuple[str, ...]
    start: tuple[str, ...]
    sql: str
