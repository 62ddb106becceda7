"""A manager in a process of its own, ``python -m tests.support.promote_runner``, which dies at a named step.

Its only argument is a JSON object: url, shard, step, resume (whether it takes up what another has left) and sleep
(whether it is stopped by a signal there instead, and goes on when it is woken).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardlib_ops.manager.manager import Manager
from tests.support.eventually import eventually

DIED = 9
LEASE_S = 2.0


async def main(url: str, shard: str, step: str, resume: bool, sleep: bool = False) -> None:
    async def reached(name: str) -> None:
        if name == step and sleep:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif name == step:
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


@contextmanager
def asleep_at(url: str, shard: str, step: str) -> Iterator[subprocess.Popen[str]]:
    """A manager that fell asleep at a step; it is woken by the test, and gone at the end."""
    arguments = {"url": url, "shard": shard, "step": step, "resume": False, "sleep": True}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.promote_runner", json.dumps(arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def stopped() -> bool:
        if (code := process.poll()) is not None:
            raise AssertionError(f"it ended with {code} before {step}: {process.communicate()[0]}")
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    try:
        eventually(stopped, within_s=60, what=f"it does not reach {step}", ignore=())
        yield process
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
