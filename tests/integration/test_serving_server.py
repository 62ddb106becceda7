"""The servers over real connections: limits, slow clients, and their orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from shardlib.errors import InvalidArgument
from shardlib_ops.serving.server import Listening, listen, serve
from shardlib_ops.settings import LimitSettings, ServerSettings
from tests.support.eventually import eventually_async
from tests.support.served import Served, problem_in

ROOT = Path(__file__).parents[2]
MIB = 2**20


@asynccontextmanager
async def serving(limits: dict[str, Any] | None = None, **server: Any) -> AsyncIterator[tuple[Served, Listening]]:
    served = Served(
        server=ServerSettings(**{"port": 0, "metrics_port": 0, "shutdown_s": 2, **server}),
        limits=LimitSettings(**(limits or {})),
    )
    async with listen(served.asgi, served.server, limits=served.limits, metrics=served.metrics.registry) as (found, _):
        yield served, found


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def everything(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes the connection."""
    found = bytearray()
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionResetError):
            while part := await reader.read(65536):
                found += part
    return bytes(found)


def head(served: Served, *lines: str) -> bytes:
    token = served.headers("admin")["Authorization"]
    return "\r\n".join([*lines, "Host: localhost", f"Authorization: {token}", "", ""]).encode()


async def test_requests_and_metrics() -> None:
    async with serving() as (served, at), httpx.AsyncClient(timeout=20) as client:
        assert (await client.get(at.url + "/view/1", headers=served.headers())).json()["subject"] == "alice"
        problem_in(await client.get(at.url + "/metrics", headers=served.headers()), 404, "not-found")
        assert at.metrics_url is not None
        told = await client.get(at.metrics_url + "/metrics")
        assert (
            'shardlib_http_requests_total{method="GET",route="/view/{item}",server="test",status="200"} 1.0'
            in told.text
        )
        assert (await client.get(at.metrics_url + "/")).status_code == 404
        assert (await client.post(at.metrics_url + "/metrics")).status_code == 405
        assert "server" not in told.headers


async def test_s07_20_metrics_only_where_they_are_switched_on() -> None:
    async with serving(metrics_port=None) as (_, at):
        assert at.metrics_url is None


@pytest.mark.parametrize("framing", ["Content-Length: 104857600", "Transfer-Encoding: chunked"])
async def test_s07_11_a_body_of_100_megabytes_is_not_read(framing: str) -> None:
    async with serving() as (served, at), connected(at.url) as (reader, writer):
        writer.write(head(served, "POST /create HTTP/1.1", "Content-Type: application/json", framing))
        part = b" " * 65536
        if "chunked" in framing:
            part = b"10000\r\n" + part + b"\r\n"
        sent = 0
        answering = asyncio.ensure_future(everything(reader))
        try:
            while sent < 100 * MIB and not answering.done():
                writer.write(part)
                await asyncio.wait_for(writer.drain(), 20)
                sent += len(part)
        except ConnectionError:
            pass  # the server has closed it
        answer = await answering
        assert b" 413 " in answer.split(b"\r\n")[0]
        assert b"application/problem+json" in answer
        assert sent < 30 * MIB, "only what lies in the buffers of both ends was taken"


@pytest.mark.parametrize("role", ["admin", None])
async def test_s07_11_a_client_that_sends_a_whole_large_body_reads_the_refusal(role: str | None) -> None:
    async with serving() as (served, at), httpx.AsyncClient(timeout=20) as client:
        headers = served.headers(role) if role is not None else {}
        answer = await client.post(at.url + "/create", headers=headers, content=b" " * 5 * MIB)
        if role is None:
            problem_in(answer, 401, "unauthenticated")
        else:
            problem_in(answer, 413, "body-too-large")
        assert (await client.get(at.url + "/health")).status_code == 200


@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ", b"G", b""])
async def test_a_client_that_does_not_come_to_the_end_of_its_head(sent: bytes) -> None:
    async with serving({"header_timeout_s": 0.5}) as (_, at), connected(at.url) as (reader, writer):
        writer.write(sent)
        started = time.monotonic()
        answering = asyncio.ensure_future(everything(reader))
        while sent and not answering.done() and time.monotonic() < started + 20:
            with contextlib.suppress(ConnectionError):
                writer.write(b"a")  # one byte after the other keeps no connection open
                await writer.drain()
            await asyncio.wait([answering], timeout=0.05)
        answer = await answering
        assert (b" 408 " in answer) == bool(sent)
        assert time.monotonic() - started < 15


async def test_the_second_head_on_a_connection_has_its_time_too() -> None:
    async with serving({"header_timeout_s": 3}) as (served, at), connected(at.url) as (reader, writer):
        for _ in range(3):
            await asyncio.sleep(1.1)  # longer than the limit in all: an idle connection may stay
            writer.write(head(served, "GET /view/1 HTTP/1.1"))
            answer = await asyncio.wait_for(reader.readuntil(b"}"), 20)
            assert answer.startswith(b"HTTP/1.1 200")
        writer.write(b"GET /view/1 HT")
        assert b" 408 " in await everything(reader)


async def test_a_client_that_sends_its_body_too_slowly() -> None:
    async with serving({"body_timeout_s": 0.5}) as (served, at), connected(at.url) as (reader, writer):
        writer.write(head(served, "POST /create HTTP/1.1", "Content-Type: application/json", "Content-Length: 100"))
        answering = asyncio.ensure_future(everything(reader))
        while not answering.done():
            with contextlib.suppress(ConnectionError):
                writer.write(b" ")
                await writer.drain()
            await asyncio.wait([answering], timeout=0.1)
        assert answering.result().startswith(b"HTTP/1.1 408")


