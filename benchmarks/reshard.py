"""A shard is split, taken back and split again while clients write: how long they wait, and how much slower they are.

The clients are threads of a process of their own, as an application is, and begin each write when it is due, however
long the one before took. Their times and those of the job's steps are of the machine's one monotonic clock.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

from sqlalchemy import BigInteger, Column, MetaData, String, Table, update

from benchmarks.report import Row, at_most
from shardlib import ShardedEngine
from shardlib_ops import LocalCluster, Manager, Resharder
from shardlib_ops.local import LocalServer
from shardlib_ops.reshard.job import Job, Status

__all__ = ["run"]

_ROWS: Final = 1_000_000
_KEYS_MAX: Final = 20_000
"""Keys that the clients of a group choose from, at most."""
_LIMIT_S: Final = 60.0
_JOB_LIMIT_S: Final = 900.0
_WARM_UP_S: Final = 0.5

metadata = MetaData()
item = Table(
    "item",
    metadata,
    Column("key", String, primary_key=True, info={"shard_key": True}),
    Column("v", BigInteger, nullable=False),
    Column("note", String, nullable=False),
)


@dataclass(frozen=True)
class _Group:
    """Clients that write to the same kind of keys: `threads` of them, `per_s` writes a second together."""

    keys: Sequence[str]
    threads: int
    per_s: float


@dataclass(frozen=True)
class _Write:
    """One transaction of one statement. `error` is empty if it was committed."""

    group: str
    began: float
    ended: float
    error: str


@dataclass(frozen=True)
class _Span:
    """From one moment to another."""

    began: float
    ended: float

    def overlapping(self, writes: Iterable[_Write]) -> list[_Write]:
        return [write for write in writes if write.began <= self.ended and write.ended >= self.began]


def _clients(url: str, groups: Mapping[str, _Group], pipe: Connection) -> None:
    """The body of the process: writes until it is told to end, and answers with what it saw."""
    done: list[_Write] = []  # append is atomic
    end = threading.Event()

    def client(name: str, group: _Group, number: int) -> None:
        rng, every_s = random.Random(f"{name} {number}"), group.threads / group.per_s
        due = time.monotonic() + rng.uniform(0, every_s)
        while not end.wait(max(0.0, due - time.monotonic())):
            key = rng.choice(group.keys)
            change = update(item).where(item.c.key == key).values(v=item.c.v + 1)
            began, error = time.monotonic(), ""
            try:
                with engine.session(key) as session:
                    result: Any = session.execute(change)
                    session.commit()
                if result.rowcount != 1:
                    error = f"{key} was not there"
            except Exception as failure:  # noqa: BLE001 - every kind is counted, and none is expected
                error = repr(failure)[:200]
            ended = time.monotonic()
            done.append(_Write(name, began, ended, error))
            due = max(due + every_s, ended)

    with ShardedEngine(url, pool_size=sum(group.threads for group in groups.values())) as engine:
        threads = [
            threading.Thread(target=client, args=(name, group, number), daemon=True)
            for name, group in groups.items()
            for number in range(group.threads)
        ]
        for thread in threads:
            thread.start()
        pipe.send("ready")
        pipe.recv()
        end.set()
        for thread in threads:
            thread.join(_LIMIT_S)
            assert not thread.is_alive(), "a write hangs"
    pipe.send(done)


def _answer(pipe: Connection, what: str) -> Any:
    if not pipe.poll(_LIMIT_S):
        raise AssertionError(f"the clients {what}")
    return pipe.recv()


@contextmanager
def _writing(url: str, groups: Mapping[str, _Group]) -> Iterator[Callable[[], list[_Write]]]:
    """Clients at work, and a function that ends them and returns what they saw."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_clients, args=(url, groups, theirs), daemon=True)
    process.start()

    def ended() -> list[_Write]:
        pipe.send(None)
        writes: list[_Write] = _answer(pipe, "did not end")
        process.join(_LIMIT_S)
        return writes

    try:
        _answer(pipe, "did not start")
        yield ended
    finally:
        if process.is_alive():
            process.terminate()
        process.join(_LIMIT_S)
        pipe.close()


