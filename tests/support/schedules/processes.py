"""Processes that are forked from one that has imported everything.

A schedule needs many of them, and all that they import costs a second each time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

_PRELOADED = ("tests.support.schedules.client", "tests.support.schedules.runner", "tests.support.schedules.plants")
_context: ForkServerContext | None = None
_lifelines: dict[ForkServerProcess, Connection[None, None]] = {}


def context() -> ForkServerContext:
    """The server that forks, for all processes of this one."""
    global _context  # noqa: PLW0603 - one server for each process
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(list(_PRELOADED))
    return _context


def start(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """A process that runs a function; it ends with this one, however this one ends."""
    mine, its = context().Pipe(duplex=False)
    process = context().Process(target=_run, args=(mine, target, *args), daemon=True)
    process.start()
    mine.close()
    _lifelines[process] = its
    return process


def _run(lifeline: Connection[None, None], target: Callable[..., None], *args: Any) -> None:
    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv()
        os._exit(0)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    target(*args)


def send(process: ForkServerProcess, number: signal.Signals) -> None:
    """A signal, unless it has ended."""
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)


def end(process: ForkServerProcess) -> None:
    """Kill it, and wait until it is gone; idempotent."""
    process.kill()
    process.join(20)
    lifeline = _lifelines.pop(process, None)
    if lifeline is not None:
        lifeline.close()


def speak_to(log: str) -> None:
    """Append what this process says to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