async def test_a_client_that_does_not_read_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "shardlib.ops.serving")
    async with serving({"write_timeout_s": 0.5}) as (served, at):

        @served.app.get("/much", dependencies=[])
        async def much() -> dict[str, str]:
            return {"much": "x" * 20 * MIB}

        parts = urlsplit(at.url)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, (parts.hostname, parts.port))
            await asyncio.get_running_loop().sock_sendall(client, head(served, "GET /much HTTP/1.1"))

            async def cut_off() -> bool:
                return "what was sent is not read" in caplog.text

            await eventually_async(cut_off, 20, "the server gives up")
            found = 0
            async with asyncio.timeout(20):
                with contextlib.suppress(ConnectionError):
                    while part := await asyncio.get_running_loop().sock_recv(client, 65536):
                        found += len(part)
        assert found < 20 * MIB


async def test_more_connections_than_allowed_are_closed_at_once() -> None:
    async with serving({"connections_max": 2}) as (_, at), connected(at.url), connected(at.url) as (_, second):
        async with connected(at.url) as (reader, _):
            assert await everything(reader) == b""
        second.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await second.drain()


@pytest.mark.parametrize(
    "sent",
    [
        b"rubbish\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 100_000 + b"\r\n\r\n",
        b"POST /create HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /create HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_a_problem(sent: bytes) -> None:
    async with serving({"header_timeout_s": 3}) as (_, at), connected(at.url) as (reader, writer):
        writer.write(sent)
        answer = await everything(reader)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 405", b"HTTP/1.1 408", b"HTTP/1.1 431"))
        assert b"application/problem+json" in answer
        async with httpx.AsyncClient(timeout=20) as client:
            assert (await client.get(at.url + "/health")).status_code == 200, "the server goes on"


async def test_an_answer_that_breaks_off_is_noticed_by_its_client() -> None:
    async with serving() as (served, at), httpx.AsyncClient(timeout=20) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(at.url + "/broken", headers=served.headers())


async def test_what_runs_is_finished_and_nothing_new_is_taken() -> None:
    stop = asyncio.Event()
    served = Served(server=ServerSettings(port=0, metrics_port=None, shutdown_s=30))
    ready: list[Listening] = []
    running = asyncio.ensure_future(serve(served.asgi, served.server, stop=stop, on_ready=ready.append))
    await eventually_async(lambda: asyncio.sleep(0, bool(ready)), 20, "it answers")
    async with httpx.AsyncClient(timeout=20) as client:
        asked = asyncio.ensure_future(client.get(ready[0].url + "/wait", headers=served.headers()))
        await asyncio.wait_for(served.entered.wait(), 20)
        stop.set()

        async def refused() -> bool:
            async with httpx.AsyncClient(timeout=20) as other:
                try:
                    await other.get(ready[0].url + "/health")
                except httpx.TransportError:
                    return True
                return False

        await eventually_async(refused, 20, "no new connection is taken")
        assert not asked.done()
        assert not running.done()
        served.waits.set()
        assert (await asked).json() == {"waited": "to the end"}
    await asyncio.wait_for(running, 20)


async def test_what_does_not_end_is_cut_off() -> None:
    stop = asyncio.Event()
    served = Served(server=ServerSettings(port=0, metrics_port=None, shutdown_s=1))
    ready: list[Listening] = []
    running = asyncio.ensure_future(serve(served.asgi, served.server, stop=stop, on_ready=ready.append))
    await eventually_async(lambda: asyncio.sleep(0, bool(ready)), 20, "it answers")
    async with httpx.AsyncClient(timeout=60) as client:
        asked = asyncio.ensure_future(client.get(ready[0].url + "/wait", headers=served.headers()))
        await asyncio.wait_for(served.entered.wait(), 20)
        stop.set()
        await asyncio.wait_for(running, 20)
        problem_in(await asked, 503, "stopping")


async def test_an_application_that_does_not_start_says_why() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise InvalidArgument("catalog", "etcd://nowhere", "it must be there")

    with pytest.raises(InvalidArgument, match="it must be there"):
        async with listen(app, ServerSettings(port=0)):
            pass


async def test_a_port_that_is_taken_is_named() -> None:
    async with serving() as (served, at):
        port = urlsplit(at.url).port
        with pytest.raises(InvalidArgument, match=f"127.0.0.1:{port}"):
            async with listen(served.asgi, ServerSettings(port=port)):
                pass


PROGRAM = """
import asyncio, sys
from shardlib_ops.serving.server import serve, stop_on_signals
from tests.support.served import Served
from shardlib_ops.settings import ServerSettings

async def main():
    served = Served(server=ServerSettings(port=0, metrics_port=None, shutdown_s=20))

    @served.app.get("/slow")
    async def slow():
        print("entered", flush=True)
        await asyncio.sleep(1)
        return {"slow": True}

    stop = asyncio.Event()
    with stop_on_signals(stop):
        await serve(served.asgi, served.server, stop=stop, on_ready=lambda at: print(at.url, flush=True))
    print("ended", flush=True)

asyncio.run(main())
"""


@contextlib.contextmanager
def process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ}
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_process_in_order(number: signal.Signals) -> None:
    with process() as started:
        assert started.stdout is not None
        line = asyncio.to_thread(started.stdout.readline)
        url = (await asyncio.wait_for(line, 60)).strip()
        async with httpx.AsyncClient(timeout=30) as client:
            asked = asyncio.ensure_future(client.get(url + "/slow"))
            assert (await asyncio.wait_for(asyncio.to_thread(started.stdout.readline), 30)).strip() == "entered"
            started.send_signal(number)
            assert (await asked).json() == {"slow": True}
        assert (await asyncio.wait_for(asyncio.to_thread(started.stdout.readline), 30)).strip() == "ended"
        assert await asyncio.to_thread(started.wait, 30) == 0
