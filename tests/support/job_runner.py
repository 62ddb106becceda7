"""A runner of a job in a process of its own, ``python -m tests.support.job_runner``, which dies at a named step.

Its only argument is a JSON object: url, job, step (None: it lives), nth (which time the step is reached), complete.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

from shardlib_ops.reshard.resharder import Resharder

DIED = 9


async def main(url: str, job: int, step: str | None, complete: bool, nth: int = 1) -> None:
    seen = 0

    async def reached(name: str) -> None:
        nonlocal seen
        if name == step:
            seen += 1
            if seen == nth:
                os._exit(DIED)

    async with Resharder(url, lease_ttl_s=2.0, on_step=reached) as resharder:
        found = await resharder.run(job, complete=complete)
        print(found.status.value)


def run_and_die(url: str, job: int, step: str, *, complete: bool = False) -> None:
    """Run a job in a process of its own until it dies at a step."""
    arguments = {"url": url, "job": job, "step": step, "complete": complete}
    command = [sys.executable, "-m", "tests.support.job_runner", json.dumps(arguments)]
    died = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == DIED, f"it did not reach {step}: {died.stdout}{died.stderr[-3000:]}"


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
