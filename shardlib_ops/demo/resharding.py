"""A resharder in a process of its own, as in production, and jobs that it runs: followed, and timed."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

from shardlib.errors import InvalidTopology
from shardlib_ops.local.process import wait_until
from shardlib_ops.manager.manager import Manager
from shardlib_ops.reshard.job import Job, Status

__all__ = ["Follow", "Moved", "Resharding", "resharding"]

Follow = Callable[[str, int], Coroutine[Any, Any, object]]
"""Shows a job of a catalog's URL until it rests."""

_END_S: Final = 30.0
_JOB_S: Final = 180.0
_LOOK_S: Final = 0.5
_TAKEN_S: Final = 10.0
_PURGE_PER_S: Final = 100_000
"""Rows of old copies that are deleted in a second, at most: these servers have little else to do."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A job that rests, and when its ranges were closed, by the monotonic clock in seconds.

    Attributes:
        took_s: seconds that it took from the wish to where it rests.
        closed: when its gates were closed in the attempt that switched.
        switched: when the other side served.
    """

    job: Job
    took_s: float
    closed: float
    switched: float

    @property
    def closed_ms(self) -> float:
        """For how long nobody could reach the moving keys."""
        return (self.switched - self.closed) * 1000


class Resharding:
    """The process, seen from here. Made by `resharding`."""

    def __init__(self, url: str, process: BaseProcess, pipe: Connection, follow: Follow) -> None:
        self._url, self._process, self._pipe, self._follow = url, process, pipe, follow
        self._steps: list[tuple[str, float]] = []
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        self._hearing.start()

    def close(self) -> None:
        """Forget the process, which has ended."""
        self._hearing.join(_END_S)  # it hears the end of the pipe
        self._pipe.close()

    def move(self, ask: Callable[[], Job], rests: Status) -> Moved:
        """Ask for a switch, and follow its job until it rests.

        Args:
            ask: makes a job, or asks for its rollback.
            rests: the status that it has then.

        Raises:
            InvalidTopology: it rests in another one, or the resharder is gone.
        """
        began, before = time.monotonic(), len(self._steps)
        job = ask()
        # Until then its picture would tell how to start a resharder.
        wait_until(lambda: len(self._steps) > before or not self._process.is_alive(), _TAKEN_S)
        job = self.rest(job, rests)
        took_s = time.monotonic() - began
        # The record can be faster than the pipe.
        wait_until(lambda: any(step == "switched" for step, _ in self._steps[before:]), _LOOK_S)
        at = dict(self._steps[before:])  # the last attempt is the one that switched
        if not {"gates_closed", "switched"} <= at.keys():
            raise InvalidTopology(f"job {job.id} is {job.status.value} without a switch", "this is a fault: report it")
        return Moved(job, took_s, at["gates_closed"], at["switched"])

    def rest(self, job: Job, rests: Status) -> Job:
        """Follow a job until it rests; see `move`."""
        job = asyncio.run(self._followed(job.id))
        if job.status is not rests:
            raise InvalidTopology(
                f"job {job.id} is {job.status.value}, not {rests.value}: {job.error or 'it gives no reason'}",
                "this is a fault, unless a server was stopped: report it",
            )
        return job

    async def _followed(self, job_id: int) -> Job:
        following = asyncio.ensure_future(self._follow(self._url, job_id))
        try:
            async with asyncio.timeout(_JOB_S):
                while not (await asyncio.wait([following], timeout=_LOOK_S))[0]:
                    if not self._process.is_alive():
                        raise InvalidTopology(
                            f"the resharder of job {job_id} ended with {self._process.exitcode}", "look at what it said"
                        )
        except TimeoutError:
            raise InvalidTopology(
                f"job {job_id} does not rest after {_JOB_S:g} s", "a quieter machine, or fewer --rows"
            ) from None
        finally:
            following.cancel()
            await asyncio.wait([following])
        following.result()
        async with Manager(self._url) as manager:
            return await manager.get_job(job_id)

    def _hear(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                name, *said = self._pipe.recv()
                if name == "log":
                    logger, level, message = said
                    logging.getLogger(logger).log(level, "%s", message)
                else:
                    self._steps.append((name, said[0]))


@contextmanager
def resharding(url: str, follow: Follow) -> Iterator[Resharding]:
    """A resharder at work on every job of a catalog, as `shardlib-ops resharder run` is, until the body ends."""
    context = multiprocessing.get_context("spawn")  # a process with threads does not fork well
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(url, theirs), daemon=True)
    process.start()
    theirs.close()
    running = Resharding(url, process, ours, follow)
    try:
        yield running
    finally:
        with suppress(OSError):
            ours.send(None)
        process.join(_END_S)
        if process.is_alive():
            process.kill()
            process.join()
        running.close()


def _serve(url: str, pipe: Connection) -> None:
    """The body of the process: serve until the other end says so, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the other end decides
    lock = threading.Lock()

    def tell(*said: object) -> None:
        with lock, suppress(OSError):
            pipe.send(said)

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell("log", record.name, record.levelno, record.getMessage())

    logging.getLogger("shardlib").addHandler(Told(logging.WARNING))
    asyncio.run(_until_told(url, pipe, tell))


async def _until_told(url: str, pipe: Connection, tell: Callable[..., None]) -> None:
    from shardlib_ops.reshard.resharder import Resharder

    async def stepped(step: str) -> None:
        tell(step, time.monotonic())

    async with Resharder(url, purge_rows_per_s=_PURGE_PER_S, on_step=stepped) as resharder:
        serving = asyncio.create_task(resharder.serve())
        # A word, or the end of who would say it.
        asyncio.get_running_loop().add_reader(pipe.fileno(), serving.cancel)
        with suppress(asyncio.CancelledError):
            await serving
