"""Faults put into a runner's or a client's own process on purpose: the schedules have to find each of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection, sql

from shardlib.fence import gated
from shardlib.topology import Topology
from shardlib_ops.reshard import attempts, control, runner, servers, side, validation
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.cutover import Cutover
from shardlib_ops.reshard.job import Job
from shardlib_ops.reshard.servers import Servers
from shardlib_ops.reshard.stream.apply import Key, Sink
from shardlib_ops.reshard.stream.filter import Change
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.world import Compared, World
from tests.support.schedules.plan import make


async def _no_compare(self: Servers, leg: Any, flow: Any, *, since: str | None) -> Compared:
    """Equal without a look: else the comparison finds most plants before the clients do."""
    await self._comparing(leg)
    return Compared(since or "0/0", 0)


async def _no_closed_compare(self: Servers, leg: Any, *, since: str) -> int:
    return 0


def _without_comparison() -> None:
    Servers.compare = _no_compare  # type: ignore[method-assign]
    Servers.compare_closed = _no_closed_compare  # type: ignore[method-assign]


def _slow_target() -> None:
    """Each batch of changes takes a while: what does not wait for it is seen to."""
    write = Sink.write

    async def slowly(self: Sink, changes: list[Change], keys: Iterable[bytes], *, lsn: int, last: bool) -> list[Key]:
        await asyncio.sleep(0.3)
        return await write(self, changes, keys, lsn=lsn, last=last)

    Sink.write = slowly  # type: ignore[method-assign]


def no_drain() -> None:
    """The switch does not wait for the streams."""

    async def drain(self: Cutover, number: int, until: float) -> None:
        await together(self.world.side(shard_id).guard(active=True) for shard_id in self.serving)
        await self.step("guarded")
        await self.step("drained")

    Cutover._drain = drain  # type: ignore[method-assign]
    _without_comparison()
    _slow_target()


def barrier_before_gates() -> None:
    """The barrier is read before the gates are closed: what was let in between is not waited for."""
    close = Cutover._close

    async def close_late(self: Cutover, topology: Topology, until: float) -> None:
        message = f"early/{self.nonce()}"
        await together(self.world.side(shard_id).barrier(message) for shard_id in self.serving)
        left_s = max(0.05, until - self.world.now())
        await together(flow.heard(message, timeout_s=left_s) for flow in self.flows.values())
        await close(self, topology, until)

    Cutover._close = close_late  # type: ignore[method-assign]
    no_drain()


def gates_stay_open() -> None:
    """The switch closes no gate and raises no guard."""

    async def close(self: Cutover, topology: Topology, until: float) -> None:
        self._closed_at = {}
        await self.step("gates_closed")

    async def quiet(self: Cutover, number: int, until: float) -> None:
        sides = [self.world.side(shard_id) for shard_id in self.serving]
        message = f"{self.job.id}/{self.direction}/{number}/{self.nonce()}"
        await together(one.barrier(message) for one in sides)
        left_s = max(0.05, until - self.world.now())
        await together(flow.heard(message, timeout_s=left_s) for flow in self.flows.values())
        await self.step("drained")

    async def no_sweep(world: World, shard_ids: Iterable[str], *, budget_s: float) -> None:
        """Older gates stay."""

    Cutover._close = close  # type: ignore[method-assign]
    Cutover._drain = quiet  # type: ignore[method-assign]
    for where in (runner, attempts, validation):
        where.sweep = no_sweep  # type: ignore[attr-defined]
    _without_comparison()


def position_apart() -> None:
    """The position of the forward streams is written in a transaction of its own, after that of the rows."""
    write, advance = Sink.write, Sink._advance

    async def rows_alone(self: Sink, lsn: int) -> None:
        if self._link.direction == "forward":
            await self._conn.execute(control.claimed(self._link.runner))
        else:
            await advance(self, lsn)

    async def then_position(
        self: Sink, changes: list[Change], keys: Iterable[bytes], *, lsn: int, last: bool
    ) -> list[Key]:
        fresh = await write(self, changes, keys, lsn=lsn, last=last)
        if last and self._link.direction == "forward":
            await asyncio.sleep(0.5)
            async with self._conn.transaction():
                await advance(self, lsn)
        return fresh

    async def rest(self: Sink, lsn: int) -> None:
        async with self._conn.transaction():
            await advance(self, lsn)
        self._ended(lsn)

    Sink.rest = rest  # type: ignore[method-assign]
    Sink._advance = rows_alone  # type: ignore[method-assign]
    Sink.write = then_position  # type: ignore[method-assign]
    _without_comparison()


def not_fenced() -> None:
    """Runners go on without their lease, and shards do not ask for the token."""

    asks = control.claimed

    def nobody(runner: Runner) -> sql.Composed:
        return sql.SQL("SELECT {}, {}").format(runner.job, runner.token)

    for name, module in list(sys.modules.items()):
        if name.startswith("shardlib_ops.reshard") and getattr(module, "claimed", None) is asks:
            module.claimed = nobody  # type: ignore[attr-defined]

    async def claim(conn: AsyncConnection[Any], runner: Runner) -> None:
        """The row is there; older runners live on."""
        await conn.execute(
            "INSERT INTO shardlib.job AS j (id, token) VALUES (%s, %s) ON CONFLICT DO NOTHING",
            (runner.job, runner.token),
        )

    async def publish(self: Servers, after: Topology, *, expected: int) -> bool:
        try:
            await self._ask(lambda: self._catalog.publish(after, expected=expected))
        except servers.Conflict:
            return False
        return True

    async def save(self: Servers, job: Job) -> None:
        def overwrite() -> None:
            name = f"jobs/{job.id}"
            found = self._catalog.read_document(name)
            assert found is not None
            self._catalog.write_document(name, servers_encode(job), expected=found.revision)

        await self._ask(overwrite)

    from shardlib_ops.reshard.job import encode_job as servers_encode

    side.claim = claim  # type: ignore[attr-defined]
    Servers._held = lambda self: None  # type: ignore[method-assign]
    Servers.publish = publish  # type: ignore[method-assign]
    Servers.save = save  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    "no drain": no_drain,
    "barrier before the gates are closed": barrier_before_gates,
    "gates stay open": gates_stay_open,
    "position apart from the rows": position_apart,
    "runner not fenced": not_fenced,
}
"""For the runners."""


def no_gate() -> None:
    """Clients take no gate."""
    gated.lock_sql = lambda gates: b"SELECT 1"


def old_copies_seen() -> None:
    """Clients do not leave out rows of copies that their shard does not own."""
    Topology.hidden_on = lambda self, shard_id: ()  # type: ignore[method-assign]


CLIENT_PLANTS: dict[str, Callable[[], None]] = {"no gate": no_gate, "old copies seen": old_copies_seen}
"""For the clients."""

_LOST_SERVER = ("runner killed", "runner's connections cut", "postgres killed")
_STALE_CLIENT = ("clients cut off from etcd", "client frozen")
_STREAMING = ("status_cutover", "gates_closed", "guarded")


@dataclass(frozen=True, slots=True)
class Need:
    """What one job of a schedule must have for a plant to be seen; nothing: whatever it is.

    Attributes:
        faults: one of these.
        steps: at one of these.
        endings: and come to one of these.
    """

    faults: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()

    def met_by(self, seed: int) -> bool:
        """Whether the schedule of a seed is one."""
        return not self.faults or any(
            strike.fault in self.faults and strike.nth == 1 and (not self.steps or strike.step in self.steps)
            for job in make(seed).jobs
            for strike in job.strikes
            if not self.endings or job.ending in self.endings
        )


NEEDS: dict[str, Need] = {
    "gates stay open": Need(_STALE_CLIENT),
    "no gate": Need(_STALE_CLIENT),
    # After any other ending the side with the doubled rows is deleted.
    "position apart from the rows": Need(_LOST_SERVER, _STREAMING, ("complete",)),
    "runner not fenced": Need(("runner frozen", "runner cut off from etcd")),
}
"""Plant -> what its schedules must have."""


def plant(name: str) -> None:
    """Put a fault into this process."""
    (PLANTS | CLIENT_PLANTS)[name]()
