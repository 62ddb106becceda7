"""The process of a runner of a schedule's jobs: a `Resharder` that serves.

It tells each step through a pipe, and goes on when it is answered: what the schedule does in between happens at that
step and not somewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
from multiprocessing.connection import Connection

from shardlib_ops.reshard.resharder import Resharder
from tests.support.schedules import plants
from tests.support.schedules.processes import speak_to

LEASE_S = 2.0


async def serve(url: str, plant: str | None, pipe: Connection[str, str]) -> None:
    """Until killed."""
    loop = asyncio.get_running_loop()
    turn = asyncio.Lock()

    def tell(step: str) -> None:
        try:
            pipe.send(step)
            pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # whoever started it is gone

    async def reached(step: str) -> None:
        async with turn:
            await asyncio.shield(loop.run_in_executor(None, tell, step))

    if plant is not None:
        plants.plant(plant)
    async with Resharder(url, lease_ttl_s=LEASE_S, purge_rows_per_s=5_000, on_step=reached) as resharder:
        await resharder.serve()


def main(url: str, plant: str | None, pipe: Connection[str, str], log: str) -> None:
    """The process.

    Args:
        url: of the catalog.
        plant: a fault to put in.
        pipe: for the steps and their answers.
        log: file that its output is appended to.
    """
    speak_to(log)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(name)s %(message)s", datefmt="%H:%M:%S")
    asyncio.run(serve(url, plant, pipe))
