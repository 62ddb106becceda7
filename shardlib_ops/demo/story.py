"""The story of the demo, from the first server to the last word."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardlib import ShardedEngine
from shardlib.errors import InvalidArgument
from shardlib_ops.demo import moves, scenes
from shardlib_ops.demo.flights import Facts, FlightData
from shardlib_ops.demo.load import load, one_plane_each, rows_by_shard, show_spread
from shardlib_ops.demo.models import Base, Plane
from shardlib_ops.demo.picture import Picture
from shardlib_ops.demo.resharding import Follow
from shardlib_ops.demo.teller import Teller

__all__ = ["ACTS", "Options", "tell"]

ACTS: Final = ("1", "2", "all")
"""Which parts of the story there are: the shards are asked, one of them is split, or both."""

_PICTURE: Final = "demo.svg"
_LEAST_ROWS: Final = 1000
_START_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen.

    Attributes:
        shards: 2 to 16.
        replicas: of each shard.
        rows: read at most that many flights; None for all.
        output: folder of the picture.
        keep: leave the cluster running.
        rounds: queries by each way when latency is measured.
        act: 1 to ask the shards, 2 to split one, or all.
        program: how to type `shardlib-ops` here, for what to try next.

    Raises:
        InvalidArgument: a value that is not allowed.
    """

    shards: int = 3
    replicas: int = 0
    rows: int | None = None
    output: Path = Path("demo-output")
    keep: bool = False
    rounds: int = 1500
    act: str = "all"
    program: str = "shardlib-ops"

    def __post_init__(self) -> None:
        if not 2 <= self.shards <= 16:
            raise InvalidArgument("shards", self.shards, "2 to 16: much of the demo goes on between shards")
        if self.act not in ACTS:
            raise InvalidArgument("act", self.act, "1, 2 or all")
        if self.rows is not None and self.rows < _LEAST_ROWS:
            raise InvalidArgument("rows", self.rows, f"{_LEAST_ROWS} or more, so that every shard gets planes")


def tell(teller: Teller, options: Options, follow: Follow) -> None:
    """Tell all of it. Whether all was right is in `teller.all_right`.

    Args:
        teller: who says it.
        options: what was chosen.
        follow: shows a job until it rests.

    Raises:
        ShardlibError: the data or the servers' programs are missing, or something failed that should not.
    """
    began = time.perf_counter()
    data = FlightData(options.rows)
    teller.title("shardlib", "many PostgreSQL databases as one: New York's flights of 2013")
    with (
        teller.hearing("shardlib"),
        cluster(teller, options) as servers,
        ShardedEngine(servers.url, pool_size=8) as engine,
    ):
        introduce(teller, servers.url, engine)
        picture = Picture(options.output / _PICTURE)
        facts = fill(teller, engine, data, picture)
        scene = scenes.Scene(teller, servers.url, engine, facts, one_plane_each(engine, facts))
        if options.act in ("1", "all"):
            scenes.one_key(scene)
            scenes.many_keys(scene)
            scenes.two_shards(scene)
            scenes.many_tasks(scene)
            scenes.old_map(scene)
            scenes.how_long(scene, options.rounds)
        if options.act in ("2", "all"):
            moves.second_act(scene, follow, servers.spare, picture)
    teller.summary["elapsed_s"] = round(time.perf_counter() - began, 1)
    farewell(teller, options)


@dataclass(frozen=True, slots=True)
class Servers:
    """What runs.

    Attributes:
        url: of the catalog.
        spare: gives the DSN of an empty PostgreSQL of this name, which runs no longer than the demo.
    """

    url: str
    spare: Callable[[str], AbstractContextManager[str]]


@contextmanager
def cluster(teller: Teller, options: Options) -> Iterator[Servers]:
    """Real servers, as long as the demo runs, or until `shardlib-ops local down`."""
    from shardlib_ops.local import LocalCluster, detached

    teller.chapter("Servers")
    wanted = f"{options.shards} shards (PostgreSQL) and the catalog (etcd)"
    began = time.perf_counter()
    if not options.keep:
        local = LocalCluster(options.shards, options.replicas)
        try:
            with teller.waiting(f"Starting {wanted} ..."):
                local.start()
            teller.found(f"{wanted} started in {time.perf_counter() - began:.1f} s")
            yield Servers(local.url, lambda name: nullcontext(local.spare(name).dsn))
        finally:
            local.stop()
        return
    folder = detached.default_directory()
    if detached.status(folder) is not None:
        raise InvalidArgument(
            "keep", True, f"a local cluster is in {folder} already; remove it first: {options.program} local down"
        )
    with teller.waiting(f"Starting {wanted} ..."):
        url = detached.up(folder, {"shards": options.shards, "replicas": options.replicas}, _START_S).url
    try:
        teller.found(f"{wanted} started in {time.perf_counter() - began:.1f} s")
        yield Servers(url, lambda name: _alone())
    except BaseException:
        detached.down(folder)
        raise


