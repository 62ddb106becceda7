"""A migration that came to nothing on a shard."""

from __future__ import annotations

from collections.abc import Sequence

from shardlib.errors import ShardlibError

__all__ = ["MigrationFailed"]


class MigrationFailed(ShardlibError):  # noqa: N818 - as the errors of shardlib are named
    """A shard refused a migration, and was left at the revision that it had; no other shard was begun after it.

    Args:
        shard: its name.
        reason: what the server or the migration said, without secrets.
        done: names of the shards that are at the target.
        left: names of the other shards.
        way_out: what to do.
    """

    def __init__(
        self, shard: str, reason: str, *, done: Sequence[str] = (), left: Sequence[str] = (), way_out: str = ""
    ) -> None:
        self.shard, self.reason, self.done, self.left = shard, reason, tuple(done), tuple(left)
        self.way_out = way_out or "mend the migration and run `schema apply` again: what is done is not done twice"
        super().__init__(
            f"shard {shard!r}: {reason} (done: {', '.join(self.done) or 'none'}; not done: "
            f"{', '.join(self.left) or 'none'}); {self.way_out}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (self.shard, self.reason, self.done, self.left, self.way_out)


def _rebuilt(shard: str, reason: str, done: Sequence[str], left: Sequence[str], way_out: str) -> MigrationFailed:
    return MigrationFailed(shard, reason, done=done, left=left, way_out=way_out)
