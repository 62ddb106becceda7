"""The replication protocol over a connection of psycopg: COPY in both directions, without blocking the event loop.

Source: PostgreSQL documentation, "Streaming Replication Protocol".
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, pq

from shardlib.errors import ShardUnavailable
from shardlib_ops.reshard.control import publication
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.stream.decode import lsn_text
from shardlib_ops.reshard.stream.faults import SlotLost

__all__ = ["Wire"]

_feedback: Final = struct.Struct("!cQQQQB").pack
# While these are decoded the applier waits for its turn.
_AT_ONCE: Final = 500
_START_S: Final = 30.0
# What the server says when the slot is no use any more: unknown, invalidated, or its publication is gone.
_LOST: Final = frozenset({"42704", "55000", "58P01"})


class Wire:
    """A running stream. Made by `open`; the caller closes it."""

    def __init__(self, conn: AsyncConnection[Any], link: Link) -> None:
        self._conn, self._pg, self._link = conn, conn.pgconn, link

    @classmethod
    async def open(cls, link: Link, start: int) -> Wire:
        """Let the origin send what follows `start` in the slot of a leg.

        Raises:
            SlotLost: the slot is not there, or is not any more able to send that.
            ShardUnavailable: no server.
        """
        conn = await link.open_origin("stream", replication=True)
        wire = cls(conn, link)
        try:
            await conn.execute("SET client_encoding = 'UTF8'")
            async with asyncio.timeout(_START_S):
                await wire._start(start)
        except TimeoutError:
            await conn.close()
            raise ShardUnavailable(link.origin.name, f"START_REPLICATION took more than {_START_S:g} s") from None
        except BaseException:
            await conn.close()
            raise
        return wire

    async def _start(self, start: int) -> None:
        names = publication(self._link.runner.job)
        self._pg.send_query(
            f'START_REPLICATION SLOT "{self._link.slot}" LOGICAL {lsn_text(start)} '
            f"(proto_version '1', publication_names '{names}', messages 'true')".encode()
        )
        while self._pg.flush() or self._pg.is_busy():
            await self._readable(0.1)
            self._pg.consume_input()
        result = self._pg.get_result()
        if result is None or result.status != pq.ExecStatus.COPY_BOTH:
            self._broken(result)

    async def read(self, timeout_s: float) -> list[bytes]:
        """The messages that are here, `w` and `k`; waits up to `timeout_s` for the first, empty if none came.

        Raises:
            SlotLost: the origin cannot go on from this slot.
            ShardUnavailable: the connection is gone.
        """
        found = self._buffered()
        if not found:
            self._pg.consume_input()
            found = self._buffered()
        if not found:
            await self._readable(timeout_s)
            self._pg.consume_input()
            found = self._buffered()
        return found

    def _buffered(self) -> list[bytes]:
        found: list[bytes] = []
        get, append = self._pg.get_copy_data, found.append
        size, data = get(1)
        while size > 0:
            append(bytes(data))
            if len(found) == _AT_ONCE:
                return found
            size, data = get(1)
        if size < 0 and not found:
            self._broken(self._pg.get_result())
        return found

    def confirm(self, received: int, durable: int, *, ask: bool) -> None:
        """Tell the origin what it need not keep any more; `ask` for an answer, which tells how far it has sent."""
        # Of a connection that is lost the reader tells; what does not fit into its buffer goes with the next one.
        with contextlib.suppress(psycopg.OperationalError):
            self._pg.put_copy_data(_feedback(b"r", max(received, durable), durable, durable, 0, ask))
            self._pg.flush()

    async def close(self) -> None:
        """End the connection; the slot stays."""
        await self._conn.close()

    async def _readable(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        ready, socket = asyncio.Event(), self._pg.socket
        loop.add_reader(socket, ready.set)
        timer = loop.call_later(timeout_s, ready.set)
        try:
            await ready.wait()
        finally:
            timer.cancel()
            loop.remove_reader(socket)

    def _broken(self, result: Any) -> None:
        state = b""
        text = "the server ended the stream"
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            state = result.error_field(pq.DiagnosticField.SQLSTATE) or b""
            text = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace") or text
        if state.decode() in _LOST:
            raise SlotLost(
                f"slot {self._link.slot!r} of shard {self._link.origin.name!r} cannot be read: {text}",
                "the copy has to start anew",
            )
        raise ShardUnavailable(self._link.origin.name, f"the stream ended: {text}")
