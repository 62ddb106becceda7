"""Running an application: listening sockets, TLS, metrics on a port of their own, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from typing import Any, Final, cast

import uvicorn
from prometheus_client import CollectorRegistry

from shardlib.errors import InvalidArgument
from shardlib_ops.audit.text import cleaned
from shardlib_ops.serving.metrics import MetricsApp
from shardlib_ops.serving.protocol import BoundedProtocol, protocol_class
from shardlib_ops.serving.shell import App, Receive, Send
from shardlib_ops.serving.tls import ServerTls
from shardlib_ops.settings import LimitSettings, ServerSettings
from shardlib_ops.settings.model import loopback

__all__ = ["Listening", "listen", "serve", "stop_on_signals"]

_LOG = logging.getLogger("shardlib.ops.serving")

HEAD_BYTES_MAX: Final = 16 * 1024
KEEP_ALIVE_S: Final = 15
START_S: Final = 60.0
TLS_END_S: Final = 5.0
BACKLOG: Final = 512


class Listening:
    """A server that answers.

    Attributes:
        url: of the application.
        metrics_url: of `/metrics`, None if it is not served.
    """

    def __init__(self, url: str, metrics_url: str | None) -> None:
        self.url, self.metrics_url = url, metrics_url


class _Server(uvicorn.Server):
    """uvicorn's server without its handlers of signals and its exits: who starts it decides what they mean."""

    def __init__(self, config: uvicorn.Config, served: _Served, handshake_s: float) -> None:
        super().__init__(config)
        self._served, self._handshake_s = served, handshake_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen. A client has as long for the handshake of TLS as for a head."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise self._served.error or RuntimeError("the application did not start; the log tells why")
        loop, config = asyncio.get_running_loop(), self.config
        protocol = cast("type[BoundedProtocol]", config.http_protocol_class)
        connect = functools.partial(
            protocol, config=config, server_state=self.server_state, app_state=self.lifespan.state
        )
        self.servers = [
            await loop.create_server(
                connect,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=self._handshake_s if config.ssl is not None else None,
                ssl_shutdown_timeout=TLS_END_S if config.ssl is not None else None,
            )
            for each in sockets or ()
        ]
        self.started = True


class _Served:
    """An application as uvicorn sees it. Remembers why it did not start, which uvicorn only logs."""

    def __init__(self, app: App) -> None:
        self.app, self.error = app, None

    app: App
    error: BaseException | None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            try:
                await self.app(scope, receive, send)
            except asyncio.CancelledError:
                # uvicorn ends what has not ended in time; it would log a traceback for it.
                what = cleaned(f"{scope['method']} {scope['path']}")
                _LOG.warning("a request was cut off by the end of the server: %s", what)
            return
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            self.error = error
            raise


async def serve(
    app: App,
    settings: ServerSettings,
    *,
    stop: asyncio.Event,
    limits: LimitSettings | None = None,
    metrics: CollectorRegistry | None = None,
    on_ready: Callable[[Listening], None] | None = None,
) -> None:
    """Serve an application until `stop` is set; then accept nothing more, finish what runs, and return.

    Args:
        app: an ASGI application, with a lifespan if it wants one.
        settings: where; how long running requests get at the end (`shutdown_s`).
        stop: see `stop_on_signals`.
        limits: of connections and slow clients.
        metrics: what `/metrics` tells, on `settings.metrics_port`.
        on_ready: called once it answers.

    Raises:
        InvalidArgument: an address that cannot be listened on, or TLS files that cannot be used.
    """
    async with listen(app, settings, limits=limits, metrics=metrics) as (listening, running):
        if on_ready is not None:
            on_ready(listening)
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([stopped, *running], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()


@contextlib.asynccontextmanager
async def listen(
    app: App,
    settings: ServerSettings,
    *,
    limits: LimitSettings | None = None,
    metrics: CollectorRegistry | None = None,
) -> AsyncIterator[tuple[Listening, list[asyncio.Task[None]]]]:
    """A server that answers inside of the block, and has come to its orderly end behind it.

    Raises:
        InvalidArgument: an address that cannot be listened on, or TLS files that cannot be used.
    """
    limits = limits if limits is not None else LimitSettings()
    tls = ServerTls(settings.tls) if settings.tls is not None else None
    if tls is None and not loopback(settings.host):
        _LOG.warning("tokens cross the network unencrypted: set tls, or let a proxy on this machine speak it")
    places = [(app, settings.port)]
    if settings.metrics_port is not None and metrics is not None:
        places.append((MetricsApp(metrics), settings.metrics_port))
    sockets: list[socket.socket] = []
    servers: list[_Server] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        for _, port in places:
            sockets.append(_bound(settings.host, port))
        scheme = "https" if tls is not None else "http"
        urls = [f"{scheme}://{_shown(settings.host)}:{bound.getsockname()[1]}" for bound in sockets]
        for (inner, _), bound in zip(places, sockets, strict=True):
            served = _Served(inner)
            config = _config(served, settings, limits, tls, with_lifespan=inner is app)
            server = _Server(config, served, limits.header_timeout_s)
            servers.append(server)
            tasks.append(asyncio.ensure_future(server.serve(sockets=[bound])))
        await _started(servers, tasks)
        for url in urls:
            _LOG.info("listening on %s", url)
        yield Listening(urls[0], urls[1] if len(urls) > 1 else None), tasks
    finally:
        for server in servers:
            server.should_exit = True
        await _ended(tasks, servers, settings.shutdown_s)
        for bound in sockets:
            bound.close()


def _config(
    app: _Served, settings: ServerSettings, limits: LimitSettings, tls: ServerTls | None, *, with_lifespan: bool
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol_class(limits),
        ws="none",
        lifespan="on" if with_lifespan else "off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # `client_address` reads them, from configured proxies only
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.shutdown_s,
        h11_max_incomplete_event_size=HEAD_BYTES_MAX,
        backlog=BACKLOG,
        ssl_context_factory=(lambda *_: tls.context) if tls is not None else None,
    )


async def _started(servers: list[_Server], tasks: list[asyncio.Task[None]]) -> None:
    async with asyncio.timeout(START_S):
        while not all(server.started for server in servers):
            for task in tasks:
                if task.done():
                    task.result()
                    raise RuntimeError("the server ended before it answered")
            await asyncio.wait(tasks, timeout=0.01)


async def _ended(tasks: list[asyncio.Task[None]], servers: list[_Server], shutdown_s: float) -> None:
    if not tasks:
        return
    # uvicorn ends by itself within `shutdown_s`; what does not is cut off, so that the process ends.
    _, left = await asyncio.wait(tasks, timeout=shutdown_s + 5)
    for server in servers:
        for connection in list(server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
    for task in left:
        _LOG.error("a server did not come to its end within %s s and is cut off", shutdown_s + 5)
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            _LOG.error("a server ended with an error: %s", type(result).__name__)


def _bound(host: str, port: int) -> socket.socket:
    problem = ""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        bound.setblocking(False)
    except (OSError, UnicodeError) as error:
        problem = getattr(error, "strerror", None) or type(error).__name__
    if problem:
        raise InvalidArgument("listen", f"{host}:{port}", problem)
    return bound


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


@contextlib.contextmanager
def stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` at SIGTERM and SIGINT while the block runs. A second signal ends the process as it always does."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def stopped(number: signal.Signals) -> None:
        _LOG.info("%s: no new requests, those that run are finished", number.name)
        loop.remove_signal_handler(number)
        stop.set()

    for each in signals:
        loop.add_signal_handler(each, stopped, each)
    try:
        yield
    finally:
        for each in signals:
            loop.remove_signal_handler(each)
