"""The chapters of the demo after loading: each does something with the shards and checks what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import psycopg
from sqlalchemy import select

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.errors import CrossShardTransaction, ShardlibError, StaleTopology, UnsupportedCrossShardQuery
from shardlib_ops.demo import acts, fence
from shardlib_ops.demo.flights import Facts
from shardlib_ops.demo.latency import measure
from shardlib_ops.demo.models import Plane
from shardlib_ops.demo.teller import Teller

__all__ = ["Scene", "how_long", "many_keys", "many_tasks", "old_map", "one_key", "two_shards"]

_TASKS: Final = 64
_WRITERS: Final = 4
_GATES: Final = 5
_MANUFACTURER: Final = "EMBRAER"


@dataclass(frozen=True, slots=True)
class Scene:
    """What the chapters share.

    Attributes:
        planes: one of each shard, in the order of the shards.
    """

    teller: Teller
    url: str
    engine: ShardedEngine
    facts: Facts
    planes: list[str]


def one_key(scene: Scene) -> None:
    """Work on one shard."""
    teller, engine, tailnum = scene.teller, scene.engine, scene.planes[0]
    shard = engine.shard_for(tailnum).name
    teller.chapter(f"One key: plane {tailnum}")
    teller.step("The ORM finds the shard in the WHERE; the plane, its flights and their airlines are all there:")
    with _shown(teller, acts.plane_with_flights) as took:
        plane = acts.plane_with_flights(engine, tailnum)
    airlines = sorted({flight.airline.name for flight in plane.flights})
    flown = f"{len(plane.flights)} flights by {' and '.join(airlines)}"
    teller.found(f"{shard}: {plane.manufacturer} {plane.model}, {flown}  {took()}")
    teller.check("as many flights as in the file", len(plane.flights) == scene.facts.flights_of[tailnum])

    teller.step("Core, on the key's shard: all of SQL works there. Airports are a reference table:")
    with _shown(teller, acts.favourite_destinations) as took:
        favourites = acts.favourite_destinations(engine, tailnum)
    places = ", ".join(f"{name} {'once' if count == 1 else f'{count} times'}" for name, count in favourites)
    teller.found(f"{shard}: {places}  {took()}")


def many_keys(scene: Scene) -> None:
    """Statements on several shards, and what cannot be done on them."""
    teller, engine, facts = scene.teller, scene.engine, scene.facts
    teller.chapter("Many keys")
    some = scene.planes[:3]
    teller.step("Several keys: only the shards that have them are asked, side by side:")
    with _shown(teller, acts.several_planes) as took:
        found = acts.several_planes(engine, some)
    homes = ", ".join(f"{plane.tailnum} from {engine.shard_for(plane.tailnum).name}" for plane in found)
    teller.found(f"{homes}  {took()}")
    teller.check("each of them once", sorted(plane.tailnum for plane in found) == sorted(some))

    teller.step("No key: every shard is asked, side by side:")
    with _shown(teller, acts.planes_made_by) as took:
        found = acts.planes_made_by(engine, _MANUFACTURER)
    teller.found(f"{len(found)} planes by {_MANUFACTURER}, from {len(engine.topology.shards)} shards  {took()}")
    of_file = facts.made_by[_MANUFACTURER]
    teller.check("the same planes as in the file", sorted(plane.tailnum for plane in found) == sorted(of_file))

    teller.step(
        "ORDER BY and LIMIT over all shards: their rows would have to be merged. Refused, not answered wrongly."
    )
    teller.code(acts.longest_delays)
    refused = _refusal(UnsupportedCrossShardQuery, lambda: acts.longest_delays(engine))
    teller.expect(refused, "the longest delays of all shards at once are refused")
    teller.step("What to write instead: ask each shard by a key of its own, and put the parts together.")
    with _shown(teller, acts.longest_delays_of_each_shard) as took:
        delays = acts.longest_delays_of_each_shard(engine, scene.planes)
    teller.found(f"the longest delays: {', '.join(map(str, delays))} minutes  {took()}")
    teller.check("the same as in the file", delays == facts.longest_delays)


def two_shards(scene: Scene) -> None:
    """A write on two shards."""
    teller, engine = scene.teller, scene.engine
    teller.chapter("One transaction, two shards")
    first, second = scene.planes[:2]
    teller.say(f"Two seats go from {first} to {second}, a plane on another shard.")
    teller.code(acts.move_seats)
    before = _seats(engine, first, second)

    def without_twophase() -> None:
        with engine.session() as session:
            acts.move_seats(session, first, second)

    teller.expect(_refusal(CrossShardTransaction, without_twophase), "refused without two-phase commit")
    teller.check("and nothing was written", _seats(engine, first, second) == before)
    with engine.session(twophase=True) as session:
        acts.move_seats(session, first, second)
    teller.found("with engine.session(twophase=True) it is done: on both shards or on none")
    after = _seats(engine, first, second)
    teller.check(f"seats {before} became {after}", after == [before[0] - 2, before[1] + 2])


def many_tasks(scene: Scene) -> None:
    """Work from asyncio."""
    teller = scene.teller
    teller.chapter(f"asyncio: {_TASKS} tasks at once")
    tailnums = [tailnum for tailnum, _ in scene.facts.flights_of.most_common(_TASKS)]
    teller.say("The same names, awaited.")
    with _shown(teller, acts.count_flights) as took:
        counted = asyncio.run(acts.count_flights(scene.url, tailnums))
    teller.found(f"{sum(counted):,} flights of {len(tailnums)} planes, the engine's start included  {took()}")
    expected = [scene.facts.flights_of[tailnum] for tailnum in tailnums]
    teller.check("for each plane as many as in the file", counted == expected)


def old_map(scene: Scene) -> None:
    """The fence."""
    teller, engine, shard = scene.teller, scene.engine, scene.engine.shard_for(scene.planes[0])
    there = [each for each, _ in scene.facts.flights_of.most_common() if engine.shard_for(each) == shard]
    tailnums = there[:_WRITERS]
    teller.chapter("A client with an old map")
    teller.say(
        "Each transaction passes a gate in its shard's database, in the same message as BEGIN. Whoever moves rows "
        "closes it, and then a client that has not heard of it cannot write to where they were."
    )
    teller.step("One client is cut off: it starts from a map that it once saved, and no catalog answers it. It warns:")
    with (
        closing(open_catalog(scene.url)) as catalog,
        psycopg.connect(shard.primary.conninfo(), autocommit=True) as server,
        TemporaryDirectory() as folder,
        fence.cut_off(scene.url, Path(folder) / "map") as lost,
    ):
        fence.inspect(lost, tailnums[0])
        teller.found(f"{lost!r} started from its saved map, and can write")
        teller.step("The operator's side, while other clients write:")
        teller.code(fence.renew_gate)
        closed: list[bool] = []
        with fence.AtWork(engine, tailnums) as clients:
            for _ in range(_GATES):
                clients.wait_for_more(100)
                closed.append(fence.renew_gate(server, catalog, shard.id).closed)
            clients.wait_for_more(100)
        teller.found(
            f"{shard.name} changed its gate {_GATES} times under {len(tailnums)} clients: {clients.committed:,} "
            f"transactions, {len(clients.errors)} errors"
        )
        teller.check(
            "every old gate is closed, and the clients at work noticed nothing", all(closed) and not clients.errors
        )
        refused = _refusal(StaleTopology, lambda: fence.inspect(lost, tailnums[0]))
        teller.expect(refused, "the one that heard of nothing is refused")
    with engine.session() as session:
        written = session.scalars(select(Plane.inspections).where(Plane.tailnum.in_(tailnums))).all()
    teller.check("each acknowledged write is there, once", sum(written) == clients.committed + 1)
    teller.summary["fence"] = {"gates": _GATES, "transactions": clients.committed, "errors": len(clients.errors)}


def how_long(scene: Scene, rounds: int) -> None:
    """Latency."""
    teller, engine = scene.teller, scene.engine
    teller.chapter("What it costs")
    shard = engine.shard_for(scene.planes[0])
    tailnums = [tailnum for tailnum in scene.facts.flights_of if engine.shard_for(tailnum) == shard]
    with teller.progress("asking", rounds) as moved:
        found = measure(engine, tailnums, rounds, moved)
    direct = found[0]
    teller.say(f"One plane by its key, {rounds:,} times by each way, in turn, on {shard.name}:")
    teller.table(
        {"": "left", "p50 ms": "right", "p99 ms": "right", "p50 ratio": "right"},
        [[f.way, f"{f.p50_ms:.2f}", f"{f.p99_ms:.2f}", f"{f.p50_ms / direct.p50_ms:.2f}"] for f in found],
    )
    teller.summary["latency_ms"] = {
        f.name: {"p50": round(f.p50_ms, 3), "p99": round(f.p99_ms, 3), "p50_ratio": round(f.p50_ms / direct.p50_ms, 3)}
        for f in found
    }


def _seats(engine: ShardedEngine, *tailnums: str) -> list[int]:
    with engine.session() as session:
        return [session.get_one(Plane, tailnum).seats for tailnum in tailnums]


@contextmanager
def _shown(teller: Teller, act: Callable[..., object]) -> Iterator[Callable[[], str]]:
    """Show the code of an act, then time it: gives a function that says how long it took."""
    teller.code(act)
    elapsed_ms = 0.0
    began = time.perf_counter()
    yield lambda: f"({elapsed_ms:.1f} ms)"
    elapsed_ms = (time.perf_counter() - began) * 1000


def _refusal(kind: type[ShardlibError], work: Callable[[], object]) -> ShardlibError | None:
    """The error of that kind which the work met, None if it met none."""
    try:
        work()
    except kind as error:
        return error
    return None
