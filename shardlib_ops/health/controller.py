"""The health controller: looks at every shard, publishes what it sees, and is one of several that elect one."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from os import getpid
from types import TracebackType
from typing import Final, Self, TypeVar

from shardlib.catalog import Catalog, Conflict, Lease, open_catalog
from shardlib.errors import CatalogUnavailable, InvalidArgument, InvalidTopology
from shardlib.topology import Topology
from shardlib_ops.failover.external import Promoted
from shardlib_ops.health.metrics import metrics_text
from shardlib_ops.health.model import Maintenance, ShardHealth
from shardlib_ops.health.publish import HealthStore
from shardlib_ops.health.state import Limits, shared_servers
from shardlib_ops.health.watch import ShardWatch, saw
from shardlib_ops.reshard.together import together

__all__ = ["HealthController"]

_log: Final = logging.getLogger("shardlib.health")
T = TypeVar("T")

_LEASE: Final = "health"
_THREADS: Final = 4
_CATALOG_S: Final = 3.0
_TELL_S: Final = 5.0
"""Seconds after which a shard of which nothing has changed is published again, for its figures."""


class HealthController:
    """Watches every primary and every replica of a cluster, and publishes how each shard is.

    Any number of them may run: all look, and one, which holds the lease `health`, publishes. With the catalog away,
    looks go on, and nothing is published. No wall clock takes part in what is judged.

    Args:
        url: the catalog, such as `etcd://127.0.0.1:2379/shop`.
        interval_s: seconds from one look at a shard to the next, 0.05 to 60.
        deadline_s: seconds for one answer of one server, connecting included, 0.05 to 60.
        failures: looks in a row that have to fail before a shard is called worse, 1 to 100.
        limits: from where on a replica is late; `failures` goes before its `worse_after`.
        lease_ttl_s: seconds after which another controller publishes when this one is gone, 1 to 120.

    Raises:
        InvalidArgument: a value that is not allowed.
    """

    def __init__(
        self,
        url: str,
        *,
        interval_s: float = 0.5,
        deadline_s: float = 1.0,
        failures: int = 3,
        limits: Limits | None = None,
        lease_ttl_s: float = 5.0,
    ) -> None:
        for name, value, least, most in (
            ("interval_s", interval_s, 0.05, 60),
            ("deadline_s", deadline_s, 0.05, 60),
            ("failures", failures, 1, 100),
            ("lease_ttl_s", lease_ttl_s, 1, 120),
        ):
            if not least <= value <= most:
                raise InvalidArgument(name, value, f"{least:g} to {most:g}")
        self._interval_s, self._deadline_s, self._lease_ttl_s = interval_s, deadline_s, lease_ttl_s
        given = limits or Limits()
        self._limits = Limits(given.lag_bytes, given.lag_s, failures, max(given.better_after, failures))
        self._catalog: Catalog = open_catalog(url, timeout_s=_CATALOG_S)
        self._store = HealthStore(self._catalog)
        # Of its own: what waits for the catalog must not stand in the way of a look.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="shardlib-health")
        self._holder = f"{socket.gethostname()}/{getpid()}"
        self._lease: Lease | None = None
        self._topology: Topology | None = None
        self._maintenance: dict[str, Maintenance] = {}
        self._away: str | None = "the catalog was not read yet"
        self._watches: dict[str, ShardWatch] = {}
        self._told: dict[str, tuple[ShardHealth, float]] = {}
        self._logged: dict[str, str] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, give the lease up, close the catalog; idempotent."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(watch.close() for watch in self._watches.values()))
        await asyncio.to_thread(self._catalog.close)
        await asyncio.to_thread(self._threads.shutdown)

    @property
    def elected(self) -> bool:
        """Whether this controller is the one that publishes."""
        return self._lease is not None and self._lease.alive()

    def shards(self) -> list[ShardHealth]:
        """How each shard was in its last turn, as far as it was looked at. Waits for nothing."""
        return [self._health(watch) for watch in list(self._watches.values()) if watch.servers]

    def metrics(self) -> str:
        """The same in Prometheus' text format. It waits for nothing, and may be called from any thread."""
        return metrics_text(self.shards(), elected=self.elected)

    async def turn(self) -> list[ShardHealth]:
        """One turn: read the catalog, look at every server of every shard at once, judge, publish."""
        await self._follow()
        await asyncio.gather(*(self._look(shard_id) for shard_id in list(self._watches)))
        await self._tell()
        return self.shards()

    async def run(self) -> None:
        """Turn after turn, until cancelled. Each shard has turns of its own: none waits for another's servers."""
        await together([self._forever(self._follow), self._forever(self._tell), self._keep_looking()])

    async def _keep_looking(self) -> None:
        looking: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for shard_id, task in list(looking.items()):
                    if task.done():
                        task.result()
                        del looking[shard_id]
                for shard_id in self._watches:
                    if shard_id not in looking:
                        looking[shard_id] = asyncio.create_task(self._look_on(shard_id), name=f"health of {shard_id}")
                await asyncio.sleep(self._interval_s)
        finally:
            for task in looking.values():
                task.cancel()
            await asyncio.gather(*looking.values(), return_exceptions=True)

    async def _look_on(self, shard_id: str) -> None:
        async def once() -> None:
            await self._look(shard_id)

        await self._forever(once, while_=lambda: shard_id in self._watches)

    async def _forever(self, call: Callable[[], Awaitable[None]], while_: Callable[[], bool] = lambda: True) -> None:
        while while_():
            began = time.monotonic()
            try:
                await call()
            except Exception:  # noqa: BLE001 - it is told, and the rest goes on
                _log.exception("a turn has failed and is made again")
            left = self._interval_s * random.uniform(0.9, 1.0) - (time.monotonic() - began)  # noqa: S311 - jitter
            await asyncio.sleep(max(left, 0.01))

    # -- parts of a turn ----------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Read the catalog, hold the lease or try to take it, and fit the watches to the topology."""
        try:
            topology, maintenance = await self._in_thread(self._read)
        except (CatalogUnavailable, InvalidTopology) as error:
            if self._away is None:
                _log.warning("looks go on, and nothing is published: %s", error)
            self._away = str(error)
            return
        self._away, self._topology, self._maintenance = None, topology, maintenance
        shards = {shard.id: shard for shard in topology.shards}
        for shard_id in [one for one in self._watches if one not in shards]:
            await self._watches.pop(shard_id).close()
            self._told.pop(shard_id, None)
        for shard_id, shard in shards.items():
            if shard_id in self._watches:
                self._watches[shard_id].shard = shard
            else:
                self._watches[shard_id] = ShardWatch(
                    shard,
                    topology.cluster_id,
                    interval_s=self._interval_s,
                    deadline_s=self._deadline_s,
                    limits=self._limits,
                    clock=time.monotonic,
                )

    def _read(self) -> tuple[Topology, dict[str, Maintenance]]:
        topology, maintenance = self._catalog.load(self._topology), self._store.maintenance()
        if self._lease is not None and not self._lease.alive():
            _log.warning("the lease is lost: another controller may publish now")
            self._lease = None
            self._told.clear()
        if self._lease is None:
            self._lease = self._catalog.acquire(_LEASE, ttl_s=self._lease_ttl_s, holder=self._holder)
            if self._lease is not None:
                _log.info("elected, with token %d", self._lease.token)
        return topology, maintenance

    async def _look(self, shard_id: str) -> None:
        watch = self._watches.get(shard_id)
        if watch is None:
            return
        shared = shared_servers({one.shard.name: tuple(one.seen.values()) for one in self._watches.values()})
        await watch.turn(shared.get(watch.shard.name))
        said = self._health(watch).sentence
        if said != self._logged.get(shard_id):
            self._logged[shard_id] = said
            _log.info("%s", said)

    async def _tell(self) -> None:
        """Publish what has changed, and the rest now and then; only as the holder of the lease."""
        lease, now = self._lease, time.monotonic()
        if self._away is not None or lease is None:
            return
        for health in self.shards():
            before, at = self._told.get(health.shard, (None, 0.0))
            if before is not None and _same(before, health) and now - at < _TELL_S:
                continue
            if not lease.alive():
                return
            try:
                await self._in_thread(lambda health=health: self._store.save(health, lease))  # type: ignore[misc]
            except Conflict:
                _log.warning("shard %s is not published: the lease is lost, or another has written", health.name)
                return
            except CatalogUnavailable as error:
                _log.info("shard %s is not published now: %s", health.name, error)
                return
            self._told[health.shard] = (health, now)

    def _health(self, watch: ShardWatch) -> ShardHealth:
        shard, servers = watch.shard, watch.servers
        kept = self._maintenance.get(shard.id)
        maintenance = kept is not None and kept.on
        assert watch.settled is not None  # noqa: S101 - there are servers, so they were judged
        status = watch.settled.shown
        return ShardHealth(
            shard=shard.id,
            name=shard.name,
            status=status,
            sentence=f"shard {shard.name} is {status.value}: {saw(servers)}; {self._did(kept, watch.promoted)}",
            maintenance=maintenance,
            servers=servers,
            controller=self._holder,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _did(self, kept: Maintenance | None, promoted: Promoted | None) -> str:
        if self._away is not None:
            return "nothing is done: the catalog does not answer"
        if kept is not None and kept.on:
            return f"nothing is done: {kept.by} has put it under maintenance" + (
                f" ({kept.reason})" * bool(kept.reason)
            )
        if not self.elected:
            return "nothing is done here: another controller is elected"
        if promoted is not None:
            return f"nothing is done: {promoted.reason}" + "; put it into the catalog" * (promoted.new is not None)
        return "it is published; a primary is replaced by a person (`shard promote`)"

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _same(one: ShardHealth, other: ShardHealth) -> bool:
    """Whether nothing differs but figures."""
    return (one.status, one.sentence, one.maintenance) == (other.status, other.sentence, other.maintenance)
