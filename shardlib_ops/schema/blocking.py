"""The schema manager for scripts: the same coroutines, run to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sqlalchemy import MetaData

from shardlib_ops.schema.model import Applied, SchemaStatus, Script

if TYPE_CHECKING:
    from shardlib_ops.schema.manager import SchemaManager

__all__ = ["BlockingSchemaManager"]

T = TypeVar("T")


class BlockingSchemaManager:
    """`SchemaManager`, without `await`: `SchemaManager.sync(url)` makes one.

    Use it as a context manager, or `close()` it. Not for code that runs in an event loop.
    """

    def __init__(self, manager: SchemaManager) -> None:
        self._manager = manager
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)

    def close(self) -> None:
        """As `SchemaManager.close`."""
        self._run(self._manager.close())
        self._runner.close()

    def apply(self, revision: str = "heads", **options: Any) -> Applied:
        """As `SchemaManager.apply`."""
        return self._run(self._manager.apply(revision, **options))

    def stamp(self, revision: str, *, shards: Sequence[str] = (), wait_s: float = 0.0) -> tuple[str, ...]:
        """As `SchemaManager.stamp`."""
        return self._run(self._manager.stamp(revision, shards=shards, wait_s=wait_s))

    def sql(self, revision: str = "heads") -> tuple[Script, ...]:
        """As `SchemaManager.sql`."""
        return self._run(self._manager.sql(revision))

    def status(self, *, metadata: MetaData | None = None) -> SchemaStatus:
        """As `SchemaManager.status`."""
        return self._run(self._manager.status(metadata=metadata))
