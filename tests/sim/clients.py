"""The application: writers, readers and scans that route by a topology of their own, which may be old."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardlib.topology import Topology
from tests.sim.shard import Closed, FakeShard, Guarded, Transaction
from tests.support.history import Read, Write

if TYPE_CHECKING:
    from tests.sim.schedule import Simulation

__all__ = ["Client", "History", "scan_rows"]

_TRIES = 60


class History:
    """What clients were told."""

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.reads: list[Read] = []
        self.violations: list[str] = []
        self.born: dict[str, float] = {}
        """key -> when its first write was acknowledged."""
        self.scans = 0


def scan_rows(topology: Topology, shard: FakeShard) -> dict[str, tuple[int, int]]:
    """What a scan of one shard sees: the rows there, without those whose key is in a key table that hides them.

    Raises:
        Closed: such a key table is not there.
    """
    rows: dict[str, tuple[int, int]] = shard.seen["register"]
    if topology.hidden_on(shard.id):
        hidden = shard.keys
        if hidden is None:
            raise Closed(f"key table of {shard.id}")
        return {key: row for key, row in rows.items() if key not in hidden}
    return rows


@dataclass(eq=False)
class Client:
    """One program of the application with one connection to each shard.

    Attributes:
        watches: hears of new topologies a little later; else only when it is refused.
    """

    sim: Simulation
    name: str
    watches: bool

    def __post_init__(self) -> None:
        self.topology = self.sim.catalog.topology
        self._idle: asyncio.Future[None] | None = None
        self._count = 0
        if self.watches:
            self.sim.catalog.listeners.append(self._hear)

    def _hear(self, after: Topology) -> None:
        delay_s = self.sim.rng.expovariate(1 / 0.05)
        self.sim.loop.call_later(delay_s, self._take, after)

    def _take(self, found: Topology) -> None:
        if found.version > self.topology.version:
            self.topology = found

    def nudge(self) -> None:
        """Do the next thing now rather than later."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def live(self, act: Callable[[], Awaitable[None]], every_s: float) -> None:
        """Act again and again until the simulation stops."""
        sim = self.sim
        while not sim.stopping:
            self._idle = sim.loop.create_future()
            handle = sim.loop.call_later(sim.rng.expovariate(1 / every_s), self.nudge)
            await self._idle
            handle.cancel()
            await asyncio.sleep(sim.rng.uniform(0, 0.006))
            await act()

    async def _refresh(self) -> None:
        sim, before = self.sim, self.topology.version
        await asyncio.sleep(sim.delay())
        if not sim.catalog.away:
            self._take(sim.catalog.topology)
        # Refused by the newest topology: a range is being handed over.
        again = before == self.topology.version
        await asyncio.sleep(sim.rng.uniform(0.01, 0.06) if again else sim.delay())

    async def _think(self) -> None:
        sim = self.sim
        long = sim.faulty and sim.rng.random() < sim.frozen
        await asyncio.sleep(sim.rng.uniform(0.3, 12.0) if long else sim.delay())

    def _uid(self) -> str:
        self._count += 1
        return f"{self.name}-{self._count}"

    def _place(self, topology: Topology, key: str) -> tuple[FakeShard, int]:
        place = topology.place(self.sim.token_of[key])
        return self.sim.shards[place.shard.id], place.gate

    async def write(self, keys: list[str], *, values: Callable[[str], int | None]) -> None:
        """One transaction over keys of any shards, each leg committed by itself, anew as a whole when refused."""
        sim, began = self.sim, self.sim.loop.time()
        parts = [(key, self._uid(), values(key)) for key in keys]
        for _ in range(_TRIES):
            flights: dict[str, Transaction] = {}
            topology = self.topology
            try:
                for key, uid, value in parts:
                    shard, gate = self._place(topology, key)
                    flight = flights.get(shard.id)
                    if flight is None:
                        flight = flights[shard.id] = shard.begin(self.name)
                    await shard.enter(flight, gate)
                    await asyncio.sleep(sim.delay())
                    await shard.lock(flight, key)
                    shard.write(flight, key, value, uid)
                    await self._think()
            except (Closed, Guarded):
                self._give_up(flights)
                await self._refresh()
                continue
            for shard_id, flight in flights.items():
                await sim.shards[shard_id].commit(flight)
            await asyncio.sleep(sim.delay())
            told = "unknown" if sim.faulty and sim.rng.random() < 0.02 else "ok"
            for key, uid, value in parts:
                self._wrote(key, uid, value, began, told)
            return
        for key, uid, value in parts:
            self._wrote(key, uid, value, began, "failed")

    def _give_up(self, flights: dict[str, Transaction]) -> None:
        for shard_id, flight in flights.items():
            self.sim.shards[shard_id].end_flight(flight)

    def _wrote(self, key: str, uid: str, value: int | None, began: float, told: str) -> None:
        now, history = self.sim.loop.time(), self.sim.history
        history.writes.append(Write(key, uid, value, began, now, told))  # type: ignore[arg-type]
        if told == "ok":
            history.born.setdefault(key, now)

    async def write_without_gate(self, key: str) -> None:
        """As psql would: where the rows are at this moment, in a transaction that knows of no gate."""
        sim, began, uid = self.sim, self.sim.loop.time(), self._uid()
        shard, _ = self._place(sim.catalog.topology, key)
        if key not in shard.seen["register"] or not shard.free(key):
            return
        flight = shard.begin(self.name, foreign=True)
        await shard.lock(flight, key)  # free: does not wait
        try:
            shard.write(flight, key, None, uid)
        except Guarded:
            shard.end_flight(flight)
            self._wrote(key, uid, None, began, "failed")
            return
        # A person's transaction is open for longer than a program's.
        await asyncio.sleep(sim.rng.uniform(0, 0.2))
        await self._think()
        await shard.commit(flight)
        self._wrote(key, uid, None, began, "ok")

    async def write_past_its_gate(self, key: str, other: str) -> None:
        """Through the gate of `key`, then SQL of its own that reaches the row of `other`, if that is there by now."""
        sim, began, parts = self.sim, self.sim.loop.time(), [(key, self._uid()), (other, self._uid())]
        shard, gate = self._place(self.topology, key)
        flight = shard.begin(self.name)
        try:
            await shard.enter(flight, gate)
            for one, uid in parts:
                here = self._place(sim.catalog.topology, one)[0] is shard
                if not here or one not in shard.seen["register"] or not shard.free(one):
                    raise Guarded("not there")
                await shard.lock(flight, one)  # free: does not wait
                shard.write(flight, one, None, uid)
                await self._think()
        except (Closed, Guarded):
            shard.end_flight(flight)
            await self._refresh()
            told = "failed"
        else:
            await shard.commit(flight)
            told = "ok"
        for one, uid in parts:
            self._wrote(one, uid, None, began, told)

    async def read(self, key: str) -> None:
        """A strong read of one register."""
        began = self.sim.loop.time()
        for _ in range(_TRIES):
            shard, gate = self._place(self.topology, key)
            flight = shard.begin(self.name)
            try:
                await asyncio.sleep(self.sim.delay())
                await shard.enter(flight, gate)
                await asyncio.sleep(self.sim.delay())
                row = shard.seen["register"].get(key)
            except Closed:
                shard.end_flight(flight)
                await self._refresh()
                continue
            shard.end_flight(flight)
            await asyncio.sleep(self.sim.delay())
            value = None if row is None else row[0]
            self.sim.history.reads.append(Read(key, value, began, self.sim.loop.time(), f"{self.name} of {shard.id}"))
            return

    async def scan(self) -> None:
        """Every row of every shard, each once, whatever moves."""
        sim, history = self.sim, self.sim.history
        began = sim.loop.time()
        known = [key for key, when in history.born.items() if when < began]
        for _ in range(_TRIES):
            topology, flights = self.topology, dict[str, Transaction]()
            found: list[tuple[str, str, int]] = []
            keep = sim.rng.random() < 0.5
            shards = [sim.shards[shard.id] for shard in topology.owners()]
            sim.rng.shuffle(shards)
            try:
                for shard in shards:
                    flight = flights[shard.id] = shard.begin(self.name)
                    for gate in topology.gates_of(shard.id):
                        await shard.enter(flight, gate)
                    await asyncio.sleep(sim.delay())
                    found += [(key, shard.id, row[0]) for key, row in self.rows(topology, shard).items()]
                    await self._think()
                    if not keep:
                        shard.end_flight(flight)
            except Closed:
                self._give_up(flights)
                await self._refresh()
                continue
            self._give_up(flights)
            self._scanned(topology, found, known, began)
            return

    def rows(self, topology: Topology, shard: FakeShard) -> dict[str, tuple[int, int]]:
        """What the scan sees of one shard."""
        return scan_rows(topology, shard)

    def _scanned(self, topology: Topology, found: list[tuple[str, str, int]], known: list[str], began: float) -> None:
        now, history = self.sim.loop.time(), self.sim.history
        history.scans += 1
        where: dict[str, list[str]] = {}
        for key, shard_id, value in found:
            where.setdefault(key, []).append(shard_id)
            history.reads.append(Read(key, value, began, now, f"scan of {shard_id} by version {topology.version}"))
        for key, shard_ids in where.items():
            if len(shard_ids) > 1:
                history.violations.append(
                    f"scan by version {topology.version} at {now:.4f} saw {key} at {', '.join(shard_ids)}"
                )
        for key in known:
            if key not in where:
                history.violations.append(f"scan by version {topology.version} at {now:.4f} missed {key}")
