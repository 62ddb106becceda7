"""Does the faults of a schedule, mends each when its time is over, and counts them."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from shardlib_ops.local import LocalServer
from tests.support.schedules import processes, runner
from tests.support.schedules.arena import Arena, Place
from tests.support.schedules.plan import Strike


class RunnerProcess:
    """A runner, started again after it was killed.

    Args:
        number: which one.
        url: of the catalog.
        log: file for what it says.
        plant: a fault put into it.
        reached: told each step that it is at; the runner waits meanwhile.
    """

    def __init__(
        self, number: int, url: str, log: Path, plant: str | None, reached: Callable[[RunnerProcess, str], None]
    ) -> None:
        self.number, self._url, self._log, self._plant, self._reached = number, url, log, plant, reached
        self._process: ForkServerProcess | None = None
        self._lock = threading.Lock()
        self.ended: list[int | None] = []
        """Exit codes of those that ended though nobody killed them."""

    def start(self) -> None:
        with self._lock:
            mine, its = processes.context().Pipe()
            process = processes.start(runner.main, self._url, self._plant, its, str(self._log))
            its.close()
            self._process = process
        threading.Thread(target=self._listen, args=(process, mine), name=f"runner-{self.number}", daemon=True).start()

    def _listen(self, process: ForkServerProcess, pipe: Connection[str, str]) -> None:
        try:
            while True:
                self._reached(self, pipe.recv())
                pipe.send("go")
        except (EOFError, OSError):
            pipe.close()
        with self._lock:
            process.join(20)
        if process.exitcode != -signal.SIGKILL:
            self.ended.append(process.exitcode)

    def kill(self) -> None:
        with self._lock:
            if self._process is not None:
                processes.end(self._process)

    def send(self, number: signal.Signals) -> None:
        if self._process is not None:
            processes.send(self._process, number)


class Breaker:
    """One job's strikes: those at a step are done while the runner waits there, the others by the clock."""

    def __init__(
        self, arena: Arena, place: Place, runners: list[RunnerProcess], clients: list[ForkServerProcess]
    ) -> None:
        self.arena, self.place, self.runners, self.clients = arena, place, runners, clients
        self.struck: Counter[str] = Counter()
        self.left_out: list[str] = []
        self.steps: list[str] = []
        self.failures: list[BaseException] = []
        self.told: list[str] = []
        self.active = runners[0]
        self._began = time.monotonic()
        self._strikes: list[Strike] = []
        self._counts: Counter[str] = Counter()
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []
        self._mends: dict[str, Callable[[], None]] = {}
        self.parties: tuple[int, ...] = ()
        """The servers of the job's shards."""
        self.before_step: Callable[[str], None] = lambda step: None

    def arm(self, strikes: tuple[Strike, ...], parties: tuple[int, ...]) -> None:
        """A job begins."""
        with self._lock:
            self._strikes = [one for one in strikes if one.step is not None]
            self._counts.clear()
            self.parties = parties
        for strike in strikes:
            if strike.step is None:
                self._after(strike.at_s, lambda strike=strike: self._strike(strike))

    def disarm(self) -> None:
        """A job is over: what did not come to pass is left out, what is broken is mended."""
        with self._lock:
            self.left_out += [str(one) for one in self._strikes]
            self._strikes = []
            timers, self._timers = self._timers, []
        for timer in timers:
            timer.cancel()
        for timer in timers:
            timer.join(30)
        with self._lock:
            mends, self._mends = list(self._mends.values()), {}
            self._busy.clear()
        for mend in mends:
            mend()

    def reached(self, runner: RunnerProcess, step: str) -> None:
        """A runner is at a step, and waits."""
        with self._lock:
            self.active = runner
            self._counts[step] += 1
            self.told.append(f"{time.monotonic() - self._began:.2f} runner {runner.number}: {step}")
            due = [one for one in self._strikes if one.step == step and one.nth <= self._counts[step]]
            self._strikes = [one for one in self._strikes if one not in due]
        try:
            self.before_step(step)
            for strike in due:
                self._strike(strike)
        except BaseException as error:  # noqa: BLE001 - raised at the end, in the driver's thread
            self.failures.append(error)

    def _after(self, seconds: float, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised at the end, in the driver's thread
                self.failures.append(error)

        timer = threading.Timer(seconds, guarded)
        timer.daemon = True
        with self._lock:
            self._timers.append(timer)
        timer.start()

    def _take(self, what: str) -> bool:
        """Whether nothing else is broken about this thing now."""
        with self._lock:
            if what in self._busy:
                return False
            self._busy.add(what)
            return True

    def _strike(self, strike: Strike) -> None:
        what, work, mend = self._fault(strike)
        if not self._take(what):
            self.left_out.append(f"{strike} ({what} is broken already)")
            return
        self.struck[strike.fault] += 1
        with self._lock:
            self.told.append(f"{time.monotonic() - self._began:.2f} {strike.fault}: {what}, {strike.lasts_s:.1f} s")
        if mend is not None:
            with self._lock:
                self._mends[what] = mend
        work()
        if mend is None:
            with self._lock:
                self._busy.discard(what)
            return

        def mended() -> None:
            with self._lock:
                mine = self._mends.pop(what, None)
            if mine is not None:
                mine()
                with self._lock:
                    self.told.append(f"{time.monotonic() - self._began:.2f} mended: {what}")
                    self._busy.discard(what)

        self._after(strike.lasts_s, mended)

    def _fault(self, strike: Strike) -> tuple[str, Callable[[], None], Callable[[], None] | None]:
        """(what is struck, how, how it is mended)."""
        kind, _, how = strike.fault.partition(" ")
        if strike.fault.startswith("client"):
            return self._client_fault(strike)
        if kind.startswith("runner"):
            return self._runner_fault(strike)
        broken: Any
        if kind == "postgres":
            index = self.parties[int(strike.pick * len(self.parties))]
            broken, name = self.arena.servers[index], f"server {index + 1}"
        else:
            broken, name = self.arena.cluster.etcd[0], "etcd"
        verb, mend = {
            "killed": (broken.kill, broken.start),
            "stopped": (_stop_fast(broken), broken.start),
            "paused": (broken.pause, broken.resume),
        }[how]
        return name, verb, mend

    def _runner_fault(self, strike: Strike) -> tuple[str, Callable[[], None], Callable[[], None] | None]:
        runner = self.active
        name, way = f"runner {runner.number}", self.arena.runner_etcd[runner.number]
        index = self.parties[int(strike.pick * len(self.parties))]
        proxy = self.arena.runner_ways[index]
        times = 1 + int(strike.pick * 10) % 3
        match strike.fault:
            case "runner killed":
                return name, runner.kill, runner.start
            case "runner frozen":
                return name, lambda: runner.send(signal.SIGSTOP), lambda: runner.send(signal.SIGCONT)
            case "runner cut off from etcd":
                return f"etcd of {name}", lambda: _noted(way.down()), way.accept
            case "runner's connections cut":
                return f"way to server {index + 1}", lambda: _noted(proxy.cut()), None
            case "runner's commit reply lost":
                return f"way to server {index + 1}", lambda: proxy.cut_at("COMMIT", times=times), None
            case _:
                return f"way to server {index + 1}", lambda: proxy.cut_at("COMMIT", forwarded=False, times=times), None

    def _client_fault(self, strike: Strike) -> tuple[str, Callable[[], None], Callable[[], None] | None]:
        number = int(strike.pick * len(self.clients))
        index = self.parties[int(strike.pick * 100) % len(self.parties)]
        proxy, client = self.arena.client_ways[index], self.clients[number]
        match strike.fault:
            case "client frozen":
                return (
                    f"client {number}",
                    lambda: processes.send(client, signal.SIGSTOP),
                    lambda: processes.send(client, signal.SIGCONT),
                )
            case "clients cut off from etcd":
                return "etcd of clients", lambda: _noted(self.arena.client_etcd.down()), self.arena.client_etcd.accept
            case "clients' connections cut":
                return f"clients' way to server {index + 1}", lambda: _noted(proxy.cut()), None
            case _:
                times = 1 + int(strike.pick * 10) % 4
                return f"clients' way to server {index + 1}", lambda: proxy.cut_at("COMMIT", times=times), None


def _noted(count: int) -> None:
    """Counted by the proxy itself."""


def _stop_fast(broken: Any) -> Callable[[], None]:
    """A shutdown in its order; of PostgreSQL one that waits for no stream, since a frozen runner reads none."""
    if isinstance(broken, LocalServer):
        return lambda: broken.stop(immediate=True)
    stop: Callable[[], None] = broken.stop
    return stop
