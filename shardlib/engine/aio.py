"""The asyncio face of a sharded engine: what does I/O is awaited, what reads memory is not."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from inspect import isawaitable
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Engine, MetaData
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker
from sqlalchemy.util import greenlet_spawn

from shardlib.engine.bulk import BulkProgress, BulkResult, bulk_load
from shardlib.engine.engine import _NO_KEY, ShardedEngine
from shardlib.engine.pinned import PinnedEngine
from shardlib.errors import InvalidArgument, ShardKeyRequired, StaleTopology
from shardlib.fence.gated import Tally
from shardlib.key import encode_key
from shardlib.route.consistency import Consistency
from shardlib.route.retry import next_wait
from shardlib.session.aio import AsyncShardedSession
from shardlib.session.settling import Settled
from shardlib.shard import PoolStats
from shardlib.topology import Shard, Topology

__all__ = ["AsyncShardedEngine"]

T = TypeVar("T")


class _Inner(ShardedEngine):
    """A sharded engine whose pools hold asyncio connections; used inside SQLAlchemy's greenlets only."""

    _is_async = True


class AsyncShardedEngine:
    """A `ShardedEngine` for asyncio: the same arguments, the same names, awaited.

    ::

        engine = AsyncShardedEngine("etcd://127.0.0.1:2379/shop")
        async with engine.session("tenant-42") as session:
            session.add(Order(tenant_id="tenant-42", id=1))
            await session.commit()

    The constructor reads the first topology and so blocks for a moment, as an import does; `await
    AsyncShardedEngine.open(url)` does it in a thread.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.sync_engine: ShardedEngine = _Inner(url, **options)

    @classmethod
    async def open(cls, url: str, **options: Any) -> Self:
        """The engine, its first topology read without blocking the event loop.

        If it is cancelled, the engine is disposed as soon as it is there.
        """
        lock, wanted, built = threading.Lock(), True, list[Self]()

        def build() -> None:
            engine = cls(url, **options)
            with lock:
                if wanted:
                    built.append(engine)
                    return
            engine.sync_engine.dispose()  # has opened no connection yet, which would need its loop

        try:
            await asyncio.to_thread(build)
        except BaseException:
            with lock:
                wanted = False
            if built:  # it was on its way to us
                asyncio.get_running_loop().run_in_executor(None, built[0].sync_engine.dispose)
            raise
        return built[0]

    @property
    def topology(self) -> Topology:
        """The immutable snapshot that routes now."""
        return self.sync_engine.topology

    @property
    def consistency(self) -> Consistency:
        """How fresh reads must be unless a session or statement says otherwise."""
        return self.sync_engine.consistency

    def token(self, shard_key: object) -> int:
        """The unsigned 64-bit token of a shard key."""
        return self.sync_engine.token(shard_key)

    def shard_for(self, shard_key: object) -> Shard:
        """The shard that owns a key by the topology in memory."""
        return self.sync_engine.shard_for(shard_key)

    def pool_status(self) -> list[PoolStats]:
        """See `ShardedEngine.pool_status`."""
        return self.sync_engine.pool_status()

    def metrics(self) -> str:
        """See `ShardedEngine.metrics`."""
        return self.sync_engine.metrics()

    def session(self, shard_key: object = _NO_KEY, **options: Any) -> AsyncShardedSession:
        """See `ShardedEngine.session`."""
        if shard_key is not _NO_KEY:
            options["shard_key"] = shard_key
        return AsyncShardedSession(engine=self, **options)

    def sessionmaker(self, **options: Any) -> async_sessionmaker[AsyncShardedSession]:
        """A SQLAlchemy `async_sessionmaker` of `AsyncShardedSession`."""
        return async_sessionmaker(class_=AsyncShardedSession, engine=self, **options)

    def connect(self, shard_key: object = _NO_KEY) -> AsyncConnection:
        """A Core connection to the shard that owns the key: await it, or use it in `async with`."""
        if shard_key is _NO_KEY:
            raise ShardKeyRequired(
                "a Core connection is one shard's", "write engine.connect(key), or use engine.session()"
            )
        pinned: Engine = PinnedEngine(self.sync_engine._core, encode_key(shard_key))  # noqa: SLF001 - its own inside
        return AsyncEngine(pinned).connect()

    @asynccontextmanager
    async def begin(self, shard_key: object = _NO_KEY) -> AsyncIterator[AsyncConnection]:
        """A Core connection in a transaction, committed at the end of the block; see `connect`."""
        async with self.connect(shard_key) as conn, conn.begin():
            yield conn

    async def run(
        self, work: Callable[[AsyncShardedSession], Awaitable[T]], *, shard_key: object = _NO_KEY, **options: Any
    ) -> T:
        """See `ShardedEngine.run`; `work` is a coroutine function."""
        attempt = 0
        while True:
            attempt += 1
            session = self.session(shard_key, **options)
            session.sync_session._tally = tally = Tally()  # noqa: SLF001 - our own class
            try:
                async with session:
                    running = work(session)
                    if not isawaitable(running):
                        raise InvalidArgument("work", work, "a coroutine function; a plain one needs ShardedEngine.run")
                    answer = await running
                    await session.commit()
                    return answer
            except Exception as error:
                if tally.kept:
                    raise  # a part of the work is there already
                policy = self.sync_engine.options.retry
                wait_s = next_wait(error, attempt, policy, random.uniform(0.5, 1.0))  # noqa: S311
                if wait_s is None:
                    raise
                if isinstance(error, StaleTopology):
                    self.sync_engine._cache.ask()  # noqa: SLF001 - its own inside; its watch may be cut off
                await asyncio.sleep(wait_s)  # the one wait outside shardlib.waits: it is the caller's own coroutine

    async def bulk_load(
        self,
        table: Any,
        rows: Iterable[Any] | AsyncIterable[Any],
        *,
        columns: Sequence[Any] | None = None,
        progress: Callable[[BulkProgress], object] | None = None,
        batch_rows: int | None = None,
        stall_timeout_s: float = 300.0,
    ) -> BulkResult:
        """See `ShardedEngine.bulk_load`; `rows` may be an async iterable, and `progress` a coroutine function.

        A cancellation leaves nothing committed, unless it comes between the commits; a note on it then tells.
        """
        return await greenlet_spawn(
            bulk_load, self.sync_engine._core, table, rows,  # noqa: SLF001 - its own inside
            columns=columns, progress=progress, batch_rows=batch_rows, stall_timeout_s=stall_timeout_s,
        )  # fmt: skip

    async def refresh(self) -> Topology:
        """See `ShardedEngine.refresh`."""
        return await asyncio.to_thread(self.sync_engine.refresh)

    async def create_all(self, metadata: MetaData, *, app_roles: Sequence[str] = (), checkfirst: bool = True) -> None:
        """See `ShardedEngine.create_all`."""
        await asyncio.to_thread(self.sync_engine.create_all, metadata, app_roles=app_roles, checkfirst=checkfirst)

    async def drop_all(self, metadata: MetaData, *, checkfirst: bool = True) -> None:
        """See `ShardedEngine.drop_all`."""
        await asyncio.to_thread(self.sync_engine.drop_all, metadata, checkfirst=checkfirst)

    async def register(self, metadata: MetaData) -> None:
        """See `ShardedEngine.register`."""
        await asyncio.to_thread(self.sync_engine.register, metadata)

    async def settle(self, *, older_than_s: float = 60.0) -> list[Settled]:
        """See `ShardedEngine.settle`."""
        return await asyncio.to_thread(self.sync_engine.settle, older_than_s=older_than_s)

    async def dispose(self) -> None:
        """Close every connection, the watch and the catalog; see `ShardedEngine.dispose`.

        A cancellation does not stop it: it is raised afterwards.
        """
        inner = self.sync_engine
        inner._leave()  # noqa: SLF001 - its own inside
        try:
            await asyncio.to_thread(inner._cache.close)  # noqa: SLF001 - waits for its threads
        finally:
            try:
                await greenlet_spawn(inner._close_pools)  # noqa: SLF001
            finally:
                await asyncio.to_thread(inner._catalog.close)  # noqa: SLF001 - waits for its threads, and for leases

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.dispose()

    def __repr__(self) -> str:
        return f"Async{self.sync_engine!r}".replace("_Inner", "ShardedEngine")