@dataclass
class _Steps:
    """When each step of one run of a job was done."""

    began: float = field(default_factory=time.monotonic)
    done: list[tuple[str, float]] = field(default_factory=list)

    def at(self, step: str) -> float:
        """When a step was done for the last time."""
        return max(at for name, at in self.done if name == step)

    def span(self, first: str, last: str) -> _Span:
        return _Span(self.at(first), self.at(last))


@dataclass
class _Bench:
    """One cluster, and the jobs that move half of its first shard.

    Attributes:
        url: of the catalog.
        rest_s: seconds of the quiet times that are compared with.
        cutovers: what was switched, and when its ranges were closed.
        copies: when rows were copied beside the clients.
    """

    url: str
    rest_s: float
    cutovers: list[tuple[str, _Span]] = field(default_factory=list)
    copies: list[_Span] = field(default_factory=list)

    async def drive(self, job: Job, status: Status, on_step: Callable[[str], Awaitable[None]] | None = None) -> _Steps:
        """Run a job until it rests, which has to be in this status."""
        steps = _Steps()

        async def note(step: str) -> None:
            steps.done.append((step, time.monotonic()))
            if on_step is not None:
                await on_step(step)

        async with asyncio.timeout(_JOB_LIMIT_S), Resharder(self.url, on_step=note) as resharder:
            job = await resharder.run(job.id)
        assert job.status is status, f"job {job.id} is {job.status.value}: {job.error}"
        return steps

    async def split(self, job: Job) -> _Steps:
        steps = await self.drive(job, Status.VALIDATION)
        self.cutovers.append(("split", steps.span("gates_closed", "switched")))
        self.copies.append(steps.span("status_precopy", "leg_copied"))
        return steps

    async def roll_back(self, manager: Manager, job: Job) -> None:
        steps = await self.drive(await manager.rollback(job.id), Status.ROLLED_BACK)
        self.cutovers.append(("rollback", steps.span("gates_closed", "switched")))

    async def rest(self) -> _Span:
        """Time that passes without a job, when the clients have warmed up."""
        await asyncio.sleep(_WARM_UP_S)
        began = time.monotonic()
        await asyncio.sleep(self.rest_s)
        return _Span(began, time.monotonic())

    async def alone(self, manager: Manager, target: LocalServer) -> float:
        """Seconds of the pre-copy to an empty server when nobody writes; that job ends with it."""
        new = {"name": "quiet", "primary_endpoint": target.dsn}
        job = await manager.split("shard-01", targets=[new])

        async def cancel(step: str) -> None:
            if step == "leg_copied":
                await manager.cancel(job.id)

        copied = (await self.drive(job, Status.CANCELLED, cancel)).span("status_precopy", "leg_copied")
        return copied.ended - copied.began

    async def measure(self, targets: Sequence[LocalServer], rows: int, rollbacks: int) -> list[Row]:
        async with Manager(self.url) as manager:
            alone_s = await self.alone(manager, targets[0])
            new = {"name": "second", "primary_endpoint": targets[1].dsn}
            job = await manager.split("shard-01", targets=[new])
            moving, beside, other = await asyncio.to_thread(self._keys, job, rows)
            groups = {
                "moving": _Group(moving, 8, 500),
                "beside": _Group(beside, 2, 125),
                "other": _Group(other, 2, 125),
            }
            with _writing(self.url, groups) as end:
                quiet = await self.rest()
                first = await self.split(job)
                for _ in range(rollbacks):
                    await self.roll_back(manager, job)
                    again = await manager.split("shard-01", targets=[{"shard_id": "second"}])
                    # Else the clients of `moving` would not be what they are called.
                    assert set(again.legs[0].ranges) == set(job.legs[0].ranges)
                    job = again
                    await self.split(job)
                writes = await asyncio.to_thread(end)
            size = f"{rows:,} rows, half move"
            return [
                *self._pauses(quiet, writes),
                *_whole(first, alone_s, size),
                self._copying(quiet, writes, size),
                *await self._cleanup(manager, job, beside, size),
            ]

    def _keys(self, job: Job, rows: int) -> tuple[list[str], list[str], list[str]]:
        """Keys that move, others of the same shard, and keys of another shard; their rows are all there."""
        ranges = job.legs[0].ranges
        moving: list[str] = []
        beside: list[str] = []
        other: list[str] = []
        with ShardedEngine(self.url) as engine:
            for key in itertools.islice(_names(), min(rows, _KEYS_MAX * 4)):
                token = engine.token(key)
                if engine.shard_for(key).id != job.legs[0].source:
                    other.append(key)
                elif any(part.covers(token) for part in ranges):
                    moving.append(key)
                else:
                    beside.append(key)
        return moving[:_KEYS_MAX], beside[:_KEYS_MAX], other[:_KEYS_MAX]

    def _pauses(self, quiet: _Span, writes: Sequence[_Write]) -> list[Row]:
        """Of each cutover, then of all of them together; a write that failed has no time, but is counted."""
        by_group = {name: [w for w in writes if w.group == name] for name in ("moving", "beside", "other")}
        before = {name: _ms(quiet.overlapping(found)) for name, found in by_group.items()}
        held: dict[str, list[float]] = {name: [] for name in by_group}
        # Under the load of the job as well, but open.
        earlier: dict[str, list[float]] = {name: [] for name in by_group}
        found: list[Row] = []
        for number, (what, closed) in enumerate(self.cutovers, 1):
            for name, of_group in by_group.items():
                held[name] += _ms(closed.overlapping(of_group))
                second = _Span(closed.began - 1, closed.began)
                earlier[name] += _ms(write for write in second.overlapping(of_group) if write.ended < closed.began)
            longest = max(_ms(closed.overlapping(by_group["moving"])))
            took = (closed.ended - closed.began) * 1e3
            found.append(_shown(f"cutover {number}, {what}: longest write on the moved range; closed", longest, took))
        count, usual = len(self.cutovers), before["moving"]
        per_s = len(usual) / (quiet.ended - quiet.began)
        what = f"writes on the moved range, 8 clients, {per_s:.0f}/s, that met one of {count} cutovers"
        found += [
            at_most("reshard", f"p99 of {len(held['moving'])} {what}", _p(held["moving"], 99), None, "ms", 100,
                    aim="30 ms"),
            _shown("the same; a quiet time", _p(held["moving"], 99), _p(usual, 99)),
            _shown("longest of them; in a quiet time", max(held["moving"]), max(usual)),
            _shown("p50 of them; in the second before each", _p(held["moving"], 50), _p(earlier["moving"], 50)),
        ]  # fmt: skip
        for name, where in (("beside", "other keys of the same shard"), ("other", "another shard")):
            count = len(held[name])
            found += [
                # No pause: the longest of them is one as there are without a job.
                at_most("reshard", f"longest of {count} writes on {where} meanwhile; in a quiet time", max(held[name]),
                        max(before[name]), "ms", 1),
                _shown("p99 of the same; in a quiet time", _p(held[name], 99), _p(before[name], 99)),
                _shown("p99 of the same; in the second before each", _p(held[name], 99), _p(earlier[name], 99)),
                _shown("p50 of the same; in the second before each", _p(held[name], 50), _p(earlier[name], 50)),
            ]  # fmt: skip
        failed = _failed(writes)
        return [*found, at_most("reshard", f"failed of {len(writes):,} writes", failed, None, "writes", 0)]

    def _copying(self, quiet: _Span, writes: Sequence[_Write], size: str) -> Row:
        of_source = [write for write in writes if write.group != "other"]
        during = [ms for span in self.copies for ms in _ms(span.overlapping(of_source))]
        what = f"{size}: writers' p95 on the source during {len(self.copies)} copies; before"
        return at_most(
            "reshard", what, _p(during, 95), _p(_ms(quiet.overlapping(of_source)), 95), "ms", 2, aim="1.3x"
        )  # fmt: skip

    async def _cleanup(self, manager: Manager, job: Job, keys: Sequence[str], size: str) -> list[Row]:
        with _writing(self.url, {"beside": _Group(keys, 4, 500)}) as end:
            quiet = await self.rest()
            steps = await self.drive(await manager.complete(job.id), Status.COMPLETED)
            writes = await asyncio.to_thread(end)
        purge = steps.span("slots_dropped", "shard_purged")
        what = f"{size}: p95 of writers of staying rows during the {purge.ended - purge.began:.1f} s of cleanup; before"
        during, before = _ms(purge.overlapping(writes)), _ms(quiet.overlapping(writes))
        return [
            at_most("reshard", what, _p(during, 95), _p(before, 95), "ms", 1.3, aim="1.1x"),
            at_most("reshard", f"failed of these {len(writes):,} writes", _failed(writes), None, "writes", 0),
        ]


