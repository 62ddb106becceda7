"""The second act: a shard is split while clients work, taken back, split again, and merged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import select

from shardlib.catalog import open_catalog
from shardlib.errors import InvalidTopology
from shardlib.ring.ranges import TokenRange, ranges_contain
from shardlib_ops.demo import clients
from shardlib_ops.demo.clients import Clients, FlightKey
from shardlib_ops.demo.contents import Content, contents
from shardlib_ops.demo.latency import percentile
from shardlib_ops.demo.load import one_plane_each, rows_by_shard
from shardlib_ops.demo.models import Flight
from shardlib_ops.demo.picture import Picture, latency_panel, spread_panel
from shardlib_ops.demo.pulse import columns, longest_of_each
from shardlib_ops.demo.resharding import Follow, Moved, Resharding, resharding
from shardlib_ops.demo.scenes import Scene
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.store import JobStore

__all__ = ["compare_with_start", "second_act"]

_MOVING: Final = (4, 2)
"""Flights whose keys move: for threads, and for the asyncio client."""
_STAYING: Final = (2, 1)
_AROUND_S: Final = 1.0
_COLUMNS: Final = 60
_LINES: Final = 4
_KEYS_MAX: Final = 400
"""So many planes are looked at, the busiest first, to find flights for the clients."""


@dataclass
class _Stage:
    """What the chapters of this act share.

    Attributes:
        source: name of the shard that is split.
        target: name of the one that gets a part.
        moving: flights of the clients whose keys move.
        staying: those whose keys do not.
        rows: what each move did, for the table at the end.
        told: the same for the summary.
        failures: of all clients.
    """

    scene: Scene
    resharding: Resharding
    source: str
    target: str
    moving: list[FlightKey]
    staying: list[FlightKey]
    rows: list[list[str]] = field(default_factory=list)
    told: list[dict[str, object]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def second_act(
    scene: Scene, follow: Follow, spare: Callable[[str], AbstractContextManager[str]], picture: Picture
) -> None:
    """Split the first shard, take that back, split again and merge, all of it under clients.

    Args:
        scene: as for the first act.
        follow: shows a job until it rests.
        spare: gives the DSN of an empty PostgreSQL.
        picture: gets the new spread, and the latency through the switch.

    Raises:
        InvalidTopology: a job did not do what it should.
    """
    teller, engine, began = scene.teller, scene.engine, time.perf_counter()
    source, target = engine.topology.shards[0].name, f"shard-{len(engine.topology.shards) + 1:02d}"
    teller.chapter(f"{source} is split while clients work")
    with spare(target) as dsn, resharding(scene.url, follow) as running, Manager.sync(scene.url) as manager:
        shard = manager.create_shard(target, primary_endpoint=dsn)
        teller.found(f"{target} is added, at {shard.primary}: an empty PostgreSQL, which owns nothing")
        leg = manager.plan("split", source=source, targets=[{"shard_id": target}]).legs[0]
        teller.found(f"the plan: {len(leg.leg.ranges)} ranges, with {leg.share_of_source:.1%} of the keys of {source}")
        before = contents(engine, scene.planes)
        teller.step("What the tables hold now, as the servers count and hash it:")
        teller.table(
            {"table": "left", "rows": "right", "checksum": "right"},
            [[name, f"{found.rows:,}", found.hex] for name, found in before.items()],
        )
        teller.summary["contents"] = {
            name: {"rows": found.rows, "checksum": found.hex} for name, found in before.items()
        }
        moving, staying = _flights(scene, leg.leg.ranges, source)
        stage = _Stage(scene, running, source, target, moving, staying)
        teller.step(
            f"{sum(_MOVING + _STAYING)} clients work from now on, {_MOVING[1] + _STAYING[1]} of them with asyncio. "
            "One of their transactions:"
        )
        teller.code(clients.delay_further)

        def split() -> Job:
            return manager.split(source, targets=[{"shard_id": target}])

        with _working(stage) as working:
            job = _split(stage, working, split, picture)
            teller.chapter("The split is taken back")
            teller.say(f"What {target} was given to write since then goes back with it.")
            _moved(stage, working, "rollback", lambda: manager.rollback(job.id), Status.ROLLED_BACK)
        compare_with_start(scene, before, "after the rollback")

        teller.chapter("It is split again for good, and merged")
        with _working(stage) as working:
            job = _moved(stage, working, "split again", split, Status.VALIDATION).job
            running.rest(manager.complete(job.id), Status.COMPLETED)
            teller.found(f"job {job.id} is completed: the old copies on {source} are deleted")
        compare_with_start(scene, before, "after the second split")
        with _working(stage) as working:

            def merge() -> Job:
                return manager.merge([target], target={"shard_id": source})

            job = _moved(stage, working, "merge", merge, Status.VALIDATION).job
            running.rest(manager.complete(job.id), Status.COMPLETED)
            teller.found(f"job {job.id} is completed: {target} owns nothing any more")
        compare_with_start(scene, before, "after the merge")
        manager.delete_shard(target)
        engine.refresh()
        _sum_up(stage)
    teller.summary["second_act_s"] = round(time.perf_counter() - began, 1)


def _split(stage: _Stage, working: Clients, split: Callable[[], Job], picture: Picture) -> Job:
    scene, teller, engine = stage.scene, stage.scene.teller, stage.scene.engine
    moved = _moved(stage, working, "split", split, Status.VALIDATION)
    _copied(scene, moved.job)
    if not working.work_until(moved.switched + _AROUND_S):
        raise InvalidTopology("the clients stand still after the switch", "this is a fault: report it")
    _pulse(stage, working, moved)
    picture.add(latency_panel(
        f"Transactions while {stage.source} is split", list(working.samples), moved.closed, moved.switched, _AROUND_S,
    ))  # fmt: skip

    engine.refresh()
    counts = rows_by_shard(engine, one_plane_each(engine, scene.facts))
    teller.step("The new spread:")
    teller.bars(counts, "flights")
    picture.add(spread_panel(f"Flights by shard after the split of {stage.source}", counts))
    teller.say(f"both are in the picture now: {picture.path}")
    ranges = moved.job.legs[0].ranges
    there = sum(n for tailnum, n in scene.facts.flights_of.items() if ranges_contain(ranges, engine.token(tailnum)))
    teller.check(
        f"{stage.target} has the {there:,} flights whose keys have moved, and no flight is missing or there twice",
        counts.get(stage.target) == there and sum(counts.values()) == scene.facts.flights_kept,
    )
    teller.summary["spread_after_split"] = counts
    return moved.job


@contextmanager
def _working(stage: _Stage) -> Iterator[Clients]:
    """Clients at work, until they have set back what they wrote."""
    flights = [(key, True) for key in stage.moving], [(key, False) for key in stage.staying]
    threads = [each for some, (count, _) in zip(flights, (_MOVING, _STAYING), strict=True) for each in some[:count]]
    tasks = [each for some in flights for each in some if each not in threads]
    working = Clients(stage.scene.engine, stage.scene.url, threads, tasks)
    try:
        with working:
            if not working.work_until(0.0):
                raise InvalidTopology("the clients do not begin", "this is a fault: report it")
            yield working
    finally:
        stage.failures += working.failures


def _moved(stage: _Stage, working: Clients, what: str, ask: Callable[[], Job], rests: Status) -> Moved:
    """Run a move to where it rests, and say what it was like for the clients."""
    teller, since = stage.scene.teller, len(working.samples)
    failed = len(working.failures)
    moved = stage.resharding.move(ask, rests)
    samples = working.samples[since:]
    met = [each.ms for each in samples if each.moving and each.began <= moved.switched and each.ended >= moved.closed]
    usual = percentile([each.ms for each in samples], 50)
    longest = max(met, default=0.0)
    failed = len(working.failures) - failed
    teller.found(
        f"{what}: job {moved.job.id} is in {moved.job.status.value} after {moved.took_s:.1f} s; its keys were closed "
        f"for {moved.closed_ms:.0f} ms"
    )
    stage.rows.append([
        what, f"{moved.took_s:.1f}", f"{moved.closed_ms:.0f}", f"{longest:.0f}", f"{usual:.1f}", f"{len(samples):,}",
        str(failed),
    ])  # fmt: skip
    stage.told.append({
        "move": what, "job": moved.job.id, "elapsed_s": round(moved.took_s, 2), "closed_ms": round(moved.closed_ms, 1),
        "longest_ms": round(longest, 1), "p50_ms": round(usual, 2), "transactions": len(samples), "failed": failed,
    })  # fmt: skip
    return moved


def _copied(scene: Scene, job: Job) -> None:
    """What was copied, as the job's progress tells it."""
    with closing(open_catalog(scene.url)) as catalog:
        progress = JobStore(catalog).progress(job.id)
    if progress is not None and progress.tables:
        copied = " and ".join(f"{table.rows:,} {table.table}" for table in progress.tables if table.rows)
        scene.teller.found(f"copied: {copied}; what was written meanwhile followed by the stream")


