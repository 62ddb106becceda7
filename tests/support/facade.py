"""One test body for both facades: the asyncio one runs it inside SQLAlchemy's greenlet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from shardlib import AsyncShardedEngine, ShardedEngine, ShardedSession

T = TypeVar("T")


class SyncFacade:
    """Runs bodies in sessions of a `ShardedEngine`."""

    name = "sync"

    def __init__(self, url: str, **options: Any) -> None:
        self.engine = ShardedEngine(url, **options)
        self.core = self.engine

    def session(self, body: Callable[[ShardedSession], T], *key: object, **options: Any) -> T:
        with self.engine.session(*key, **options) as session:
            return body(session)

    def connect(self, body: Callable[[Any], T], *key: object) -> T:
        with self.engine.connect(*key) as conn:
            return body(conn)

    def run(self, body: Callable[[ShardedSession], T], **options: Any) -> T:
        return self.engine.run(body, **options)

    def close(self) -> None:
        self.engine.dispose()


class AsyncFacade:
    """Runs the same bodies in sessions of an `AsyncShardedEngine`, on one event loop."""

    name = "asyncio"

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self.engine = AsyncShardedEngine(url, **options)
        self.core = self.engine.sync_engine

    def session(self, body: Callable[[ShardedSession], T], *key: object, **options: Any) -> T:
        async def work() -> T:
            async with self.engine.session(*key, **options) as session:
                return await session.run_sync(body)

        return self._runner.run(work())

    def connect(self, body: Callable[[Any], T], *key: object) -> T:
        async def work() -> T:
            async with self.engine.connect(*key) as conn:
                return await conn.run_sync(body)

        return self._runner.run(work())

    def run(self, body: Callable[[ShardedSession], T], **options: Any) -> T:
        async def work() -> T:
            async def unit(session: Any) -> T:
                return await session.run_sync(body)

            return await self.engine.run(unit, **options)

        return self._runner.run(work())

    def close(self) -> None:
        self._runner.run(self.engine.dispose())
        self._runner.close()
