"""The processes that run migrations, as their starter sees them."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import msgspec

from shardlib.errors import ShardlibError
from shardlib_ops.schema.order import Answer, Order

__all__ = ["Crew", "WorkerLost"]

_LINE_MAX: Final = 1 << 26
_END_S: Final = 5.0


class WorkerLost(ShardlibError):  # noqa: N818 - as the errors of shardlib are named
    """A process that ran migrations has ended in the middle of it."""


class Crew:
    """So many processes, started when they are needed, each at one shard at a time.

    Args:
        config: path of `alembic.ini`.
        size: how many.
    """

    def __init__(self, config: str, size: int = 1) -> None:
        self._config = config
        self._free = asyncio.Semaphore(size)
        self._idle: list[Process] = []
        self._all: list[Process] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            with suppress(ProcessLookupError):
                process.kill()  # a transaction that is open is rolled back by its server
        async with asyncio.timeout(_END_S):
            for process in self._all:
                await process.wait()

    async def ask(self, order: Order) -> Answer:
        """What comes out of an order.

        Raises:
            WorkerLost: the process has ended. Whether its transaction was committed, the shard tells.
        """
        async with self._free:
            process = self._idle.pop() if self._idle else await self._started()
            assert process.stdin is not None  # noqa: S101 - both are pipes
            assert process.stdout is not None  # noqa: S101
            try:
                process.stdin.write(msgspec.json.encode(order) + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
            except (BrokenPipeError, ConnectionResetError):
                line = b""
            if not line:
                raise WorkerLost(
                    f"the process that runs the migrations has ended with {await process.wait()} at shard "
                    f"{order.shard!r}; look at what it printed, then run `schema apply` again"
                )
            self._idle.append(process)
            return msgspec.json.decode(line, type=Answer)

    async def _started(self) -> Process:
        # Not of the terminal's group: Ctrl-C is this process's to obey.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "shardlib_ops.schema.worker", self._config,
            stdin=PIPE, stdout=PIPE, stderr=None if sys.stderr is not None else DEVNULL,
            limit=_LINE_MAX, start_new_session=True,
        )  # fmt: skip
        self._all.append(process)
        return process
