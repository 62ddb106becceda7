"""What stands before an application of either server: pure ASGI, one layer, so that it costs little.

It gives each request its id and time limit, refuses what is too much, reads the token before the body, and turns what
nobody has caught into a problem.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import urlsplit

from shardlib_ops.audit.errors import AuditUnavailable
from shardlib_ops.serving.identity import Guard, route_of
from shardlib_ops.serving.limits import ClientGone, has_body, read_body
from shardlib_ops.serving.metrics import HttpMetrics
from shardlib_ops.serving.problem import Problem, log_unhandled, problem, problem_bytes, problem_of
from shardlib_ops.serving.requests import RequestInfo, client_address, header, put_info, request_id_of
from shardlib_ops.settings import LimitSettings, ServerSettings
from shardlib_ops.settings.model import loopback

__all__ = ["Shell"]

_LOG = logging.getLogger("shardlib.ops.serving")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEAD_BYTES_MAX: Final = 32 * 1024
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ALLOW: Final = ", ".join(sorted(_METHODS))
_ALWAYS: Final = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
_TLS_ONLY: Final = (b"strict-transport-security", b"max-age=31536000")


class Shell:
    """An ASGI application around another one.

    Args:
        app: the application.
        guard: who may come in; it also reads the tokens.
        limits: of one request and of all together.
        server: whom it believes about addresses, and whether it is for trials (`dev`).
        metrics: where requests are counted.
    """

    def __init__(
        self, app: App, guard: Guard, *, limits: LimitSettings, server: ServerSettings, metrics: HttpMetrics
    ) -> None:
        self._app, self._guard, self._limits, self._metrics = app, guard, limits, metrics
        self._trusted = server.trusted_proxies
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; hand what belongs to the application's life on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        info = RequestInfo(request_id_of(scope), client_address(scope, self._trusted))
        put_info(scope, info)
        answer = _Answer(send, info, scope, unread=has_body(scope))
        self._running += 1
        self._metrics.running.inc()
        try:
            await self._within_limits(scope, receive, answer, info)
        finally:
            self._running -= 1
            self._metrics.running.dec()
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.record(method, route_of(scope), answer.status, time.monotonic() - started)

    async def _within_limits(self, scope: Scope, receive: Receive, answer: _Answer, info: RequestInfo) -> None:
        found: Problem | None = None
        try:
            async with asyncio.timeout(self._limits.request_timeout_s) as info.deadline:
                await self._answer(scope, receive, answer, info)
        except ClientGone:
            return
        except asyncio.CancelledError:
            # The server's end, or that of whoever called: the client is told in either case, and the end goes on.
            if not answer.started:
                detail = "what it has begun was interrupted: look at it before asking again"
                await answer.problem(problem("stopping", detail, headers={"Retry-After": "1"}))
            raise
        except TimeoutError as error:
            if info.deadline is not None and info.deadline.expired():
                found = problem("timeout", "what it has begun may still be going on: look at it before asking again")
            else:
                found = self._unhandled(error, scope, info)
        except (Problem, AuditUnavailable) as error:
            found = problem_of(error)
        except Exception as error:  # noqa: BLE001 - the process goes on, the caller gets a problem, the log the rest
            found = self._unhandled(error, scope, info)
        if found is not None and not answer.complete:
            if answer.started:
                # The answer is cut off: the server closes the connection, so that it cannot pass for a whole one.
                _LOG.warning("request %s: the answer was cut off (%s)", info.request_id, found.slug)
            else:
                await answer.problem(found)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer, info: RequestInfo) -> None:
        self._refuse_early(scope)
        await self._guard.authenticate(scope)
        body = b""
        if answer.unread and info.identity is not None:
            # Of strangers nothing is read: they get their 401 with an empty body.
            body = await read_body(scope, receive, self._limits)
            answer.unread = False
        await self._app(scope, _replay(body, receive), answer.send)

    def _refuse_early(self, scope: Scope) -> None:
        if scope["method"] not in _METHODS:
            raise problem("method-not-allowed", headers={"Allow": _ALLOW})
        if sum(len(key) + len(value) for key, value in scope["headers"]) > HEAD_BYTES_MAX:
            raise problem("head-too-large", f"at most {HEAD_BYTES_MAX} bytes", headers={"Connection": "close"})
        if self._running > self._limits.requests_max:
            raise problem("unavailable", "too many requests at one time", headers={"Retry-After": "1"})
        if self._guard.verifier.open_to_all and not _from_here(scope):
            # Without tokens, a page of another site could send requests from the operator's own browser.
            raise problem("forbidden", "without keys only programs of this machine are served")

    def _unhandled(self, error: Exception, scope: Scope, info: RequestInfo) -> Problem:
        if info.error_id is None:  # else the application's own handler has told of it, and raised it again
            info.error_id = log_unhandled(error, f"{scope['method']} {scope['path']}")
        return problem("internal", error_id=info.error_id)


class _Answer:
    """The way back to the client: adds the headers of every answer, and knows how far it is."""

    def __init__(self, send: Send, info: RequestInfo, scope: Scope, *, unread: bool) -> None:
        self._send, self._info, self._tls, self.unread = send, info, scope.get("scheme") == "https", unread
        self.started = self.complete = False
        self.status = 499  # what the metrics are told when nobody has waited for an answer

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = [*message.get("headers", ()), *_ALWAYS, (b"x-request-id", self._info.request_id.encode())]
            if self._tls:
                headers.append(_TLS_ONLY)
            if self.unread and all(key.lower() != b"connection" for key, _ in headers):
                # The rest of a body that nobody wants is not waited for.
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def problem(self, found: Problem) -> None:
        """Answer with a problem."""
        status, headers, body = problem_bytes(found, self._info.request_id)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, and then tells when the client is gone."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return message
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _from_here(scope: Scope) -> bool:
    """Whether a request names this machine as its server, and as the site that it comes from, if it names one."""
    host = header(scope, b"host")
    names = ["//" + host.decode("latin-1")] if host is not None else []
    origin = header(scope, b"origin")
    if origin is not None:
        names.append(origin.decode("latin-1"))
    try:
        return all(loopback(urlsplit(name).hostname or "") for name in names)
    except ValueError:
        return False
