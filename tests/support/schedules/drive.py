"""Runs one schedule, and tells what came of it."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.errors import CatalogUnavailable, InvalidTopology, ShardlibError
from shardlib.token import hash_of
from shardlib.topology import Topology
from shardlib_ops.manager.blocking import BlockingManager
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from tests.support.eventually import eventually
from tests.support.history import Write
from tests.support.schedules import client, processes
from tests.support.schedules.arena import KEYS, Arena, Place, _with_path
from tests.support.schedules.breaking import Breaker, RunnerProcess
from tests.support.schedules.outsider import Outsider
from tests.support.schedules.plan import JobPlan, Schedule
from tests.support.schedules.plants import CLIENT_PLANTS, PLANTS
from tests.support.schedules.verdict import History, check_all
from tests.support.workload import Settings

CLIENTS = 3
JOB_S = 240.0
"""How long a job may take until it is over, its faults included."""
STUCK_S = 75.0
"""How long it may take from one step to the next."""
_LOOK_S = 0.1


@dataclass
class Report:
    """What came of a schedule."""

    schedule: Schedule
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ends: list[str] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    """How often the database refused the writer without a gate."""
    told: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        state = "ok" if not self.violations else f"{len(self.violations)} VIOLATIONS"
        lines = [f"{state} in {self.seconds:.1f} s: {self.schedule}"]
        lines.append(f"    {', '.join(self.ends)}; {dict(self.outcomes)}, {dict(self.errors)}, {self.refused} refused")
        lines += [f"  - {what}" for what in self.violations[:20]]
        return "\n".join(lines)


class Run:
    """One schedule in an arena.

    Args:
        arena: where.
        schedule: what.
        folder: for the records and logs of its processes.
        plant: a fault to put into the runners or the clients.
    """

    def __init__(self, arena: Arena, schedule: Schedule, folder: Path, plant: str | None = None) -> None:
        self.arena, self.schedule, self.folder = arena, schedule, folder
        self.client_plant = plant if plant in CLIENT_PLANTS else None
        self.runner_plant = plant if plant in PLANTS else None
        self.rng = random.Random(f"run {schedule.seed}")
        self.report = Report(schedule)
        self.outside: list[Write] = []

    def go(self) -> Report:
        """Run it to its end; what the run itself finds wrong is a violation too."""
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.arena.place(self.schedule) as place:
            try:
                self._go(place)
            except Exception as error:  # noqa: BLE001 - told, with what it is about
                self.report.violations.append(f"the run broke: {type(error).__name__}: {error}"[:2000])
        self.report.seconds = time.monotonic() - began
        (self.folder / "report.txt").write_text(f"{self.report}\n" + "\n".join(self.report.told) + "\n")
        return self.report

    def _go(self, place: Place) -> None:
        jobs: list[Job] = []
        with ExitStack() as stack:
            manager = stack.enter_context(Manager.sync(place.url))
            clients = self._clients(place, stack)
            runners = self._runners(place, stack)
            breaker = Breaker(self.arena, place, runners, clients)
            for runner in runners:
                runner._reached = breaker.reached
                runner.start()
            try:
                for plan in self.schedule.jobs:
                    jobs.append(self._job(place, manager, plan, breaker))
                    if not jobs[-1].status.over:
                        break
            finally:
                breaker.disarm()
                self.arena.mend()
                self.report.struck.update(breaker.struck)
                self.report.told = breaker.told
                self._end(clients)
                for runner in runners:
                    runner.kill()
            if breaker.failures:
                raise breaker.failures[0]
            if codes := [code for runner in runners for code in runner.ended]:
                self.report.violations.append(f"runners ended with {codes}: see {self.folder}/runner-*.log")
        self._judge(place, jobs)

    def _clients(self, place: Place, stack: ExitStack) -> list[ForkServerProcess]:
        through = {}
        catalog = open_catalog(place.url)
        try:
            for shard in catalog.load().shards:
                proxy = self.arena.client_ways[place.shards.index(shard.name)]
                through[shard.id] = _with_path(proxy.dsn, place.name)
                straight = place.dsns[place.shards.index(shard.name)]
                self._straight = {**getattr(self, "_straight", {}), shard.id: straight}
        finally:
            catalog.close()
        started = []
        for number in range(CLIENTS):
            settings = Settings(
                url=place.url if number == 0 else _with_path(self.arena.client_etcd.dsn, place.name),
                out=str(self.folder / f"client-{number}.jsonl"),
                seed=f"{self.schedule.seed}:{number}",
                seconds=JOB_S * 4,
                own=list(KEYS[number::CLIENTS]),
                keys=list(KEYS),
                facade=("sync", "asyncio", "sync")[number],
                endpoints=self._straight if number == 2 else through,
                isolation=self.schedule.isolation if number == 0 else None,
            )
            log = str(self.folder / f"client-{number}.log")
            process = processes.start(client.main, settings, self.schedule.two_phase, self.client_plant, log)
            stack.callback(processes.end, process)
            started.append(process)
        files = [self.folder / f"client-{number}.jsonl" for number in range(CLIENTS)]
        eventually(lambda: all(one.exists() and one.stat().st_size for one in files), 60, "every client works")
        return started

    def _runners(self, place: Place, stack: ExitStack) -> list[RunnerProcess]:
        runners = []
        for number, way in enumerate(self.arena.runner_etcd):
            url = _with_path(way.dsn, place.name)
            log = self.folder / f"runner-{number}.log"
            runner = RunnerProcess(number, url, log, self.runner_plant, lambda *_: None)
            stack.callback(runner.kill)
            runners.append(runner)
        return runners

    def _job(self, place: Place, manager: BlockingManager, plan: JobPlan, breaker: Breaker) -> Job:
        topology = manager.topology()
        job = begin(manager, topology, plan)
        parties = tuple(place.shards.index(topology.shard(one).name) for one in job.shards)
        token = hash_of(topology.hash_function)
        owner_of = {key: topology.place(token(key.encode())).shard for key in KEYS}
        exposed = {
            key: place.dsns[place.shards.index(shard.name)]
            for key, shard in owner_of.items()
            if shard.id in job.sources
        }
        outsider = Outsider(exposed, random.Random(self.rng.random()))
        asked = _Asking(manager, job.id, plan, outsider)
        breaker.before_step = asked.at_step
        breaker.arm(plan.strikes, parties)
        settler = _Settler(place.url)
        with outsider:
            try:
                job = asked.follow(settler)
            finally:
                breaker.before_step = lambda step: None
                breaker.disarm()
                settler.close()
        self.outside += outsider.writes
        took = "; ".join([job.status.value, *([f"error {job.error}"] if job.error else [])])
        self.report.ends.append(f"{job.kind.value} of {len(job.legs)} legs: {took} after {job.attempts} attempts")
        if not job.status.over:
            self.report.violations.append(f"job {job.id} does not rest: {job.status.value}, {job.error}")
        elif job.status is not asked.wanted:
            self.report.violations.append(
                f"job {job.id} was to be {asked.wanted.value}, and is {job.status.value}: {job.error}"
            )
        return job

    def _end(self, clients: list[ForkServerProcess]) -> None:
        for process in clients:
            processes.send(process, signal.SIGCONT)
            processes.send(process, signal.SIGTERM)
        for number, process in enumerate(clients):
            process.join(40)
            code = process.exitcode
            if code is None:
                self.report.violations.append(f"client {number} does not end")
            elif code:
                tail = (self.folder / f"client-{number}.log").read_text()[-1500:]
                self.report.violations.append(f"client {number} ended with {code}: {tail}")

    def _judge(self, place: Place, jobs: list[Job]) -> None:
        with ShardedEngine(place.url) as engine:
            eventually(lambda: not engine.settle(older_than_s=0), 20, "no transaction is in doubt")
            topology = engine.topology
        history = History(self.folder / f"client-{number}.jsonl" for number in range(CLIENTS))
        history.events[Write] += self.outside
        lines = [json.dumps({"kind": "Write", **asdict(write)}) for write in self.outside]
        (self.folder / "outside.jsonl").write_text("".join(line + "\n" for line in lines))
        self.report.outcomes, self.report.errors = history.outcomes, history.errors
        self.report.refused = sum("SL002" in one.error or "moved" in one.error for one in self.outside)
        catalog = open_catalog(place.url)
        try:
            topology = catalog.load()
        finally:
            catalog.close()
        if all(job.status.over for job in jobs):  # else rows are under way
            self.report.violations += check_all(place, topology, jobs, history)


class _Asking:
    """The operator of one job: asks what its plan says, until it is heard."""

    def __init__(self, manager: BlockingManager, job_id: int, plan: JobPlan, outsider: Outsider) -> None:
        self.manager, self.job_id, self.plan, self.outsider = manager, job_id, plan, outsider
        self.cancel_now = False
        self.wanted = {
            "complete": Status.COMPLETED, "rollback": Status.ROLLED_BACK, "cancel": Status.CANCELLED
        }[plan.ending]  # fmt: skip
        self._switched_at: float | None = None
        self._stepped_at = time.monotonic()

    def at_step(self, step: str) -> None:
        """Told each step while the runner waits there."""
        self._stepped_at = time.monotonic()
        if self.plan.ending == "cancel" and step == self.plan.cancel_step:
            self.cancel_now = True

    def follow(self, settler: _Settler) -> Job:
        """Until the job is over, or its time is."""
        until = time.monotonic() + JOB_S
        job: Job | None = None
        last: Exception | None = None
        cancelled = asked = False
        while time.monotonic() < min(until, self._stepped_at + STUCK_S):
            try:
                job = self.manager.get_job(self.job_id)
                if job.status.over:
                    return job
                settler.now_and_then()
                if self.cancel_now and not cancelled:
                    cancelled = self._cancel()
                if job.status is Status.VALIDATION and not asked:
                    asked = self._decide()
            except (CatalogUnavailable, ShardlibError) as error:
                last = error
            time.sleep(_LOOK_S)
        with suppress(CatalogUnavailable):
            job = self.manager.get_job(self.job_id)
        assert job is not None, f"the job cannot be read: {last}"
        return job

    def _cancel(self) -> bool:
        with suppress(InvalidTopology):  # it has switched by now
            self.manager.cancel(self.job_id)
        return True

    def _decide(self) -> bool:
        if self._switched_at is None:
            self._switched_at = time.monotonic()
        if time.monotonic() - self._switched_at < self.plan.dwell_s:
            return False
        ending = self.plan.ending
        if ending == "cancel":  # it was too late for that
            ending = "rollback" if self.plan.picks[0] < 0.5 else "complete"
        if ending == "rollback":
            self.wanted = Status.ROLLED_BACK
            self.manager.rollback(self.job_id)
        else:
            self.wanted = Status.COMPLETED
            self.outsider.stop()
            self.manager.complete(self.job_id)
        return True


class _Settler:
    """Settles two-phase transactions in doubt every second, as an engine does every minute."""

    def __init__(self, url: str) -> None:
        self._engine = ShardedEngine(url)
        self._last = time.monotonic()

    def now_and_then(self) -> None:
        if time.monotonic() - self._last > 1.0:
            self._last = time.monotonic()
            self._engine.settle(older_than_s=2.0)

    def close(self) -> None:
        self._engine.dispose()


def begin(manager: BlockingManager, topology: Topology, plan: JobPlan) -> Job:
    """A job of the plan's kind, or a split where that kind has nothing to do."""
    names = [shard.name for shard in topology.shards]
    owners = [shard.name for shard in topology.owners()]
    idle = [name for name in names if name not in owners]
    rng = random.Random(f"{plan.picks}")
    source = rng.choice(owners)
    others = [name for name in names if name != source]
    match plan.kind:
        case "merge" if len(owners) > 1:
            sources = rng.sample(owners, rng.randint(1, len(owners) - 1))
            target = rng.choice([name for name in names if name not in sources])
            return manager.merge(sources, target={"shard_id": target})
        case "rebalance" if idle:
            return manager.rebalance(target={"shard_id": rng.choice(idle)})
        case "drain" if len(owners) > 1:
            return manager.drain(source)
        case "move_keys":
            token = hash_of(topology.hash_function)
            target = rng.choice(names)
            away = [key for key in KEYS if topology.place(token(key.encode())).shard.name != target]
            if away:
                keys = rng.sample(away, min(len(away), rng.randint(1, 8)))
                return manager.move_keys(keys, target={"shard_id": target})
    targets = rng.sample(others, rng.randint(1, len(others)))
    return manager.split(source, targets=[{"shard_id": name} for name in targets])
