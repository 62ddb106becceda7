"""The HTTP gateway as an ASGI application: to be served by `shardlib-ops gateway serve`, or to be mounted.

Written for ASGI itself: a framework would take longer for a request than PostgreSQL does for the statement in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, Final

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from shardlib import AsyncShardedEngine
from shardlib.catalog import Catalog, open_catalog
from shardlib.errors import InvalidArgument
from shardlib.telemetry import TelemetryOptions
from shardlib_ops.audit import Audit, open_audit
from shardlib_ops.auth import Denied, TokenVerifier, verifier_for
from shardlib_ops.auth.remembered import Remembered
from shardlib_ops.gateway.calls import Calls, Route
from shardlib_ops.gateway.document import document
from shardlib_ops.gateway.execute import Executor, Limits
from shardlib_ops.gateway.roles import RoleTooStrong, check_roles
from shardlib_ops.serving.health import HealthChecks
from shardlib_ops.serving.identity import Guard
from shardlib_ops.serving.metrics import HttpMetrics
from shardlib_ops.serving.problem import problem
from shardlib_ops.serving.shell import Shell
from shardlib_ops.settings import Settings

__all__ = ["Gateway", "create_gateway"]

_LOG = logging.getLogger("shardlib.ops.gateway")

CATALOG_S: Final = 5.0
ROLES_S: Final = 30.0
POOL_S: Final = 5.0
"""How long a request waits for a connection: its caller is told to come again rather than kept."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def create_gateway(
    settings: Settings,
    *,
    engine: AsyncShardedEngine | None = None,
    audit: Audit | None = None,
    verifier: TokenVerifier | None = None,
) -> Gateway:
    """The application. Nothing is connected yet: its lifespan opens the engine, and closes what was made here.

    Args:
        settings: of the servers; `catalog` is needed.
        engine: of the same cluster; made from the settings if left out. Whoever hands it in disposes of it.
        audit: where refusals are written; the one of the settings if left out. Whoever hands it in closes it.
        verifier: who is let in; by the settings if left out. Whoever hands it in closes it.

    Raises:
        InvalidArgument: no catalog, no key to check tokens with, or another setting that is not possible.
    """
    if not settings.catalog:
        raise InvalidArgument("catalog", "", "the URL of the cluster's catalog: --catalog or SHARDLIB_CATALOG")
    catalog = open_catalog(settings.catalog, timeout_s=CATALOG_S)
    owned: list[Audit | TokenVerifier] = []
    if verifier is None:
        auth = settings.auth
        denied = Denied(catalog, refresh_s=auth.denied_refresh_s, stale_max_s=auth.denied_stale_max_s)
        verifier = Remembered(verifier_for(auth, settings.gateway, denied=denied, endpoints=settings.endpoints))
        owned.append(verifier)
    if audit is None:
        audit = Audit(open_audit(settings.audit.url, catalog))
        owned.append(audit)
    return Gateway(settings, catalog, Guard(verifier, settings.limits, audit=audit), engine, owned)


class Gateway:
    """The application; made by `create_gateway`.

    Attributes:
        registry: what `/metrics` tells, on a port of its own.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        guard: Guard,
        engine: AsyncShardedEngine | None,
        owned: list[Audit | TokenVerifier],
    ) -> None:
        self._settings, self._catalog, self._guard, self._owned = settings, catalog, guard, owned
        self._engine, self._owns_engine = engine, engine is None
        metrics = HttpMetrics("gateway")
        self.registry = metrics.registry
        self.registry.register(_OfEngine(self))
        self._calls = Calls(guard, HealthChecks({"topology": self._routes}), self.openapi, settings.gateway)
        self._by_path: dict[str, dict[str, Route]] = {}
        for route in self._calls.routes():
            self._by_path.setdefault(route.path, {})[route.method] = route
        self._shell = Shell(
            self._answer, guard, limits=settings.limits, server=settings.gateway, metrics=metrics
        )  # fmt: skip

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or follow the server's life."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await self._shell(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        return document(self._calls.routes(), self._settings)

    @property
    def engine(self) -> AsyncShardedEngine | None:
        """The engine, None before the start."""
        return self._engine

    async def open(self) -> None:
        """Open the engine, and look at the roles by which it comes to the shards.

        Raises:
            InvalidArgument: on a shard, the role may do more than read and write rows.
            CatalogUnavailable: no topology, and no file with an earlier one.
        """
        gateway = self._settings.gateway
        if self._engine is None:
            self._engine = await AsyncShardedEngine.open(
                self._settings.catalog, application_name="shardlib-gateway", pool_timeout_s=POOL_S,
                pool_size=gateway.pool_size, max_overflow=gateway.max_overflow,
                max_connections=gateway.max_connections, pgbouncer=gateway.pgbouncer,
                topology_file=gateway.topology_file, telemetry=TelemetryOptions(metrics=True),
            )  # fmt: skip
        limits = Limits(gateway.rows_max, gateway.bytes_max, gateway.statement_timeout_s)
        executor = Executor(self._engine, limits, any_role=gateway.dev)
        if not gateway.dev:
            try:
                async with asyncio.timeout(ROLES_S):
                    await check_roles(self._engine, executor.vetting)
            except RoleTooStrong as error:
                raise InvalidArgument("role", error.role, str(error)) from None
            except TimeoutError:
                _LOG.warning("not every shard has told of the gateway's role within %g s", ROLES_S)
        self._calls.begin(self._engine, executor)

    async def close(self) -> None:
        """Close what was made for this application, whatever happens to a part of it; idempotent."""
        self._calls.end()
        engine, self._engine = self._engine, None if self._owns_engine else self._engine
        owned, self._owned = self._owned, []
        closing = [each.close if isinstance(each, Audit) else each.aclose for each in owned]
        if self._owns_engine and engine is not None:
            closing.insert(0, engine.dispose)
        for close in closing:
            try:
                await close()
            except Exception as error:  # noqa: BLE001 - the others are closed too
                _LOG.warning("a part of the gateway was not closed: %s", type(error).__name__)
        await asyncio.to_thread(self._catalog.close)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise  # whoever serves it knows best how to tell
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        methods = self._by_path.get(scope["path"])
        if methods is None:
            raise problem("not-found")
        route = methods.get(scope["method"])
        if route is None:
            raise problem("method-not-allowed", headers={"Allow": ", ".join(sorted(methods))})
        scope["route"] = route
        identity = None
        if route.least is not None:
            # A statement changes rows, not the cluster: it does not count among the changes of the control plane.
            identity = await self._guard.admit(scope, route.least, mutating=False, action=route.action)
        await route.call(scope, receive, send, identity)

    async def _routes(self) -> bool:
        return self._engine is not None and bool(self._engine.topology.owners())


class _OfEngine(Collector):
    """The engine's own counters, beside those of HTTP."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def describe(self) -> Iterator[Metric]:
        """Nothing: it is not known before there is an engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """What the engine has counted."""
        engine = self._gateway.engine
        if engine is not None:
            yield from text_string_to_metric_families(engine.metrics())
