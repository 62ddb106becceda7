"""Filling the shards, and seeing how evenly the ring spread what came."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase

from shardlib import ShardedEngine
from shardlib_ops.demo.flights import Facts, FlightData, Row
from shardlib_ops.demo.models import Airline, Airport, Flight, Plane
from shardlib_ops.demo.picture import Picture, spread_panel, unevenness
from shardlib_ops.demo.teller import Teller

__all__ = ["load", "one_plane_each", "rows_by_shard", "show_spread"]


def load(teller: Teller, engine: ShardedEngine, data: FlightData, facts: Facts) -> None:
    """Send every row to the shards it belongs to; tables first that others refer to."""
    known = set().union(*facts.made_by.values())
    planes = len(known | facts.flights_of.keys())
    seconds = (
        _send(teller, engine, Airline, data.airlines(), 16)
        + _send(teller, engine, Airport, data.airports(), 1_458)
        + _send(teller, engine, Plane, data.planes(sorted(facts.flights_of)), planes)
        + _send(teller, engine, Flight, data.flights(), facts.flights_kept)
    )
    teller.summary["load"] = {
        "flights": facts.flights_kept,
        "planes": planes,
        "left_out": facts.without_tailnum,
        "elapsed_s": round(seconds, 2),
    }


def _send(
    teller: Teller, engine: ShardedEngine, table: type[DeclarativeBase], rows: Iterable[Row], expected: int
) -> float:
    name = table.__tablename__
    with teller.progress(f"{name:<9}", expected) as moved:
        result = engine.bulk_load(table, rows, progress=lambda state: moved(state.rows_read))
    rate = result.rows / result.elapsed_s if result.elapsed_s else 0.0
    teller.found(f"{name:<9} {result.rows:>8,} rows in {result.elapsed_s:5.1f} s   {rate:>9,.0f} rows/s")
    return result.elapsed_s


def rows_by_shard(engine: ShardedEngine, one_key_each: Iterable[str]) -> dict[str, int]:
    """Flights of each shard, as its own database counts them."""
    counts = {}
    for key in one_key_each:
        with engine.session(key) as session:
            counts[engine.shard_for(key).name] = session.scalar(select(func.count()).select_from(Flight)) or 0
    return counts


def one_plane_each(engine: ShardedEngine, facts: Facts) -> list[str]:
    """For each shard that has any, the plane of the register that flew most often."""
    busiest: dict[str, str] = {}
    registered = set().union(*facts.made_by.values())
    for tailnum, _ in facts.flights_of.most_common():
        if tailnum in registered:
            busiest.setdefault(engine.shard_for(tailnum).id, tailnum)
    return [busiest[shard.id] for shard in engine.topology.shards if shard.id in busiest]


def show_spread(teller: Teller, counts: dict[str, int], picture: Picture) -> None:
    """Bars, and the same as a picture."""
    teller.bars(counts, "flights")
    picture.add(spread_panel("Flights of 2013 by shard", counts))
    teller.say(f"the fullest shard has {unevenness(counts):.3f} times the mean; as a picture: {picture.path}")
    teller.summary["spread"] = {"rows": counts, "max_over_mean": round(unevenness(counts), 4)}
    teller.summary["picture"] = str(picture.path)