def _whole(steps: _Steps, alone_s: float, size: str) -> list[Row]:
    """Of the first split beside clients: from the moment a resharder takes the job to the switch."""
    whole_s = steps.at("switched") - steps.began
    copied = steps.span("status_precopy", "leg_copied")
    own_s = copied.ended - copied.began
    what = f"{size}: whole split under writes until the switch"
    found = [
        at_most("reshard", f"{what}; pre-copy alone, without writes", whole_s, alone_s, "s", 2.5, aim="1.5x"),
        Row("reshard", "the same; its own pre-copy", whole_s, own_s, "s", whole_s / own_s, ""),
    ]
    at = steps.began
    for name, last in (
        ("preparing", "status_precopy"),
        ("pre-copy", "leg_copied"),
        ("rest of the schema", "status_deltasync"),
        ("comparison of all rows", "leg_compared"),
        ("cutover with what leads to it", "switched"),
    ):
        took, at = steps.at(last) - at, steps.at(last)
        found.append(Row("reshard", f"of these: {name}; the whole", took, whole_s, "s", took / whole_s, ""))
    return found


def _shown(what: str, ours: float, baseline: float) -> Row:
    """A row of milliseconds without a bar."""
    return Row("reshard", what, ours, baseline, "ms", ours / baseline, "")


