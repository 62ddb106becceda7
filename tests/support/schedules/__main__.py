"""Random fault schedules of resharding on real servers.

`python -m tests.support.schedules --first 0 --count 200`; one of them again: `--first 17 --count 1`. A schedule's
faults come from its seed; the interleaving, as far as real time allows. `--plant NAME` puts a fault into the runners or
the clients, and is done when it was found.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.support.schedules.many import ARENA_RUNS, several, total
from tests.support.schedules.plants import CLIENT_PLANTS, NEEDS, PLANTS, Need


def main() -> int:
    """Run them; 1 if any failed. With a plant: 0 if it was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.schedules", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=int(os.environ.get("SHARDLIB_SCHEDULES", "50")))
    parser.add_argument("--at-once", type=int, default=1, help="how many side by side, on servers of their own")
    parser.add_argument("--folder", type=Path, help="for records and logs of the runs; a temporary one if left out")
    parser.add_argument(
        "--plant", choices=[*PLANTS, *CLIENT_PLANTS], help="put this fault in, and stop when it is found"
    )
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="schedules-"))
    print(f"records in {folder}", flush=True)
    numbers = itertools.count(chosen.first)
    seeds = list(itertools.islice((n for n in numbers if NEEDS.get(chosen.plant, Need()).met_by(n)), chosen.count))
    began = time.monotonic()
    parts = [seeds[at : at + ARENA_RUNS] for at in range(0, len(seeds), ARENA_RUNS)]
    if chosen.at_once > 1:
        # Daemons may have no children, and a schedule has many.
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(chosen.at_once, multiprocessing.get_context("spawn")) as pool:
            done = pool.map(several, parts, [folder] * len(parts), [chosen.plant] * len(parts))
            reports = [report for part in done for report in part]
    else:
        reports = []
        for part in parts:
            reports += several(part, folder, chosen.plant)
            if chosen.plant and reports[-1].violations:
                break
    print(total(reports, time.monotonic() - began), flush=True)
    failed = any(report.violations for report in reports)
    return int(not failed if chosen.plant else failed)


if __name__ == "__main__":
    sys.exit(main())
