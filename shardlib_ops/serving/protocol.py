"""uvicorn's HTTP/1.1 protocol with bounds on slow clients, and problems for what is no HTTP."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from shardlib_ops.serving.problem import problem, problem_bytes
from shardlib_ops.settings import LimitSettings

__all__ = ["BoundedProtocol", "protocol_class"]

LINGER_S: Final = 2.0
LINGER_BYTES: Final = 16 * 2**20

_LOG = logging.getLogger("shardlib.ops.serving")


class _Lingering:
    """The transport of a connection as uvicorn sees it: its `close` is that of the protocol."""

    def __init__(self, transport: asyncio.Transport, protocol: BoundedProtocol) -> None:
        self._transport, self._protocol = transport, protocol

    def close(self) -> None:
        self._protocol.close()

    def is_closing(self) -> bool:
        return self._protocol.lingering or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedProtocol(H11Protocol):
    """One connection.

    Its client has `header_timeout_s` for the head of each request, counted from its first byte (for the first
    request from the connection's begin), and `write_timeout_s` to read what was sent.

    A connection that is closed while a body is still coming is read on for a moment, and what comes is thrown away:
    closed at once, TCP would answer those bytes by a reset, which takes the answer from the client that has not read
    it yet (RFC 9112 9.6).
    """

    limits = LimitSettings()
    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None
    _end: asyncio.TimerHandle | None = None
    _thrown_away = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: its time for the first head begins."""
        super().connection_made(transport)
        self._real = transport
        self.transport = cast("asyncio.Transport", _Lingering(transport, self))
        if len(self.connections) > self.limits.connections_max:
            _LOG.info("a connection is closed at once: there are %d", self.limits.connections_max)
            transport.abort()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request, or of several."""
        if self._end is not None:
            self._thrown_away += len(data)
            if self._thrown_away > LINGER_BYTES:
                self._real.abort()
            return
        if self._head is None and self.conn.their_state is h11.IDLE:
            self._await_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._cancel_head()
        self._cancel_write()
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is sent to: its time to read begins."""
        super().pause_writing()
        if self._write is None:
            self._write = self.loop.call_later(self.limits.write_timeout_s, self._unread)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._cancel_write()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse("bad-request", "it is no HTTP/1.1, or its head is too long")

    @property
    def lingering(self) -> bool:
        """Whether the connection is as good as closed, and read on only to throw away what comes."""
        return self._end is not None

    def close(self) -> None:
        """Close the connection once what was sent has gone out."""
        if self._end is not None:
            return
        if self.conn.their_state is not h11.SEND_BODY or self._real.is_closing():
            self._real.close()
            return
        self._end = self.loop.call_later(LINGER_S, self._real.abort)
        if self._real.can_write_eof():
            self._real.write_eof()
        self._real.resume_reading()

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.limits.header_timeout_s, self._no_head)

    def _cancel_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _cancel_write(self) -> None:
        if self._write is not None:
            self._write.cancel()
            self._write = None

    def _no_head(self) -> None:
        self._head = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._refuse("request-timeout", f"the head did not come within {self.limits.header_timeout_s:g} s")
        else:
            self.transport.close()  # not a word was said: there is nobody to answer

    def _unread(self) -> None:
        self._write = None
        _LOG.info("a connection is closed: what was sent is not read")
        self.transport.abort()

    def _refuse(self, slug: str, detail: str) -> None:
        self._cancel_head()
        status, headers, body = problem_bytes(problem(slug, detail, headers={"Connection": "close"}), None)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        for event in (
            h11.Response(status_code=status, headers=headers, reason=b""),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(cast("Any", self.conn.send(event)) or b"")
        self.transport.close()


def protocol_class(limits: LimitSettings) -> type[BoundedProtocol]:
    """The protocol of a server with these limits: uvicorn makes one for each connection."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
