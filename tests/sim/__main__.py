"""Many random schedules and a crash at each await, on all cores.

`python -m tests.sim --schedules 20000 --first 0`; one of them again, in full: `python -m tests.sim --seed 17`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

from tests.sim.everywhere import KINDS
from tests.sim.many import AT_ONCE, batch, crashes
from tests.sim.schedule import Result, run

SHOWN = 10


def show(seed: int, result: Result) -> None:
    """One schedule, in full."""
    print(f"seed {seed}: {result.status.value} after {result.ticks} awaits; {result.facts}")
    print("steps:", " ".join(result.steps))
    for violation in result.violations:
        print("-", violation)


def main() -> int:
    """Run them; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--schedules", type=int, default=int(os.environ.get("SHARDLIB_SIM_SCHEDULES", "20000")))
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    chosen = parser.parse_args()
    if chosen.seed is not None:
        result = run(chosen.seed)
        show(chosen.seed, result)
        return 1 if result.violations else 0
    began = time.monotonic()
    ends, facts, bad = Counter[str](), Counter[str](), list[tuple[int, list[str]]]()
    firsts = range(chosen.first, chosen.first + chosen.schedules, AT_ONCE)
    with multiprocessing.get_context("spawn").Pool(chosen.processes) as pool:
        for one_ends, one_facts, one_bad in pool.imap_unordered(batch, firsts):
            ends.update(one_ends)
            facts.update(one_facts)
            for seed, violations in one_bad:
                if len(bad) < SHOWN:
                    print(f"seed {seed}: {'; '.join(violations[:4])[:1000]}", flush=True)
                bad.append((seed, violations))
        for kind, (count, wrong) in zip(KINDS, pool.map(crashes, KINDS, chunksize=1), strict=True):
            print(f"{kind}: a crash at each of {count} awaits, {len(wrong)} failed", flush=True)
            print("\n".join(wrong[:SHOWN]), end="\n" if wrong else "")
            bad += [(-1, [what]) for what in wrong]
    print(f"{len(firsts) * AT_ONCE} schedules in {time.monotonic() - began:.0f} s: {dict(ends)}")
    print(f"what happened: {dict(facts)}")
    print(f"{len(bad)} failed" + (f": seeds {sorted(seed for seed, _ in bad)[:50]}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