def _pulse(stage: _Stage, working: Clients, moved: Moved) -> None:
    """The latency through the switch, for keys that move and those that stay, to one scale."""
    teller, samples = stage.scene.teller, list(working.samples)
    middle = (moved.closed + moved.switched) / 2
    began, ended = middle - _AROUND_S, middle + _AROUND_S
    groups = {
        what: longest_of_each([each for each in samples if each.moving is moving], began, ended, _COLUMNS)
        for what, moving in (("keys that move", True), ("keys that stay", False))
    }
    top = max(value for values in groups.values() for value in values if value is not None)
    part_ms = (ended - began) / _COLUMNS * 1000
    teller.step(f"How long the clients' transactions took, the longest of each {part_ms:.0f} ms:")
    for what, values in groups.items():
        lines = columns(values, top, _LINES, plain=teller.plain)
        heads = [f"{top:.0f} ms", *[""] * (_LINES - 1)]
        shown = "\n".join(f"{head:>7} |{line}".rstrip() for head, line in zip(heads, lines, strict=True))
        teller.say(f"{what}\n{shown}")
    teller.say(f"{'':9}-{_AROUND_S:g} s{'the switch':^{_COLUMNS - 8}}+{_AROUND_S:g} s")


def compare_with_start(scene: Scene, before: Mapping[str, Content], when: str) -> None:
    """Check that the tables hold what they held at the start, while no client works.

    Args:
        scene: of the demo.
        before: by table.
        when: for the check's text.
    """
    teller = scene.teller
    scene.engine.refresh()
    now = contents(scene.engine, one_plane_each(scene.engine, scene.facts))
    differ = [name for name, found in now.items() if found != before[name]]
    for name in differ:
        was, found = before[name], now[name]
        teller.found(f"{name}: {was.rows:,} rows {was.hex} became {found.rows:,} rows {found.hex}")
    teller.check(f"{when}: rows and checksums of the {len(now)} tables are those of the start", not differ)


