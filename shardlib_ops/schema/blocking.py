"""The schema manager for scripts: the same coroutines, run to their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import MetaData

from shardlib_ops.manager.blocking import Blocking
from shardlib_ops.schema.model import Applied, SchemaStatus, Script

if TYPE_CHECKING:
    from shardlib_ops.schema.manager import SchemaManager, Told  # noqa: F401 - of `Blocking["SchemaManager"]`

__all__ = ["BlockingSchemaManager"]


class BlockingSchemaManager(Blocking["SchemaManager"]):
    """`SchemaManager`, without `await`: `SchemaManager.sync(url)` makes one.

    Use it as a context manager, or `close()` it. Not for code that runs in an event loop.
    """

    def apply(
        self,
        revision: str = "heads",
        *,
        metadata: MetaData | None = None,
        parallel: int = 1,
        lock_timeout_s: float = 1.0,
        lock_wait_s: float = 60.0,
        wait_s: float = 0.0,
        on_shard: Told | None = None,
    ) -> Applied:
        """As `SchemaManager.apply`; `on_shard` is a coroutine function here too."""
        return self._run(
            self._manager.apply(
                revision,
                metadata=metadata,
                parallel=parallel,
                lock_timeout_s=lock_timeout_s,
                lock_wait_s=lock_wait_s,
                wait_s=wait_s,
                on_shard=on_shard,
            )
        )

    def stamp(self, revision: str, *, shards: Sequence[str] = (), wait_s: float = 0.0) -> tuple[str, ...]:
        """As `SchemaManager.stamp`."""
        return self._run(self._manager.stamp(revision, shards=shards, wait_s=wait_s))

    def sql(self, revision: str = "heads") -> tuple[Script, ...]:
        """As `SchemaManager.sql`."""
        return self._run(self._manager.sql(revision))

    def status(self, *, metadata: MetaData | None = None) -> SchemaStatus:
        """As `SchemaManager.status`."""
        return self._run(self._manager.status(metadata=metadata))
