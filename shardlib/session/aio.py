"""The asyncio face of a sharded session. Nothing is decided here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncSession

from shardlib.session.core import core_of
from shardlib.session.session import ShardedSession

if TYPE_CHECKING:
    from shardlib.engine.aio import AsyncShardedEngine

__all__ = ["AsyncShardedSession"]


class AsyncShardedSession(AsyncSession):
    """SQLAlchemy's `AsyncSession` around a `ShardedSession`: the same arguments, the same names, awaited."""

    sync_session_class = ShardedSession
    sync_session: ShardedSession

    def __init__(self, bind: Any = None, *, engine: AsyncShardedEngine | None = None, **kw: Any) -> None:
        inner = getattr(engine, "sync_engine", None)
        core_of(inner, bind, kw.pop("binds", None), given=engine)
        super().__init__(None, sync_session_class=ShardedSession, engine=inner, **kw)
