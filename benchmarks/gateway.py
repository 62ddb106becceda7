"""What the gateway adds to a statement: BARS `gateway`.

Three applications behind the same stack (HTTP/1.1, TLS apart: limits, token, metrics), in one process of their own: the
gateway; a handler that runs the same query by asyncio psycopg, in a transaction as its connections do it; and one that
answers a constant. Each request selects one row by its key. Clients speak HTTP over sockets that stay open.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from typing import Any, Self

import psycopg
from pydantic import SecretStr

from benchmarks.report import Row, at_least, at_most
from benchmarks.transaction import KEYS, fill
from shardlib import ShardedEngine
from shardlib_ops import LocalCluster
from shardlib_ops.auth import Role, issue_token, verifier_for
from shardlib_ops.auth.remembered import Remembered
from shardlib_ops.gateway import create_gateway
from shardlib_ops.serving.identity import Guard
from shardlib_ops.serving.metrics import HttpMetrics
from shardlib_ops.serving.server import listen
from shardlib_ops.serving.shell import Shell
from shardlib_ops.settings import AuthSettings, GatewaySettings, Settings

__all__ = ["run"]

QUERY = "SELECT id, name FROM item WHERE tenant = $1 AND id = $2"
CLIENTS = 16
POOL = 20
SLICE_S = 1.5
SECRET = "3f9c0e2a7b51d8466c0fa1e97d24b83c5e60"


def run(scale: float) -> list[Row]:
    """Rows of the section `gateway`."""
    with LocalCluster(shards=1) as cluster:
        with ShardedEngine(cluster.url) as engine:
            fill(engine)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(cluster.url, cluster.servers[0].dsn, theirs), daemon=True)
        process.start()
        try:
            if not ours.poll(120):
                raise RuntimeError("the servers did not start")
            ports = ours.recv()
            added_ms, throughput = asyncio.run(_measure(ports, scale))
        finally:
            ours.close()
            process.join(30)
            if process.is_alive():
                process.kill()
    stack, plain = throughput["gateway"], throughput["psycopg"]
    return [
        at_most("gateway", "one-row select, one client: p50 beyond the stack with psycopg", added_ms, None, "ms", 1.0),
        at_least("gateway", f"one-row select, {CLIENTS} clients, one process", stack, plain, "requests/s", 0.5),
        Row("gateway", f"a constant by the same stack, {CLIENTS} clients", throughput["constant"], None, "requests/s",
            throughput["constant"], ""),
    ]  # fmt: skip


async def _measure(ports: Mapping[str, int], scale: float) -> tuple[float, dict[str, float]]:
    token = issue_token(_auth(), subject="benchmark", role=Role.ADMIN, ttl_s=3600, now=time.time())
    request = _request(token)
    async with AsyncExitStack() as stack:
        clients = {
            name: [await stack.enter_async_context(_Client(port, request)) for _ in range(CLIENTS)]
            for name, port in ports.items()
        }
        took: dict[str, list[float]] = {name: [] for name in ports}
        rounds = max(50, int(2000 * scale))
        for turn in range(rounds + rounds // 5):
            for name in sorted(ports, reverse=bool(turn % 2)):
                began = time.perf_counter()
                await clients[name][0].ask()
                if turn >= rounds // 5:  # those before warm up
                    took[name].append(time.perf_counter() - began)
        counts: dict[str, list[float]] = {name: [] for name in ports}
        for turn in range(max(2, int(8 * scale))):
            for name in sorted(ports, reverse=bool(turn % 2)):
                counts[name].append(await _per_second(clients[name], SLICE_S))
    added_ms = (statistics.median(took["gateway"]) - statistics.median(took["psycopg"])) * 1e3
    return added_ms, {name: statistics.median(found) for name, found in counts.items()}


async def _per_second(clients: list[_Client], seconds: float) -> float:
    done, began = 0, time.perf_counter()

    async def ask(client: _Client) -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await client.ask()
            done += 1

    await asyncio.gather(*(ask(client) for client in clients))
    return done / (time.perf_counter() - began)


class _Client:
    """One connection that sends one request again and again: as little as possible of what is measured is its own."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port, self._request = port, request

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self) -> bytes:
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return await self._reader.readexactly(int(length))


def _request(token: str) -> bytes:
    body = json.dumps({"shard_key": KEYS[0], "query": QUERY, "params": [KEYS[0], 1]}).encode()
    head = (
        "POST /v1/execute HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _auth() -> AuthSettings:
    return AuthSettings(secret=SecretStr(SECRET))


def _serve(catalog: str, dsn: str, told: Connection) -> None:
    asyncio.run(_serving(catalog, dsn, told))


async def _serving(catalog: str, dsn: str, told: Connection) -> None:
    """The three servers, until the other end of `told` is closed."""
    settings = Settings(
        catalog=catalog, auth=_auth(), gateway=GatewaySettings(port=0, metrics_port=None, dev=True, pool_size=POOL)
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        pool: asyncio.LifoQueue[Any] = asyncio.LifoQueue()
        for _ in range(POOL):
            pool.put_nowait(await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn)))

        async def by_psycopg(body: bytes) -> bytes:
            asked = json.loads(body)
            conn = await pool.get()
            try:
                cursor = psycopg.AsyncRawCursor(conn)
                await cursor.execute(asked["query"], asked["params"])
                rows = [dict(zip(("id", "name"), row, strict=True)) for row in await cursor.fetchall()]
                await conn.commit()
            finally:
                pool.put_nowait(conn)
            return json.dumps({"rows": rows, "row_count": len(rows)}).encode()

        constant = json.dumps({"rows": [{"id": 1, "name": "one"}], "row_count": 1}).encode()

        async def a_constant(body: bytes) -> bytes:
            return constant

        gateway = create_gateway(settings)
        apps = {
            "gateway": gateway,
            "psycopg": _in_stack(by_psycopg, settings),
            "constant": _in_stack(a_constant, settings),
        }
        ports = {}
        for name, app in apps.items():
            listening, _ = await stack.enter_async_context(listen(app, settings.gateway, limits=settings.limits))
            ports[name] = int(listening.url.rpartition(":")[2])
        told.send(ports)
        closed = asyncio.Event()
        asyncio.get_running_loop().add_reader(told.fileno(), closed.set)
        await closed.wait()
        asyncio.get_running_loop().remove_reader(told.fileno())


def _in_stack(answer: Callable[[bytes], Awaitable[bytes]], settings: Settings) -> Any:
    guard = Guard(Remembered(verifier_for(settings.auth, settings.gateway)), settings.limits)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await guard.admit(scope, Role.VIEWER, mutating=False)
        body = await answer((await receive())["body"])
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return Shell(app, guard, limits=settings.limits, server=settings.gateway, metrics=HttpMetrics("benchmark"))
