"""A TCP proxy in front of a PostgreSQL server, that cuts, refuses, stalls, and loses the reply of a COMMIT.

It knows where the messages of PostgreSQL's protocol begin and end (its docs, "Message Formats"), so a fault
falls between two of them and not somewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from shardlib_ops.local.ports import HOST, PortKeeper

T = TypeVar("T")

_SSL: Final = 80877103
_GSS: Final = 80877104
_CALL_S: Final = 20.0
_LENGTH_MAX: Final = 1 << 30


@dataclass(eq=False)
class _Link:
    """One client's connection and its counterpart to the server."""

    client: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    doomed: bytes = b""
    """Tag of the command whose completion must not reach the client."""
    instead: bytes = b""
    """The message that the client gets in its place."""
    plain: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server's answers are framed, that is, after its one byte about encryption."""


class Proxy:
    """Stands between clients and one server; every method may be called from any thread.

    Args:
        dsn: of the server, as a `postgresql://` URL.

    Attributes:
        dsn: the same database through the proxy.
        connections: how many clients were let through to the server.
        cuts: how many live connections were cut.
        replies_lost: how many commands the server completed without their client being told.
    """

    def __init__(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        assert parts.hostname, "the URL names its host"
        assert parts.port, "the URL names its port"
        self._target = parts.hostname, parts.port
        self._ports = PortKeeper()
        self.port = self._ports.take()
        login = parts.netloc.rpartition("@")[0]
        self.dsn = urlunsplit(parts._replace(netloc=f"{login}@{HOST}:{self.port}" if login else f"{HOST}:{self.port}"))
        self.connections = self.cuts = self.replies_lost = 0
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rule: tuple[bytes, bool, int, bytes] | None = None
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.accept()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        self._loop.close()
        self._ports.close()

    def cut(self) -> int:
        """Reset every live connection, on both sides; how many there were."""
        return self._call(self._cut_all())

    def refuse(self) -> None:
        """Refuse new connections; live ones stay."""
        self._call(self._refuse())

    def accept(self) -> None:
        """Take new connections again."""
        self._call(self._accept())

    def down(self) -> int:
        """As a server that was killed: refuse, and cut what lives."""
        self.refuse()
        return self.cut()

    def stall(self) -> None:
        """Half-open: nothing flows and nothing is closed; new connections are taken, and hang."""
        self._call(self._set_flow(flowing=False))

    def heal(self) -> None:
        """Everything works again; what was held back by a stall is delivered."""
        self._call(self._set_flow(flowing=True))
        self._call(self._set_rule(None))
        self.accept()

    def cut_at(
        self, word: str = "COMMIT", *, forwarded: bool = True, times: int = 1, instead: tuple[str, str] | None = None
    ) -> None:
        """Cut the connection at the next command that begins with a word.

        Args:
            word: `COMMIT`, `PREPARE TRANSACTION`, `COMMIT PREPARED`, `INSERT`, ...
            forwarded: True: the server runs it to its end, and the reply is lost. False: it never gets there.
            times: how often.
            instead: severity and SQLSTATE of an error that the client gets in place of the reply, before the end of
                stream: it ran to its end all the same.
        """
        answer = b"" if instead is None else _error_message(*instead)
        self._call(self._set_rule((word.upper().encode(), forwarded, times, answer)))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        done: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(_CALL_S)

    async def _accept(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._serve, HOST, self.port, reuse_address=True)

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _set_flow(self, *, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _set_rule(self, rule: tuple[bytes, bool, int, bytes] | None) -> None:
        self._rule = rule

    async def _cut_all(self) -> int:
        links = list(self._links)
        for link in links:
            self._cut(link)
        return len(links)

    async def _close(self) -> None:
        await self._refuse()
        for link in list(self._links):
            self._drop(link)
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cut(self, link: _Link) -> None:
        if link in self._links:
            self.cuts += 1
            self._drop(link)

    def _drop(self, link: _Link) -> None:
        self._links.discard(link)
        for _, writer in (link.client, link.server):
            raw: socket.socket | None = writer.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                # Closed with a reset, as by a machine that went away, not with a polite end of stream.
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._flowing.wait()
            try:
                server = await asyncio.open_connection(*self._target)
            except OSError:
                writer.transport.abort()
                return
            link = _Link((reader, writer), server)
            self._links.add(link)
            self.connections += 1
            pumps = [asyncio.ensure_future(pump(link)) for pump in (self._upward, self._downward)]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                self._end(link)
        finally:
            self._tasks.discard(task)

    def _end(self, link: _Link) -> None:
        """One side ended by itself: so does the other, after what is on its way."""
        if link in self._links:
            self._links.discard(link)
            for _, writer in (link.client, link.server):
                writer.close()

    async def _upward(self, link: _Link) -> None:
        reader, writer = link.client[0], link.server[1]
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._start(link, reader, writer):
                pass
            while True:
                kind, message = await _message(reader)
                rule = self._matching(kind, message)
                if rule is not None and not rule[1]:
                    self._cut(link)
                    return
                await self._flowing.wait()
                if rule is not None:
                    link.doomed, _, link.instead = rule
                writer.write(message)
                await writer.drain()

    async def _start(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Forward one message of the start, which has no type; whether another of that kind follows."""
        head = await reader.readexactly(8)
        length, code = struct.unpack("!ii", head)
        message = head + await reader.readexactly(length - 8)
        await self._flowing.wait()
        writer.write(message)
        if code not in (_SSL, _GSS):
            link.plain.set()
            return False
        answer = await link.server[0].readexactly(1)
        if answer != b"N":
            raise ConnectionError("an encrypted connection cannot be followed: use sslmode=disable")
        link.client[1].write(answer)
        return True

    async def _downward(self, link: _Link) -> None:
        reader, writer = link.server[0], link.client[1]
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await link.plain.wait()
            while True:
                kind, message = await _message(reader)
                if link.doomed and kind == b"C" and message[5:].startswith(link.doomed):
                    self.replies_lost += 1
                    if link.instead:
                        writer.write(link.instead)
                        self._end(link)
                    else:
                        self._cut(link)
                    return
                await self._flowing.wait()
                writer.write(message)
                await writer.drain()

    def _matching(self, kind: bytes, message: bytes) -> tuple[bytes, bool, bytes] | None:
        if self._rule is None or kind not in (b"Q", b"P"):
            return None
        text = message[5:] if kind == b"Q" else message[5:].split(b"\0", 2)[1]
        word, forwarded, times, instead = self._rule
        if not text.lstrip().upper().startswith(word):
            return None
        self._rule = (word, forwarded, times - 1, instead) if times > 1 else None
        return word, forwarded, instead


def _error_message(severity: str, sqlstate: str) -> bytes:
    """ErrorResponse of the protocol: fields of a letter and a text, closed by a zero byte."""
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": "the server cannot go on"}
    body = b"".join(f"{letter}{value}".encode() + b"\0" for letter, value in fields.items()) + b"\0"
    return b"E" + struct.pack("!i", len(body) + 4) + body


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readexactly(5)
    length = int.from_bytes(head[1:], "big")
    if not 4 <= length <= _LENGTH_MAX:
        raise ConnectionError(f"no PostgreSQL message: length {length}")
    return head[:1], head + await reader.readexactly(length - 4)
