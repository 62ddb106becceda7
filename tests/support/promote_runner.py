"""A manager in a process of its own, ``python -m tests.support.promote_runner``, which dies at a named step.

Its only argument is a JSON object: url, shard, step, and resume: whether it takes up what another has left.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

from shardlib_ops.manager.manager import Manager

DIED = 9
LEASE_S = 2.0


async def main(url: str, shard: str, step: str, resume: bool) -> None:
    async def reached(name: str) -> None:
        if name == step:
            os._exit(DIED)

    async with Manager(url) as manager:
        if resume:
            await manager.resume_promotion(shard, on_step=reached)
        else:
            await manager.promote_replica(shard, on_step=reached, lease_ttl_s=LEASE_S)


def die_at(url: str, shard: str, step: str, *, resume: bool = False) -> None:
    """Let a manager work in a process of its own until that step, and die there as by kill -9."""
    arguments = {"url": url, "shard": shard, "step": step, "resume": resume}
    died = subprocess.run(
        [sys.executable, "-m", "tests.support.promote_runner", json.dumps(arguments)],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert died.returncode == DIED, f"it did not reach {step}: {died.stdout}{died.stderr[-3000:]}"


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
