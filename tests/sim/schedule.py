"""One run: a scenario, clients, faults at random moments, and what must hold at the end. All of it from one seed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from random import Random
from typing import Any

from shardlib.dsn import Dsn
from shardlib.ring import TokenRange, reassign
from shardlib.topology import Shard, Topology
from shardlib.topology.change import initial, renew_gates
from shardlib.topology.model import MoveState
from shardlib_ops.reshard.cutover import Limits
from shardlib_ops.reshard.job import Job, Kind, Leg, Status, Wish, legs_of
from shardlib_ops.reshard.runner import JobRunner
from shardlib_ops.reshard.world import Lost, Superseded
from tests.sim.catalog import FakeCatalog
from tests.sim.clients import Client, History, scan_rows
from tests.sim.loop import SimLoop, Stuck
from tests.sim.process import Killed, Process
from tests.sim.shard import FakeShard, Transaction
from tests.sim.world import FakeWorld, Lease
from tests.support.history import Held, check

__all__ = ["SCENARIOS", "STEPS", "Faults", "Result", "Simulation", "Strike", "run"]

SCENARIOS = ("split", "split_two", "merge")
_OLD_KEYS, _ALL_KEYS = 12, 48
_BIRTHS = 0.12
_TOKENS = {f"k{n}": n * 0x9E3779B97F4A7C15 % (1 << 64) for n in range(1, _ALL_KEYS + 1)}
_LIVE_S = 600.0
_BACK_OFF_S = (0.2, 0.5, 1.0, 3.0)


def _parts(ranges: tuple[TokenRange, ...], count: int) -> list[tuple[TokenRange, ...]]:
    """Each range cut into `count` pieces of about the same width: the first pieces, the second ones, and so on."""
    found: list[list[TokenRange]] = [[] for _ in range(count)]
    for one in ranges:
        width = (one.last - one.first + 1) // count
        for at in range(count):
            first = one.first + at * width
            found[at].append(TokenRange(first, one.last if at == count - 1 else first + width - 1))
    return [tuple(parts) for parts in found]


@cache
def _start(scenario: str) -> tuple[Topology, tuple[Leg, ...]]:
    shards = [Shard(f"s{n}", f"shard{n}", Dsn(f"postgresql://db{n}/app"), vnode_count=2) for n in (1, 2, 3)]
    topology = initial(shards, hash_function="murmur3", cluster_id="sim", nonce="start")
    ring = topology.ring
    if scenario == "merge":
        return topology, legs_of([("s1", "s3", ring.ranges_of("s1")), ("s2", "s3", ring.ranges_of("s2"))])
    if scenario == "split_two":
        _, second, third = _parts(ring.ranges_of("s1"), 3)
        return topology, legs_of([("s1", "s2", second), ("s1", "s3", third)])
    # The target of a split owns nothing yet.
    ring = reassign(ring, ring.ranges_of("s3"), "s2")
    topology = topology.evolve(ring=ring, version=1)
    return topology, legs_of([("s1", "s3", _parts(ring.ranges_of("s1"), 2)[1])])


Strike = str | float | Callable[["Simulation", Process], None]
"""What happens at a moment: `kill`, seconds of a pause, or whatever a test wants."""


@dataclass
class Faults:
    """What goes wrong in a run, and what the operator does.

    Attributes:
        lost: part of the calls that lose their question or answer.
        slow: part of the ways that take long.
        frozen: part of the clients' pauses that take seconds.
        at_tick: tick of the runners' awaits -> what happens then.
        at_step: (name of a step, its n-th time) -> the same.
        wishes: (seconds, wish).
        away: (from, seconds) when the catalog does not answer.
        slots: seconds at which a slot is lost.
        others: seconds at which somebody else changes the topology.
        heal_s: when all of it ends.
        final: what is asked of a job that rests.
        stay: runners keep both sides in step, as those of `Resharder.serve`.
    """

    lost: float = 0.0
    slow: float = 0.0
    frozen: float = 0.0
    at_tick: dict[int, Strike] = field(default_factory=dict)
    at_step: dict[tuple[str, int], Strike] = field(default_factory=dict)
    wishes: list[tuple[float, Wish]] = field(default_factory=list)
    away: list[tuple[float, float]] = field(default_factory=list)
    slots: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    heal_s: float = 20.0
    final: Wish = Wish.COMPLETE
    stay: bool = False

    @classmethod
    def random(cls, rng: Random) -> Faults:
        """Each kind in some of the runs, so that runs differ in kind."""
        heal_s = rng.uniform(4.0, 25.0)

        def some(part: float) -> bool:
            return rng.random() < part

        ticks: dict[int, Strike] = {}
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            ticks[int(10 ** rng.uniform(0.3, 3.1))] = "kill" if some(0.6) else rng.uniform(0.2, 16.0)
        steps: dict[tuple[str, int], Strike] = {}
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            steps[rng.choice(STEPS), rng.choice((1, 1, 1, 2))] = "kill" if some(0.6) else rng.uniform(0.2, 16.0)
        kinds = (Wish.PAUSE, Wish.CANCEL, Wish.ROLLBACK, Wish.COMPLETE, Wish.RUN)
        return cls(
            lost=rng.choice((0.0, 0.0, 0.005, 0.03)),
            slow=rng.choice((0.0, 0.01, 0.05)),
            frozen=rng.choice((0.0, 0.01, 0.05)),
            at_tick=ticks,
            at_step=steps,
            wishes=sorted((rng.uniform(0, 8), rng.choice(kinds)) for _ in range(rng.choice((0, 0, 1, 2)))),
            away=[(rng.uniform(0, 8), rng.uniform(0.5, 14.0))] if some(0.15) else [],
            slots=[rng.uniform(0, 8)] if some(0.1) else [],
            others=[rng.uniform(0, 8) for _ in range(rng.choice((0, 0, 1, 3)))],
            heal_s=heal_s,
            final=rng.choice((Wish.COMPLETE, Wish.ROLLBACK)),
        )


STEPS = (
    "claimed",
    "schema_copied",
    "sides_prepared",
    "announced",
    "status_precopy",
    "leg_copied",
    "schema_finished",
    "status_deltasync",
    "leg_compared",
    "reverse_slots",
    "status_cutover",
    "gates_closed",
    "guarded",
    "drained",
    "compared",
    "handed_over",
    "gates_opened",
    "switched",
    "given_way",
    "status_validation",
    "forward_stopped",
    "status_cleanup",
    "slots_dropped",
    "shard_purged",
    "finished",
    "retired",
)


@dataclass
class Result:
    """How a run ended.

    Attributes:
        violations: what must not be.
        status: of the job.
        digest: of everything that happened: the same seed gives the same.
        facts: counts of what happened.
        ticks: awaits of the runners.
        steps: names of the steps, in their order.
    """

    violations: list[str]
    status: Status
    digest: str
    facts: dict[str, int]
    ticks: int
    steps: list[str]


class Simulation:
    """One run. `world_type`, `client_type` and `runner_type` are where planted faults come in."""

    world_type: type[FakeWorld] = FakeWorld
    client_type: type[Client] = Client

    def __init__(self, seed: int, scenario: str, faults: Faults, **types: Any) -> None:
        self.rng = Random(seed)
        self.world_type = types.get("world_type", self.world_type)
        self.client_type = types.get("client_type", self.client_type)
        self.faults, self.faulty, self.frozen = faults, True, faults.frozen
        self.loop = SimLoop(faults.heal_s + _LIVE_S)
        topology, legs = _start(scenario)
        self.token_of = _TOKENS
        self.leg_of = {
            key: leg.number
            for key, token in _TOKENS.items()
            for leg in legs
            if any(part.first <= token <= part.last for part in leg.ranges)
        }
        rate = self.rng.uniform(0.98, 1.02)
        self.catalog = FakeCatalog(topology, Job(1, Kind.SPLIT, legs), lambda: self.loop.time() * rate)
        self.shards = {
            shard.id: FakeShard(shard.id, topology.gates_of(shard.id), self._commit_wait) for shard in topology.shards
        }
        self.history = History()
        self.ttl_s = self.rng.choice((3.0, 10.0))
        self.strict_slots = self.rng.random() < 0.5
        self.stopping = False
        self.limits = Limits(lag_bytes=8_000, changed_keys=self.rng.choice((2, 2_000)))
        self.steps: list[str] = []
        self.ticks = 0
        self.facts = dict.fromkeys(("kills", "pauses", "lost", "takeovers", "others", "slots_lost"), 0)
        self.clients: list[Client] = []
        self._values: dict[str, int] = {}
        self._step_counts: dict[str, int] = {}
        self._nonces = 0
        self._processes: list[Process] = []
        self._ended: asyncio.Queue[Job] | None = None
        self._named: dict[str, set[int]] = {shard_id: set(topology.gates_of(shard_id)) for shard_id in self.shards}
        self._moved_away, self._open_late = set[str](), set[int]()
        self.violations: list[str] = []
        self._prepare_shards()

    def _prepare_shards(self) -> None:
        for shard in self.shards.values():
            shard.may_commit = self._look_at_commit
            shard.moving = lambda key: key in self.leg_of
            shard.reopened = partial(self._reopened, shard)  # type: ignore[method-assign]
        self.catalog.listeners.append(self._published)
        for key in list(_TOKENS)[:_OLD_KEYS]:
            shard = self.shards[self.catalog.topology.shard_of(_TOKENS[key]).id]
            for rows in (shard.seen, shard.logged):
                rows["register"][key] = (0, 0)
                rows["bag"][key] = ()
            self.history.born[key] = self.loop.time() - 1

    def _published(self, after: Topology) -> None:
        taken_back = {move.source for move in after.moves if move.state is MoveState.COPYING} & self._moved_away
        self._moved_away = {move.source for move in after.moves if move.state is MoveState.SWITCHED}
        for gate in after.gates:
            self._named[gate.shard_id].add(gate.number)
            if gate.ranges and gate.shard_id in taken_back:
                # A rollback opens its gates when the guard is down, which stands until the swap is certain.
                self._open_late.add(gate.number)
            if gate.number in self._open_late:
                continue
            if gate.number not in self.shards[gate.shard_id].ever_open:
                self.violations.append(f"version {after.version} names gate {gate.number}, which was never opened")

    def _reopened(self, shard: FakeShard, number: int) -> None:
        if number in self._named[shard.id]:
            self.violations.append(f"gate {number} of {shard.id} was named, was closed, and is open again")

    def _look_at_commit(self, shard: FakeShard, key: str, flight: Transaction) -> None:
        topology = self.catalog.topology
        if (owner := topology.shard_of(_TOKENS[key]).id) != shard.id:
            self.violations.append(
                f"{flight.name} committed {key} at {shard.id}, which {owner} owns since version {topology.version}"
            )
        for gate in flight.gates or ():
            if gate not in shard.open:
                self.violations.append(f"{flight.name} committed {key} at {shard.id} through the closed gate {gate}")

    # Weather

    def delay(self) -> float:
        """See `Weather.delay`."""
        rng = self.rng
        if self.faulty and self.faults.slow and rng.random() < self.faults.slow:
            return rng.uniform(0.01, 0.3) if rng.random() < 0.9 else rng.uniform(0.3, 3.0)
        return rng.uniform(0.0002, 0.004)

    async def _commit_wait(self, most_s: float) -> None:
        slow = self.faulty and self.rng.random() < 0.03
        await asyncio.sleep(self.rng.uniform(0, 0.2 if slow else most_s))

    def fate(self) -> str:
        """See `Weather.fate`."""
        if not self.faulty or self.rng.random() >= self.faults.lost:
            return "ok"
        self.facts["lost"] += 1
        return "before" if self.rng.random() < 0.5 else "after"

    def tick(self, process: Process) -> None:
        """See `Weather.tick`."""
        self.ticks += 1
        if (what := self.faults.at_tick.get(self.ticks)) is not None:
            self._strike(process, what)

    def _strike(self, process: Process, what: Strike) -> None:
        if process.dead or process.paused:
            return
        if callable(what):
            what(self, process)
            return
        if isinstance(what, str):
            self.facts["kills"] += 1
            process.kill()
            self.loop.call_later(self.rng.uniform(0, 2.0), self.spawn)
        else:
            self.facts["pauses"] += 1
            process.pause(what)
            self.loop.call_later(self.rng.uniform(0, 2.0), self.spawn)

    def nonce(self) -> str:
        """A text that no other call gives."""
        self._nonces += 1
        return f"n{self._nonces}"

    # Programs that run the job

    def spawn(self) -> None:
        """One more process that wants to run the job."""
        if not self.stopping:
            process = Process(self, f"runner{len(self._processes) + 1}")
            self._processes.append(process)
            self.loop.create_task(self._live(process))

    async def _live(self, process: Process) -> None:
        assert self._ended is not None
        try:
            self._ended.put_nowait(await self._run_job(process))
        except Killed:
            return
        except Exception as error:  # noqa: BLE001 - a runner that breaks is what we look for
            self.violations.append(f"{process.name} broke: {error!r}")
            self._ended.put_nowait(self.catalog.job)

    async def _run_job(self, process: Process) -> Job:
        """As `Resharder` does it."""
        failures = 0
        catalog = self.catalog
        while True:
            try:
                job = await process.call(lambda: catalog.job, away=catalog.away)
                if job.status.over:
                    return job
                sent_at = self.loop.time()
                token = await process.call(lambda: catalog.grant(self.ttl_s), away=catalog.away)
                if token is None:
                    await process.sleep(self.rng.uniform(0.25, 0.5))
                    continue
                lease = Lease(process, self, token, sent_at)
                keeper = self.loop.create_task(lease.keep())
                try:
                    return await self._drive(process, lease)
                finally:
                    keeper.cancel()
                    await process.call(partial(catalog.release, token), away=catalog.away)
            except (Lost, Superseded):
                pause_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)]
                failures += 1
                await process.sleep(pause_s * self.rng.uniform(0.5, 1.5))

    async def _drive(self, process: Process, lease: Lease) -> Job:
        catalog = self.catalog
        job = await process.call(lambda: catalog.job, away=catalog.away)
        if job.status.over:
            return job
        self.facts["takeovers"] += 1
        world = self.world_type(self, process, lease)

        async def told(name: str) -> None:
            self.steps.append(name)
            count = self._step_counts[name] = self._step_counts.get(name, 0) + 1
            if self.faulty and (what := self.faults.at_step.get((name, count))) is not None:
                self._strike(process, what)
            for client in self.clients:
                if self.rng.random() < 0.6:
                    client.nudge()
            await process.sleep(self.delay())

        return await JobRunner(world, job, limits=self.limits, stay=self.faults.stay, step=told).go()

    # Clients

    def _start_clients(self) -> None:
        rng, keys = self.rng, list(_TOKENS)

        def value(key: str) -> int:
            self._values[key] = self._values.get(key, 0) + 1
            return self._values[key]

        def make(name: str) -> Client:
            client = self.client_type(self, name, rng.random() < 0.5)
            self.clients.append(client)
            return client

        def act_of(client: Client, kind: str, mine: list[str]) -> Callable[[], Any]:
            async def act() -> None:
                known = list(self.history.born)
                if kind == "write":
                    # Keys are born all along, also while their range moves.
                    some = [key for key in mine if key in self.history.born]
                    some = rng.sample(some, 1 if rng.random() < 0.7 else 2)
                    if rng.random() < _BIRTHS:
                        some.append(rng.choice(mine))
                    await client.write(sorted(set(some)), values=value)
                elif kind == "count":
                    await client.write([rng.choice(known)], values=lambda key: None)
                elif kind == "foreign":
                    await client.write_without_gate(rng.choice(known))
                elif kind == "past":
                    stays = [key for key in known if key not in self.leg_of]
                    moves = [key for key in known if key in self.leg_of]
                    if stays and moves:
                        await client.write_past_its_gate(rng.choice(stays), rng.choice(moves))
                elif kind == "read":
                    await client.read(rng.choice(known))
                else:
                    await client.scan()

            return act

        pace = rng.choice((0.1, 0.3, 0.8))
        for number, (kind, mine) in enumerate(
            [
                ("write", keys[::2]),
                ("write", keys[1::2]),
                ("count", []),
                ("read", []),
                ("scan", []),
                ("foreign", []),
                ("past", []),
            ]
        ):
            client = make(f"{kind}{number}")
            self.loop.create_task(client.live(act_of(client, kind, mine), pace))

    # The run

    def _schedule_faults(self) -> None:
        later, catalog = self.loop.call_later, self.catalog
        for at, wish in self.faults.wishes:
            if at < self.faults.heal_s:
                later(at, catalog.ask, wish)
        for at, seconds in self.faults.away:
            if at < self.faults.heal_s:
                later(at, setattr, catalog, "away", True)
                later(at + seconds, setattr, catalog, "away", False)
        for at in self.faults.slots:
            later(at, self._lose_slot)
        for at in self.faults.others:
            later(at, lambda: self.loop.create_task(self._change_topology()))
        later(self.faults.heal_s, self._heal)

    def _heal(self) -> None:
        self.faulty = self.catalog.away = False
        if self.catalog.wish is Wish.PAUSE:
            self.catalog.ask(Wish.RUN)
        self.faults = Faults(final=self.faults.final, stay=self.faults.stay)

    def _lose_slot(self) -> None:
        slots = [(shard, name) for shard in self.shards.values() for name in shard.slots]
        if slots and self.faulty:
            shard, name = self.rng.choice(slots)
            shard.slots[name].lost = True
            self.facts["slots_lost"] += 1
            shard.tell()

    async def _change_topology(self) -> None:
        """Somebody else publishes: new gates of a shard, or nothing but a version."""
        if self.rng.random() < 0.5:
            await self.renew(self.rng.choice(list(self.shards)))
        else:
            before = self.catalog.topology
            await asyncio.sleep(self.delay())
            self.facts["others"] += self.catalog.swap(before.evolve(nonce=self.nonce()), before.version, None)

    async def renew(self, shard_id: str) -> bool:
        """Somebody else gives a shard new gates, as whoever changes gates does; whether nobody was faster."""
        before, shard = self.catalog.topology, self.shards[shard_id]
        after = renew_gates(before, shard_id, nonce=self.nonce())
        after = replace(after, version=before.version + 2)
        new, old = after.gates_of(shard_id), before.gates_of(shard_id)
        await asyncio.sleep(self.delay())
        if not self.catalog.swap(before.evolve(next_gate=after.next_gate, nonce=self.nonce()), before.version, None):
            return False
        for number in new:
            await asyncio.sleep(self.delay())
            shard.open_gate(number)
        await asyncio.sleep(self.delay())
        stored = self.catalog.swap(after, before.version + 1, None)
        self.facts["others"] += stored
        for number in old if stored else new:
            while not shard.drop_gate(number):
                await shard.changes()
        return stored

    async def _main(self) -> Job:
        self._ended = asyncio.Queue()
        self._start_clients()
        self._schedule_faults()
        self.spawn()
        asked = False
        while True:
            job = await self._ended.get()
            if self.violations or self.catalog.job.status.over:
                break
            if job.status is not Status.VALIDATION:
                self.violations.append(f"a runner ended with the job in {job.status.value}")
                break
            self.catalog.ask(self.faults.final if not asked else Wish.COMPLETE)
            asked = True
            self.spawn()
        await asyncio.sleep(0.5)
        self.stopping = True
        self._heal()
        for client in self.clients:
            client.nudge()
        for process in self._processes:
            process.resume()
        await asyncio.sleep(30.0)
        for process in self._processes:
            process.kill()
        return self.catalog.job

    def run(self) -> Result:
        """Run it, and look at what is left."""
        try:
            self.loop.run(self._main)
        except Stuck as stuck:
            self.violations.append(f"liveness: {stuck}; the job is {self._where()}")
        else:
            self._look_at_the_end()
        found = [*self.violations, *self.catalog.violations, *self.history.violations]
        found += [f"nobody looked at: {what}" for what in self.loop.surprises]
        facts = {
            **self.facts,
            "refused": sum(shard.refusals["gate"] for shard in self.shards.values()),
            "guarded": sum(shard.refusals["guard"] for shard in self.shards.values()),
            "written": sum(write.outcome == "ok" for write in self.history.writes),
            "scans": self.history.scans,
            "switches": self.steps.count("switched"),
            "gave_way": self.steps.count("given_way"),
        }
        everything = (self.history.writes, self.history.reads, self.steps, self.ticks, self.loop.virtual_s, found)
        digest = hashlib.sha256(repr(everything).encode()).hexdigest()
        return Result(found, self.catalog.job.status, digest, facts, self.ticks, self.steps)

    def _where(self) -> str:
        job = self.catalog.job
        return f"{job.status.value}, waiting for: {job.error}; last steps: {self.steps[-6:]}"

    def _look_at_the_end(self) -> None:
        topology, job = self.catalog.topology, self.catalog.job
        if not job.status.over:
            return
        if topology.moves:
            self.violations.append(f"moves are left over: {topology.moves}")
        if job.status is not job.outcome:
            self.violations.append(f"the job is {job.status.value} and its outcome {job.outcome}")
        for leg in job.legs:
            owner = leg.target if job.status is Status.COMPLETED else leg.source
            if not all(topology.ring.owns(owner, part) for part in leg.ranges):
                self.violations.append(f"leg {leg.number} of a job that is {job.status.value} is not at {owner}")
        owners = {key: topology.shard_of(token).id for key, token in _TOKENS.items()}
        present = {key for shard in self.shards.values() for key in shard.seen["register"]}
        held = []
        for shard in self.shards.values():
            self.violations += shard.leftovers()
            named = set(topology.gates_of(shard.id))
            if missing := named - shard.open:
                self.violations.append(f"gates {sorted(missing)} of {shard.id} are named and closed")
            if shard.id in job.shards and (stale := [n for n in shard.open - named if n in self._named[shard.id]]):
                self.violations.append(f"gates {stale} of {shard.id} are open, and no topology names them any more")
            if shard.seen != shard.logged:
                self.violations.append(f"the simulation is wrong: {shard.id} shows what its WAL does not say")
            held.append(
                Held(
                    shard.id,
                    {key: list(uids) for key, uids in shard.seen["bag"].items()},
                    {key: row[1] for key, row in shard.seen["register"].items()},
                    {key: row[0] for key, row in shard.seen["register"].items()},
                )
            )
            self.violations += [
                f"misplaced: the row of {key} is at {shard.id}"
                for key in scan_rows(topology, shard)
                if owners[key] != shard.id
            ]
        known = {key: owner for key, owner in owners.items() if key in self.history.born or key in present}
        self.violations += check(self.history.writes, self.history.reads, held, known)


def run(seed: int, *, slow: float | None = None, **types: Any) -> Result:
    """The run of a seed: scenario, faults and everything else come from it. `slow`: see `Faults`, in its place."""
    rng = Random(f"schedule {seed}")
    scenario, faults = rng.choice(SCENARIOS), Faults.random(rng)
    return Simulation(seed, scenario, faults if slow is None else replace(faults, slow=slow), **types).run()
