"""Client processes under load while somebody changes gates, moves ranges and breaks servers; then the verdict."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import insert

from shardlib import ShardedEngine
from shardlib.token import hash_of
from shardlib.topology import Topology
from tests.support.history import Held, Read, Write, check
from tests.support.workload import Settings, counter, end_of, metadata, register


@dataclass
class Verdict:
    """What a run showed: violations, and figures that prove that it was a run worth the name."""

    violations: list[str]
    outcomes: Counter[str]
    reads: int
    errors: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{dict(self.outcomes)} writes, {self.reads} reads, errors {dict(self.errors)}; "
            f"{len(self.violations)} violations"
        )


class Hammer:
    """Starts the clients, freezes some at random, and collects what they were told."""

    def __init__(self, folder: Path, urls: Sequence[str], keys: Sequence[str], rng: random.Random) -> None:
        self.folder, self.urls, self.keys, self.rng = folder, list(urls), list(keys), rng
        self._processes: list[subprocess.Popen[bytes]] = []
        self._files: list[Path] = []
        self.frozen = 0

    def prepare(self, url: str) -> None:
        """Tables, and a row of each key in the counter and the register."""
        with ShardedEngine(url) as engine:
            engine.create_all(metadata)
            for key in self.keys:
                with engine.session(key) as session:
                    session.execute(insert(counter).values(key=key, v=0))
                    session.execute(insert(register).values(key=key, v=0))
                    session.commit()

    @contextmanager
    def clients(
        self, count: int, seconds: float, *, endpoints: Sequence[dict[str, str]] = ({},), **settings: Any
    ) -> Iterator[None]:
        """`count` client processes for `seconds`; half of them asyncio. Waits for their end.

        `endpoints` is dealt out in pairs, so that each kind of way to the shards has clients of both facades.
        """
        try:
            for number in range(count):
                out = self.folder / f"client-{number}.jsonl"
                self._files.append(out)
                chosen = Settings(
                    url=self.urls[number % len(self.urls)],
                    out=str(out),
                    seed=f"{self.rng.random()}",
                    seconds=seconds,
                    own=self.keys[number::count],
                    keys=self.keys,
                    facade=("sync", "asyncio")[number % 2],
                    endpoints=endpoints[number // 2 % len(endpoints)],
                    **settings,
                )
                log = (self.folder / f"client-{number}.log").open("wb")
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.support.workload", json.dumps(asdict(chosen))],
                        stdout=log,
                        stderr=log,
                    )
                )
                log.close()
            yield
            for process in self._processes:
                process.wait(timeout=seconds + 60)
        finally:
            for process in self._processes:
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGCONT)
                    process.kill()
                    process.wait()
        bad = [(n, p.returncode) for n, p in enumerate(self._processes) if p.returncode]
        if bad:
            logs = "\n".join((self.folder / f"client-{n}.log").read_text()[-3000:] for n, _ in bad)
            raise AssertionError(f"clients ended with {bad}\n{logs}")

    def end(self) -> None:
        """Tell every client that it was enough."""
        for out in self._files:
            end_of(out).touch()

    @property
    def running(self) -> bool:
        """Whether a client still works."""
        return any(process.poll() is None for process in self._processes)

    @property
    def working(self) -> bool:
        """Whether every client has written down an operation."""
        return all(path.exists() and path.stat().st_size for path in self._files)

    @contextmanager
    def one_frozen(self) -> Iterator[None]:
        """A client at random is stopped (SIGSTOP), and wakes up afterwards with what it knew."""
        process = self.rng.choice(self._processes)
        if process.poll() is not None:
            yield
            return
        process.send_signal(signal.SIGSTOP)
        self.frozen += 1
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def verdict(self, topology: Topology) -> Verdict:
        """Read every client's record and every shard, and hold them against each other."""
        writes, reads = self._events()
        token = hash_of(topology.hash_function)
        owners = {key: topology.place(token(key.encode())).shard.name for key in self.keys}
        violations = check(writes, reads, [held_by(topology, shard.id) for shard in topology.shards], owners)
        errors = Counter(write.error.split(":")[0] for write in writes if write.error)
        return Verdict(violations, Counter(write.outcome for write in writes), len(reads), errors)

    def _events(self) -> tuple[list[Write], list[Read]]:
        writes: list[Write] = []
        reads: list[Read] = []
        for path in self._files:
            for line in path.read_text(encoding="utf-8").splitlines():
                event = json.loads(line)
                if event.pop("kind") == "Write":
                    writes.append(Write(**event))
                else:
                    reads.append(Read(**event))
        return writes, reads


def held_by(topology: Topology, shard_id: str) -> Held:
    """Everything that the test's tables hold on one shard."""
    shard = topology.shard(shard_id)
    with psycopg.connect(shard.primary.conninfo(connect_timeout=5)) as conn:
        bag: dict[str, list[str]] = defaultdict(list)
        for key, uid in conn.execute("SELECT key, uid FROM bag"):
            bag[key].append(uid)
        counters = dict(conn.execute("SELECT key, v FROM counter").fetchall())
        registers = dict(conn.execute("SELECT key, v FROM register").fetchall())
    return Held(shard.name, bag, counters, registers)


def soak_seconds(default: float) -> float:
    """Length of a run: `SHARDLIB_SOAK_S`, or the default."""
    return float(os.environ.get("SHARDLIB_SOAK_S", default))


def pause(seconds: float) -> None:
    """Let the clients work: the length of a fault, not a wait for an event."""
    time.sleep(seconds)
