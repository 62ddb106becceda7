"""The calls of the gateway: what each reads, and how it answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from shardlib import AsyncShardedEngine
from shardlib_ops.auth import Identity, Role
from shardlib_ops.gateway.asked import asked_key, read_asked
from shardlib_ops.gateway.execute import Executor, Statement
from shardlib_ops.gateway.problems import known_problem
from shardlib_ops.serving.health import HealthChecks
from shardlib_ops.serving.identity import RECHECK_S, Guard
from shardlib_ops.serving.limits import ClientGone
from shardlib_ops.serving.problem import Problem, log_unhandled, problem
from shardlib_ops.serving.requests import Scope, header, request_info
from shardlib_ops.settings import GatewaySettings

__all__ = ["LINES", "Calls", "Route"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Call = Callable[[Scope, Receive, Send, Identity | None], Awaitable[None]]

LINES: Final = "application/x-ndjson"
_JSON: Final = (b"content-type", b"application/json")
_LINES_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", LINES.encode())],
}
EXTRA_S: Final = 30.0
"""What a request gets beyond the time of its statement: for a connection, a range that is being moved, and COMMIT."""

WATCH_AFTER_S: Final = 0.02
"""Most statements are over by then; only of the others it is seen when the client goes away."""


@dataclass(frozen=True, slots=True)
class Route:
    """One call.

    Attributes:
        method: of HTTP.
        path: the whole of it.
        least: the least role, None for everybody.
        action: its name in the audit log.
        call: answers.
    """

    method: str
    path: str
    least: Role | None
    action: str
    call: Call


class Calls:
    """What the gateway does.

    Args:
        guard: of the server.
        health: what `/health` asks.
        openapi: the document.
        settings: of the gateway.
    """

    def __init__(
        self, guard: Guard, health: HealthChecks, openapi: Callable[[], dict[str, Any]], settings: GatewaySettings
    ) -> None:
        self._guard, self._health, self._openapi, self._settings = guard, health, openapi, settings
        self._engine: AsyncShardedEngine | None = None
        self._executor: Executor | None = None

    def begin(self, engine: AsyncShardedEngine, executor: Executor) -> None:
        """Answer from now on."""
        self._engine, self._executor = engine, executor

    def end(self) -> None:
        """Answer no more."""
        self._engine = self._executor = None

    def routes(self) -> list[Route]:
        """Every call, each with the role that it needs."""
        found = [
            Route("POST", "/v1/execute", Role.VIEWER, "execute", self.execute),
            Route("GET", "/v1/shard-for-key", Role.VIEWER, "shard-for-key", self.shard_for_key),
            Route("GET", "/health", None, "health", self.health),
        ]
        if self._settings.docs:
            found.append(Route("GET", "/openapi.json", None, "openapi", self.openapi))
        return found

    async def execute(self, scope: Scope, receive: Receive, send: Send, identity: Identity | None) -> None:
        """`POST /v1/execute`."""
        if identity is None or self._executor is None:
            raise problem("unavailable", "the gateway is not ready", headers={"Retry-After": "1"})
        _check_type(scope)
        asked = read_asked(
            (await receive())["body"], self._executor.limits.timeout_s, read_only=identity.role is Role.VIEWER
        )
        statement = asked.statement
        request_info(scope).allow((statement.timeout_s or self._executor.limits.timeout_s) + EXTRA_S)
        stream = asked.stream if asked.stream is not None else _wants_lines(scope)
        if stream:
            await _Stream(self._guard, identity, scope, send, self._problem).run(receive, self._executor, statement)
            return
        try:
            async with _while_connected(receive):
                answer = await self._executor.run(statement)
        except (ClientGone, Problem):
            raise
        except Exception as error:
            if (found := await self._problem(scope, error)) is None:
                raise
            raise found from None
        await _send_json(send, answer.json())

    async def _problem(self, scope: Scope, error: Exception) -> Problem | None:
        """What is told of an error, None if nobody expected it. A write without the role for it is in the audit log."""
        found = known_problem(error)
        if found is not None and found.slug == "read-only":
            return await self._guard.refuse(scope, "execute", scope["path"], "role", found)
        return found

    async def shard_for_key(self, scope: Scope, receive: Receive, send: Send, identity: Identity | None) -> None:
        """`GET /v1/shard-for-key`."""
        if self._engine is None:
            raise problem("unavailable", "the gateway is not ready", headers={"Retry-After": "1"})
        token = self._engine.token(asked_key(scope["query_string"]))
        shard = self._engine.topology.shard_of(token)
        found = {"shard_id": shard.id, "shard_name": shard.name, "hash_value": str(token)}
        await _send_json(send, msgspec.json.encode(found))

    async def health(self, scope: Scope, receive: Receive, send: Send, identity: Identity | None) -> None:
        """`GET /health`."""
        found = await self._health.health()
        await _send_json(send, found.model_dump_json().encode(), 200 if found.status == "ok" else 503)

    async def openapi(self, scope: Scope, receive: Receive, send: Send, identity: Identity | None) -> None:
        """`GET /openapi.json`."""
        await _send_json(send, json.dumps(self._openapi()).encode())


class _Stream:
    """Rows as lines, sent as they come. The answer begins with the first of them, so that what fails before is told
    by its status; what fails later is the last line.
    """

    def __init__(
        self,
        guard: Guard,
        identity: Identity,
        scope: Scope,
        send: Send,
        problem_for: Callable[[Scope, Exception], Awaitable[Problem | None]],
    ) -> None:
        self._guard, self._identity, self._scope, self._send = guard, identity, scope, send
        self._problem_for = problem_for
        self._started = False
        self._seen_at = time.monotonic()

    async def run(self, receive: Receive, executor: Executor, statement: Statement) -> None:
        try:
            async with _while_connected(receive):
                await executor.stream(statement, self._emit)
        except ClientGone:
            raise
        except Exception as error:
            found = error if isinstance(error, Problem) else await self._problem_for(self._scope, error)
            if not self._started:
                if found is None or found is error:
                    raise
                raise found from None
            info = request_info(self._scope)
            if found is None:
                info.error_id = log_unhandled(error, f"{self._scope['method']} {self._scope['path']}")
                found = problem("internal", error_id=info.error_id)
            line = json.dumps({"error": found.content(info.request_id)}, ensure_ascii=False).encode() + b"\n"
            await self._send({"type": "http.response.body", "body": line, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def _emit(self, lines: bytes) -> None:
        if not self._started:
            self._started = True
            await self._send(dict(_LINES_START))
        elif time.monotonic() - self._seen_at > RECHECK_S:
            self._seen_at = time.monotonic()
            if not lines.startswith(b'{"end"') and not await self._guard.still_valid(self._identity):
                raise problem("unauthenticated", "the token has expired or was denied meanwhile; nothing is kept")
        await self._send({"type": "http.response.body", "body": lines, "more_body": True})


@asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """Ends the block when the client closes its connection.

    Raises:
        ClientGone: it did; what ran was cancelled.
    """
    loop = asyncio.get_running_loop()
    gone = asyncio.timeout(None)
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.reschedule(loop.time())

    timer = loop.call_later(WATCH_AFTER_S, lambda: watching.append(loop.create_task(watch())))
    try:
        async with gone:
            yield
    except TimeoutError:
        if gone.expired():
            raise ClientGone from None
        raise
    finally:
        timer.cancel()
        for task in watching:
            task.cancel()


async def _send_json(send: Send, body: bytes, status: int = 200) -> None:
    headers = [_JSON, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _check_type(scope: Scope) -> None:
    given = header(scope, b"content-type")
    if given is not None and given.partition(b";")[0].strip().lower() != b"application/json":
        raise problem("unsupported-media-type", "the body is application/json")


def _wants_lines(scope: Scope) -> bool:
    given = header(scope, b"accept")
    return given is not None and LINES.encode() in given.lower()
