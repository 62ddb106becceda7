"""What the demo prints: code as it runs, checks that count, a picture, percentiles, options."""

from __future__ import annotations

import io
import logging
import re
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from shardlib.errors import InvalidArgument
from shardlib_ops.demo import acts, clients, fence
from shardlib_ops.demo.clients import Sample
from shardlib_ops.demo.latency import percentile
from shardlib_ops.demo.models import Plane
from shardlib_ops.demo.picture import Picture, drawing, latency_panel, spread_panel, unevenness
from shardlib_ops.demo.pulse import columns, longest_of_each
from shardlib_ops.demo.story import Options
from shardlib_ops.demo.teller import Teller, Trimmed, source_of

SVG = "{http://www.w3.org/2000/svg}"


def one_act(number: int) -> int:
    """Not shown."""
    # shown
    return number * 2


async def another() -> None:
    if one_act(1) != 2:
        raise AssertionError


class Shown:
    """Not shown."""

    name = "shown"


def told(encoding: str = "utf-8") -> tuple[Teller, io.TextIOWrapper]:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return Teller(Console(file=out, width=100, highlight=False)), out


def printed(out: io.TextIOWrapper) -> str:
    out.flush()
    out.seek(0)
    return out.read()


def test_the_source_is_that_of_the_body() -> None:
    assert source_of(one_act) == "# shown\nreturn number * 2"
    assert source_of(another) == "if one_act(1) != 2:\n    raise AssertionError"
    assert source_of(Shown) == 'class Shown:\n    name = "shown"'


def test_one_failed_check_is_not_hidden_by_a_later_one() -> None:
    teller, out = told()
    teller.check("the sum is right", False)
    teller.check("the sum is right", True)
    assert not teller.all_right
    assert teller.checks == [("the sum is right", False), ("the sum is right", True)]
    assert "✗ NOT SO: the sum is right" in printed(out)


def test_an_expected_error_that_does_not_come_is_a_failed_check() -> None:
    teller, out = told()
    teller.expect(ValueError("no [bold]such[/] thing"), "it is refused")
    assert teller.all_right
    teller.expect(None, "it is refused")
    assert not teller.all_right
    assert "ValueError: no [bold]such[/] thing" in printed(out), "texts are never read as markup"


def test_a_terminal_that_knows_ascii_only_gets_that() -> None:
    teller, out = told("ascii")
    teller.chapter("One")
    teller.found("something")
    teller.check("so", True)
    teller.code(one_act)
    teller.bars({"a": 3, "b": 1}, "rows")
    text = printed(out)
    assert "-> something" in text
    assert "#" * 40 in text


def test_what_is_no_terminal_gets_whole_lines() -> None:
    teller, out = told()
    with teller.progress("loading", 10) as moved:
        for done in range(10):
            moved(done)
    with teller.waiting("Starting ..."):
        pass
    assert printed(out).split() == ["Starting", "..."]


def test_all_code_that_is_shown_fits_a_terminal_of_80_columns() -> None:
    shown = [*(getattr(acts, name) for name in acts.__all__), fence.renew_gate, clients.delay_further, Plane]
    indent = len("     ")
    long = [line for each in shown for line in source_of(each).splitlines() if indent + len(line) > 80]
    assert long == []


def test_code_is_folded_where_even_that_does_not_fit() -> None:
    out = io.StringIO()
    Teller(Console(file=out, width=30, highlight=False)).code(acts.favourite_destinations)
    text = "".join(out.getvalue().split())
    assert text == "".join(source_of(acts.favourite_destinations).split())


def test_lines_of_a_file_end_without_blanks() -> None:
    out = io.StringIO()
    console = Console(file=Trimmed(out), width=100, highlight=False)  # type: ignore[arg-type]
    teller = Teller(console)
    teller.code(one_act)
    teller.table({"a": "left", "b": "left"}, [["1", "2"], ["longer", "longer still"]])
    teller.found("something")
    lines = out.getvalue().splitlines()
    assert len(lines) == 6
    assert [line for line in lines if line != line.rstrip()] == []
    assert "     # shown" in lines


def test_warnings_of_the_library_are_part_of_the_story_once() -> None:
    teller, out = told()
    with teller.hearing("shardlib"):
        for _ in range(3):
            logging.getLogger("shardlib.demo_test").warning("the catalog is away")
    assert printed(out).count("the catalog is away") == 1


def test_bars_are_as_long_as_their_values() -> None:
    teller, out = told()
    teller.bars({"shard-01": 200, "shard-02": 100}, "rows")
    lengths = [len(bar) for bar in re.findall("█+", printed(out))]
    assert lengths == [40, 20]


