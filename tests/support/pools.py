"""Pools as an engine would hold them, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy import text
from sqlalchemy.util import greenlet_spawn

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.shard import PoolOptions, Role, ShardPools
from shardlib.waits import GreenletWaits, ThreadWaits, Waits
from tests.support.eventually import eventually


class Client:
    """Pools as an engine would hold them, and how to run a body that uses them."""

    def __init__(self, kind: str, endpoints: dict[str, str], **options: Any) -> None:
        self.is_async = kind == "asyncio"
        self.waits: Waits = GreenletWaits() if self.is_async else ThreadWaits()
        self.endpoints = dict(endpoints)
        self.connected: list[str] = []
        self.refuse: Exception | None = None
        self.hook: Callable[[Any, str], None] | None = None
        self.pools = ShardPools(
            self.waits,
            is_async=self.is_async,
            options=PoolOptions(**options),
            on_connect=self._on_connect,
            endpoint_of=self._endpoint_of,
            connection_class=psycopg.AsyncConnection if self.is_async else psycopg.Connection,
            name_of=lambda shard_id: f"shard-{shard_id}",
        )

    def _endpoint_of(self, shard_id: str, role: Role) -> Dsn:
        if shard_id not in self.endpoints:
            raise InvalidTopology(f"there is no shard {shard_id!r}", "look again")
        return Dsn(self.endpoints[shard_id])

    def _on_connect(self, driver: Any, shard_id: str) -> None:
        if self.refuse is not None:
            raise self.refuse
        if self.hook is not None:
            self.hook(driver, shard_id)
        self.connected.append(shard_id)

    def run(self, body: Callable[[], Any]) -> Any:
        return asyncio.run(greenlet_spawn(body)) if self.is_async else body()

    def pid(self, shard_id: str = "s1") -> int:
        with self.pools.engine(shard_id).connect() as conn:
            return int(conn.execute(text("SELECT pg_backend_pid()")).scalar_one())

    def figures(self, shard_id: str = "s1") -> tuple[int, int, int]:
        """Idle, in use, waiting."""
        it = next(stats for stats in self.pools.stats() if stats.shard == shard_id)
        return it.idle, it.in_use, it.waiting

    def eventually(
        self, condition: Callable[[], object], within_s: float, what: str, *, ignore: tuple[type[Exception], ...] = ()
    ) -> None:
        """As `tests.support.eventually`; other tasks of the loop go on meanwhile."""
        eventually(condition, within_s, what, ignore=ignore, sleep=self.waits.sleep)

    def side_by_side(self, calls: list[Callable[[], Any]]) -> None:
        """Run each call in a thread or task of its own."""
        if self.is_async:
            self.waits.run_all(calls)
            return
        errors: list[BaseException] = []

        def guarded(call: Callable[[], Any]) -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        if errors:
            raise errors[0]

    def close(self) -> None:
        self.pools.dispose()
        self.waits.close()
