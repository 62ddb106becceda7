"""Run sections and print their table; exit code 1 if a bar is missed at full size."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.report import Row, table, write_json

SMALL = 0.02
"""The scale of `--small`: only shows that the benchmark runs."""


def sections() -> list[str]:
    """The modules beside this one that measure something, by name."""
    here = Path(__file__).parent
    return sorted(path.stem for path in here.glob("*.py") if path.stem not in ("__init__", "__main__", "report"))


def main() -> int:
    """Parse the arguments, run, print."""
    known = sections()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(known)}; all if none is named")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--scale", type=float, default=1.0, help="part of the full sizes, above 0 and up to 1")
    size.add_argument("--small", action="store_true", help=f"the same as --scale {SMALL}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine there too")
    options = parser.parse_args()
    scale = SMALL if options.small else options.scale
    if not 0 < scale <= 1:
        parser.error(f"--scale {scale:g}: above 0 and up to 1")
    if unknown := set(options.sections) - set(known):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows: list[Row] = []
    for name in options.sections or known:
        rows += importlib.import_module(f"benchmarks.{name}").run(scale)
    print(table(rows))
    if options.json:
        write_json(options.json, rows, scale)
    if scale < 1:
        return 0  # the bars are for the full sizes
    return int(any(row.met is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