def test_unevenness() -> None:
    assert unevenness({"a": 5, "b": 5}) == 1.0
    assert unevenness({"a": 9, "b": 3}) == 1.5
    assert unevenness({"a": 0, "b": 0}) == 1.0


def test_the_picture_is_an_svg_with_a_bar_for_each_shard() -> None:
    root = ET.fromstring(drawing([spread_panel("Flights & <planes>", {"s<1>": 300, "s2": 150})]))
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.get("rx")]
    assert [float(bar.get("width", 0)) for bar in bars] == [460.0, 230.0]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[0] == "Flights & <planes>"
    assert "s<1>" in texts
    assert "mean 225" in texts
    assert "300  (66.7 %)" in texts
    (line,) = root.iter(f"{SVG}line")
    assert float(line.get("x1", 0)) == pytest.approx(110 + 460 * 225 / 300)


def test_a_picture_of_nothing() -> None:
    ET.fromstring(drawing([spread_panel("nothing", {"s1": 0})]))
    empty = ET.fromstring(drawing([latency_panel("nothing", [], 10.0, 10.1, 1.0)]))
    assert list(empty.iter(f"{SVG}circle")) == []


def sample(began: float, ms: float, *, moving: bool = True) -> Sample:
    return Sample(began, began + ms / 1000, moving)


def test_the_picture_of_a_switch_has_a_point_for_each_transaction_around_it() -> None:
    samples = [sample(8.9, 9), sample(9.0, 10), sample(10.0, 100), sample(10.0, 50, moving=False), sample(11.3, 9)]
    root = ET.fromstring(drawing([latency_panel("The switch", samples, 10.0, 10.2, 1.0)]))
    points = [(float(c.get("cx", 0)), float(c.get("cy", 0)), c.get("fill")) for c in root.iter(f"{SVG}circle")]
    assert len(points) == 3, "those before and after are left out"
    (stays_x, stays_y, blue), (first_x, _, red), (met_x, met_y, _) = points
    assert blue != red
    assert first_x == 110
    assert stays_x == met_x == pytest.approx(110 + 600 / 2.2, abs=0.1)
    assert (met_y, stays_y) == (70, 160), "the longest reaches the top, half of it half way"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert (
        "3 transactions; moving keys were closed for 200 ms, and the longest transaction on them took 100 ms" in texts
    )
    assert "100 ms" in texts


def test_panels_stand_below_each_other_and_each_one_writes_the_file_anew(tmp_path: Path) -> None:
    picture = Picture(tmp_path / "new" / "demo.svg")
    one, two = spread_panel("one", {"a": 1}), spread_panel("two", {"a": 1, "b": 2})
    picture.add(one)
    assert ET.parse(picture.path).getroot().get("height") == f"{one.height:g}"
    picture.add(two)
    root = ET.parse(picture.path).getroot()
    assert root.get("height") == f"{one.height + two.height:g}"
    assert [g.get("transform") for g in root.iter(f"{SVG}g")] == ["translate(0 0)", f"translate(0 {one.height:g})"]
    assert "two" in [text.text for text in root.iter(f"{SVG}text")]


def test_the_longest_of_each_part_of_a_time() -> None:
    samples = [sample(0.9, 99), sample(1.0, 5), sample(1.2, 7), sample(1.4, 6), sample(2.9, 3), sample(3.0, 99)]
    found = longest_of_each(samples, 1.0, 3.0, 4)
    assert found == [pytest.approx(7), None, None, pytest.approx(3)]


def test_columns_are_as_high_as_their_values() -> None:
    values = [None, 0.0, 0.01, 50.0, 75.0, 100.0]
    assert columns(values, 100.0, 2, plain=False) == ["    ▄█", "  ▁███"]
    assert columns(values, 100.0, 2, plain=True) == ["    :#", "  .###"]


def test_a_client_sees_a_write_that_is_not_there() -> None:
    client = clients._Client(("N1", datetime(2013, 1, 1), 7), moving=True)
    assert client.read(5) == ""
    client.acknowledged = 1
    assert client.read(6) == ""
    assert client.read(5) == "N1: read 5, expected 5 and 1 more"
    assert client.read(None) != ""


@pytest.mark.parametrize(("percent", "expected"), [(50, 50.0), (99, 99.0), (100, 100.0), (1, 1.0)])
def test_percentiles_by_nearest_rank(percent: int, expected: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], percent) == expected


def test_the_percentile_of_one_value() -> None:
    assert percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(
    ("options", "name"),
    [({"shards": 1}, "shards"), ({"shards": 17}, "shards"), ({"rows": 10}, "rows"), ({"act": "3"}, "act")],
)
def test_options_that_cannot_be(options: dict[str, object], name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Options(output=Path("x"), **options)  # type: ignore[arg-type]
    assert caught.value.name == name
