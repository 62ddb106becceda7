"""A TCP proxy that knows no protocol: in front of etcd, to cut a process off from the catalog."""

from __future__ import annotations

import asyncio
import contextlib

from tests.support.faults import Proxy, _Link

_AT_ONCE = 1 << 16


class Wire(Proxy):
    """`Proxy` for any protocol: `cut`, `refuse`, `down`, `stall` and `heal`, but no fault at a message.

    Args:
        url: of the server, such as `etcd://127.0.0.1:2379/shop`; `dsn` is the same through the proxy.
    """

    async def _upward(self, link: _Link) -> None:
        await self._pump(link.client[0], link.server[1])

    async def _downward(self, link: _Link) -> None:
        await self._pump(link.server[0], link.client[1])

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_AT_ONCE):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