def _ms(writes: Iterable[_Write]) -> list[float]:
    return [(write.ended - write.began) * 1e3 for write in writes]


def _p(figures: Sequence[float], percent: int) -> float:
    return statistics.quantiles(figures, n=100, method="inclusive")[percent - 1]


def _failed(writes: Iterable[_Write]) -> int:
    """How many; the kinds are printed, since none is expected."""
    kinds = Counter(write.error for write in writes if write.error)
    for error, count in kinds.most_common(5):
        print(f"{count} writes failed: {error}")
    return kinds.total()


def _names() -> Iterator[str]:
    return (f"customer-{number:012d}" for number in itertools.count())


def _fill(cluster: LocalCluster, rows: int) -> None:
    """The table, with this many rows on the first shard, and as many on the other as fall there meanwhile."""
    with ShardedEngine(cluster.url) as engine:
        engine.create_all(metadata)

        def made() -> Iterator[tuple[str, int, str]]:
            first, left, note = engine.topology.shards[0].id, rows, "a note " * 18
            for key in _names():
                yield key, 0, note
                left -= engine.shard_for(key).id == first
                if not left:
                    return

        engine.bulk_load(item, made(), columns=["key", "v", "note"])
    for server in cluster.servers:
        with server.connect() as conn:
            conn.execute("VACUUM ANALYZE item")
            conn.execute("CHECKPOINT")


def run(scale: float = 1.0) -> list[Row]:
    """One split of a shard under 500 writes/s, with rollbacks and further splits, then its cleanup.

    Args:
        scale: part of a million rows on the shard, and of a minute of quiet time.
    """
    rows = max(5_000, round(_ROWS * scale))
    with LocalCluster(shards=2) as cluster:
        targets = [cluster.spare(name) for name in ("quiet", "second")]
        _fill(cluster, rows)
        bench = _Bench(cluster.url, rest_s=max(1.0, 60 * scale))
        return asyncio.run(bench.measure(targets, rows, 1 if scale < 0.1 else 3))
