"""A server of the control plane or the gateway in a thread of its own, for blocking clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardlib_ops.serving.server import Listening, serve
from shardlib_ops.serving.shell import App
from shardlib_ops.settings import ServerSettings, Settings

WAIT_S = 60


@contextmanager
def served_in_thread(make: Callable[[], App], server: ServerSettings, settings: Settings) -> Iterator[str]:
    """The URL of an application that is made, and served, in the thread; it has ended when the block has."""
    ready, found = threading.Event(), list[str]()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def answers(listening: Listening) -> None:
        found.append(listening.url)
        ready.set()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve(make(), server, stop=stop, limits=settings.limits, on_ready=answers))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(WAIT_S)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(WAIT_S)
        assert not thread.is_alive()