@contextmanager
def _alone() -> Iterator[str]:
    """A server beside a cluster that runs on, which has no place for it."""
    from shardlib_ops.local import LocalCluster

    with LocalCluster(1, bootstrap=False) as beside:
        yield beside.servers[0].dsn


def introduce(teller: Teller, url: str, engine: ShardedEngine) -> None:
    """Where everything is, and the tables."""
    topology = engine.topology
    addresses = [[shard.name, str(shard.primary), str(len(shard.replicas))] for shard in topology.shards]
    teller.table({"": "left", "address": "left", "replicas": "right"}, [*addresses, ["catalog", url, ""]])
    teller.summary["url"] = url
    teller.summary["shards"] = {shard.name: str(shard.primary) for shard in topology.shards}

    teller.chapter("Tables")
    teller.code(Plane)
    teller.say("engine.create_all has made on every shard:")
    engine.create_all(Base.metadata)
    rows = []
    for table in engine.topology.tables:
        how = "the same rows on every shard" if table.reference else f"sharded by {', '.join(table.key)}"
        rows.append([table.fullname, how])
    teller.table({"table": "left", "rows": "left"}, rows)
    held = [table.fullname for table in engine.topology.tables]
    teller.check("the catalog knows the four tables", sorted(held) == sorted(Base.metadata.tables))


def fill(teller: Teller, engine: ShardedEngine, data: FlightData, picture: Picture) -> Facts:
    """Load the data, and look whether all of it is there."""
    teller.chapter("Loading")
    with teller.waiting("Reading the file and counting, to check the shards by it ..."):
        facts = data.facts()
    if facts.without_tailnum:
        teller.say(
            f"{facts.without_tailnum:,} of {facts.flights_read:,} flights name no plane (they were cancelled before "
            "one was chosen): without a shard key a row belongs nowhere, so they are left out."
        )
    teller.step("engine.bulk_load(Flight, rows) sends each row to its shard, side by side:")
    load(teller, engine, data, facts)
    counts = rows_by_shard(engine, one_plane_each(engine, facts))
    teller.step("The ring decides which shard has which plane. This is how the flights spread:")
    show_spread(teller, counts, picture)
    teller.check(
        f"the shards have {facts.flights_kept:,} flights in all, as many as the file",
        sum(counts.values()) == facts.flights_kept,
    )
    return facts


def farewell(teller: Teller, options: Options) -> None:
    """What came of it, and what to try next."""
    from shardlib_ops.local import places

    wrong = [what for what, holds in teller.checks if not holds]
    teller.chapter("The end")
    if wrong:
        teller.say(f"{len(wrong)} of {len(teller.checks)} checks did NOT hold: {'; '.join(wrong)}", "bold red")
    else:
        teller.say(f"All {len(teller.checks)} checks held. It took {teller.summary['elapsed_s']} s.", "bold green")
    if options.keep:
        teller.step(f"The servers stay until you run: {options.program} local down")
        teller.say(
            f"  from Python   ShardedEngine({teller.summary['url']!r})\n"
            "  with psql     {options.program} local status --reveal    shows the addresses with their passwords"
        )
        return
    teller.say(
        f"The servers are stopped and their data is removed. What stays: the picture in {options.output}, and in "
        f"{places.cache()} a template of an empty server, from which the next ones start faster."
    )
    teller.step("To try next")
    tries = {
        f"{options.program} demo --keep": "the servers stay for you to look around",
        f"{options.program} demo --shards 8": "more shards",
        f"{options.program} local up": "an empty cluster for tables of your own",
        "docs/tutorial.md": "from nothing to a sharded application",
    }
    width = max(map(len, tries))
    teller.say("\n".join(f"  {what:{width}}   {why}" for what, why in tries.items()))