def _sum_up(stage: _Stage) -> None:
    scene, teller = stage.scene, stage.scene.teller
    teller.step("What the clients saw:")
    teller.table(
        {
            "": "left", "took s": "right", "closed ms": "right", "longest ms": "right", "p50 ms": "right",
            "commits": "right", "failed": "right",
        },
        stage.rows,
    )  # fmt: skip
    for failure in list(dict.fromkeys(stage.failures))[:3]:
        teller.found(failure)
    teller.check("no statement failed, and each read showed the write before it", not stage.failures)
    engine = scene.engine
    counts = rows_by_shard(engine, one_plane_each(engine, scene.facts))
    spread = teller.summary["spread"]
    teller.check("the spread is that of the start", isinstance(spread, dict) and spread["rows"] == counts)
    teller.summary["moves"] = stage.told
    teller.summary["failed"] = len(stage.failures)


def _flights(scene: Scene, ranges: Sequence[TokenRange], source: str) -> tuple[list[FlightKey], list[FlightKey]]:
    """Flights for the clients, one a plane, the busiest first: of keys that move, and of others."""
    engine = scene.engine
    moving: list[FlightKey] = []
    staying: list[FlightKey] = []
    for tailnum, _ in scene.facts.flights_of.most_common(_KEYS_MAX):
        goes = ranges_contain(ranges, engine.token(tailnum))
        wanted, found = (_MOVING, moving) if goes else (_STAYING, staying)
        # The last of those that stay is on another shard.
        here = engine.shard_for(tailnum).name == source
        if len(found) < sum(wanted) and (goes or here is (len(found) < sum(wanted) - 1)):
            with engine.session(tailnum) as session:
                query = select(Flight.departs, Flight.number).where(
                    Flight.tailnum == tailnum, Flight.delay.is_not(None)
                )
                first = session.execute(query.order_by(Flight.departs, Flight.number).limit(1)).one_or_none()
            if first is not None:
                found.append((tailnum, *first))
    if len(moving) < sum(_MOVING) or len(staying) < sum(_STAYING):
        raise InvalidTopology("there are too few planes for the clients", "more --rows")
    return moving, staying
