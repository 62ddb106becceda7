"""A manager in a process of its own, ``python -m tests.support.manager_runner``, which is killed at a named moment.

Its only argument is a JSON object: catalog, die (None: it lives). It prints its URL once it answers.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shardlib_ops.api import create_app
from shardlib_ops.api.idempotency import Claim, IdempotencyKeys
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.promote import Promoter
from shardlib_ops.reshard.store import JobStore
from shardlib_ops.serving.server import Listening, serve, stop_on_signals
from shardlib_ops.settings import ServerSettings
from tests.support.managers import manager_settings

LEASE_S = 2.0
PAUSED = "paused before the effect"
MOMENTS = {
    "before the effect": (Manager, ("create_shard", "split", "pause", "promote_replica")),
    "between shard and job": (JobStore, ("create",)),
    "within the promotion": (Promoter, ("run",)),
    "after the effect": (Claim, ("keep",)),
}


def killed(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(catalog: str, die: str | None) -> None:
    defaults: Any = IdempotencyKeys.__init__.__kwdefaults__
    defaults["lease_s"] = LEASE_S
    if die == PAUSED:
        create = Manager.create_shard

        async def woken(*given: Any, **named: Any) -> Any:
            os.kill(os.getpid(), signal.SIGSTOP)
            return await create(*given, **named)

        setattr(Manager, "create_shard", woken)  # noqa: B010 - as the others
    elif die is not None:
        place, names = MOMENTS[die]
        for name in names:
            setattr(place, name, killed)

    def ready(listening: Listening) -> None:
        print(listening.url, flush=True)

    stop = asyncio.Event()
    settings = manager_settings(catalog, manager=ServerSettings(port=0, metrics_port=None, shutdown_s=10))
    with stop_on_signals(stop):
        await serve(create_app(settings), settings.manager, stop=stop, limits=settings.limits, on_ready=ready)


@contextmanager
def running(catalog: str, *, die: str | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A manager's URL and its process, which has ended behind the block."""
    command = [sys.executable, "-m", "tests.support.manager_runner", json.dumps({"catalog": catalog, "die": die})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, f"it ended with {process.wait(20)}"
        yield url, process
    finally:
        process.kill()
        process.communicate(timeout=20)


@contextmanager
def started(environment: dict[str, str]) -> Iterator[str]:
    """`shardlib-ops manager serve`: the URL that it prints."""
    command = [sys.executable, "-m", "shardlib_ops.cli.main", "manager", "serve", "--port", "0", "--metrics-port", "-1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = ""
        while (found := re.search(r"serving on (\S+?)[,;]", said)) is None:
            line = process.stderr.readline()
            assert line, f"it did not start: {said}"
            said += line
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate(timeout=20)


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
