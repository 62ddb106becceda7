"""One shard as its controller sees it: its probes, what they found, and how that was judged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from shardlib.dsn import Dsn
from shardlib.topology import Shard
from shardlib_ops.failover.external import Promoted, promoted
from shardlib_ops.failover.sighting import Sighting
from shardlib_ops.health.model import ServerHealth
from shardlib_ops.health.probe import Probe, each_server
from shardlib_ops.health.state import Limits, Positions, Settled, assess, settle

__all__ = ["ShardWatch", "saw"]

_log: Final = logging.getLogger("shardlib.health")


class ShardWatch:
    """Looks at the servers of one shard, all at once.

    Args:
        shard: as the topology has it.
        cluster_id: of the topology.
        interval_s: seconds from turn to turn.
        deadline_s: seconds for one answer of one server.
        limits: from where on a replica is late, and how long something has to last.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        shard: Shard,
        cluster_id: str,
        *,
        interval_s: float,
        deadline_s: float,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self.shard = shard
        self.seen: dict[Dsn, Sighting] = {}
        self.servers: tuple[ServerHealth, ...] = ()
        self.settled: Settled | None = None
        self.promoted: Promoted | None = None
        """Who was promoted by somebody else, if that is seen."""
        self._before: Sighting | None = None
        self._cluster_id, self._limits, self._clock = cluster_id, limits, clock
        self._interval_s, self._deadline_s = interval_s, deadline_s
        self._probes: dict[Dsn, Probe] = {}
        self._looks: dict[Dsn, asyncio.Task[Sighting]] = {}
        self._positions = Positions()

    async def close(self) -> None:
        """End the looks, and close the connections; idempotent."""
        probes, self._probes = self._probes, {}
        looks, self._looks = self._looks, {}
        await asyncio.gather(*(probe.close() for probe in probes.values()))
        for task in looks.values():
            task.cancel()
        await asyncio.gather(*looks.values(), return_exceptions=True)

    async def turn(self, shared: str | None = None) -> None:
        """Look at every server, and judge. Takes `deadline_s`, and a little, at most.

        A server that did not answer the last time is not waited for again: the others are looked at as often as ever,
        and its next answer, or the lack of it, counts when it is there.

        Args:
            shared: that another shard names a server of this one; None if none does.
        """
        await self._fit()
        for dsn, probe in self._probes.items():
            if dsn not in self._looks:
                self._looks[dsn] = asyncio.create_task(probe.look())
        awaited = [task for dsn, task in self._looks.items() if dsn not in self.seen or self.seen[dsn].answered]
        if awaited:
            await asyncio.wait(awaited)
        elif self._looks:
            await asyncio.wait(self._looks.values(), timeout=self._interval_s)
        for dsn in [dsn for dsn, task in self._looks.items() if task.done()]:
            self.seen[dsn] = self._result(dsn, self._looks.pop(dsn))
        self._judge(shared)

    def _result(self, dsn: Dsn, task: asyncio.Task[Sighting]) -> Sighting:
        try:
            return task.result()
        except Exception as error:  # noqa: BLE001 - it is told, and the server counts as silent
            # A fault of this program says nothing of a server; nobody may take it for more than no answer.
            _log.exception("the look at %s has failed", dsn)
            return Sighting(dsn, self._clock(), fault=f"the look has failed: {type(error).__name__}")

    async def _fit(self) -> None:
        """A probe for each server that the topology names, and no other."""
        named = [*each_server(self.shard.primary), *(one for dsn in self.shard.replicas for one in each_server(dsn))]
        for dsn in [dsn for dsn in self._probes if dsn not in named]:
            await self._probes.pop(dsn).close()
            self.seen.pop(dsn, None)
            if (task := self._looks.pop(dsn, None)) is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for dsn in named:
            if dsn not in self._probes:
                self._probes[dsn] = Probe(
                    dsn,
                    self.shard.name,
                    (self._cluster_id, self.shard.id),
                    deadline_s=self._deadline_s,
                    clock=self._clock,
                )

    def _judge(self, shared: str | None) -> None:
        listed = [self.seen[dsn] for dsn in each_server(self.shard.primary) if dsn in self.seen]
        primary = next((one for one in listed if one.answered and not one.standby), listed[0])
        replicas = [one for one in self.seen.values() if one is not primary]
        self._positions.add(primary)
        current = primary.answered and not primary.standby
        if self._before is not None and self._before.endpoint not in each_server(self.shard.primary):
            self._before = None
        self.promoted = promoted(primary, replicas, self._before)
        if current:
            self._before = primary
        lags = {one.endpoint: self._positions.lag(one) for one in replicas if current}
        late = frozenset(one.endpoint for one in self.servers if one.problem == "is late")
        status, self.servers = assess(primary, replicas, lags, self._limits, shared=shared, late_before=late)
        self.settled = settle(self.settled, status, self._limits)


def saw(servers: tuple[ServerHealth, ...]) -> str:
    """What was seen of a shard's servers, in the words of its sentence; without figures that change all the time."""
    replicas = [one for one in servers if one.role == "replica"]
    up = sum(one.up for one in replicas)
    parts = [f"{one.role} {one.endpoint} {one.problem}" for one in servers if one.problem is not None]
    if servers and servers[0].problem is None:
        parts.insert(0, f"primary {servers[0].endpoint} is up")
    parts.append(f"{up} of {len(replicas)} replicas are up" if replicas else "it has no replica")
    return ", ".join(parts)
