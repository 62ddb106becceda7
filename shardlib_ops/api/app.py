"""The manager's HTTP API as an ASGI application: to be served by `shardlib-ops manager serve`, or to be mounted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI

from shardlib.catalog import Catalog, open_catalog
from shardlib.errors import InvalidArgument
from shardlib.secrets.keys import read_keys
from shardlib_ops.api.changes import Changes
from shardlib_ops.api.cluster import Cluster
from shardlib_ops.api.document import install_document
from shardlib_ops.api.idempotency import IdempotencyKeys
from shardlib_ops.api.job_routes import job_routes
from shardlib_ops.api.look_routes import look_routes
from shardlib_ops.api.refused import install_refusals
from shardlib_ops.api.requests import Services
from shardlib_ops.api.shard_routes import shard_routes
from shardlib_ops.audit import Audit, open_audit, read_key
from shardlib_ops.auth import Denied, TokenVerifier, verifier_for
from shardlib_ops.manager.manager import Manager
from shardlib_ops.serving.health import HealthChecks, health_router
from shardlib_ops.serving.identity import Guard, check_routes
from shardlib_ops.serving.metrics import HttpMetrics
from shardlib_ops.serving.problem import install_problems
from shardlib_ops.serving.shell import Shell
from shardlib_ops.settings import Settings

__all__ = ["create_app"]

_LOG = logging.getLogger("shardlib.ops.api")

CATALOG_S: Final = 5.0
CLOSE_S: Final = 4.0
"""How long changes without a waiting caller get at the end: uvicorn has given those with one their time before."""


def create_app(
    settings: Settings,
    *,
    manager: Manager | None = None,
    audit: Audit | None = None,
    verifier: TokenVerifier | None = None,
) -> FastAPI:
    """The application. Nothing is connected yet.

    Its lifespan closes what it has opened. An application that mounts it has to run that lifespan, since ASGI servers
    only run the outer one's: `async with api.router.lifespan_context(api): yield`.

    Args:
        settings: of the servers; `catalog` is needed.
        manager: of the same cluster; made from the settings if left out. Whoever hands it in closes it.
        audit: the audit log; the one of the settings if left out. Whoever hands it in closes it.
        verifier: who is let in; by the settings if left out. Whoever hands it in closes it.

    Raises:
        InvalidArgument: no catalog, no key to check tokens with, or another setting that is not possible.
    """
    if not settings.catalog:
        raise InvalidArgument("catalog", "", "the URL of the cluster's catalog: --catalog or SHARDLIB_CATALOG")
    catalog = open_catalog(settings.catalog, timeout_s=CATALOG_S)
    owned: list[Manager | Audit | TokenVerifier] = []
    if verifier is None:
        denied = Denied(catalog, refresh_s=settings.auth.denied_refresh_s, stale_max_s=settings.auth.denied_stale_max_s)
        verifier = verifier_for(settings.auth, settings.manager, denied=denied, endpoints=settings.endpoints)
        owned.append(verifier)
    if manager is None:
        if settings.endpoints.plain_passwords == "encrypt":
            read_keys()  # without one, say so now and not at the first request
        manager = Manager(settings.catalog, timeout_s=CATALOG_S, plain_passwords=settings.endpoints.plain_passwords)
        owned.append(manager)
    if audit is None:
        audit = Audit(open_audit(settings.audit.url, catalog))
        owned.append(audit)
    metrics = HttpMetrics("manager")
    changes = Changes(audit, IdempotencyKeys(catalog), metrics.registry)
    guard = Guard(verifier, settings.limits, audit=audit)

    heads_key = None if settings.audit.key_file is None else read_key(settings.audit.key_file)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        publishing = None if heads_key is None else asyncio.create_task(audit.publish_heads(heads_key))
        try:
            yield
        finally:
            await changes.close(CLOSE_S)
            if publishing is not None:
                await _ended(publishing)
            await _close(owned, catalog)

    app = FastAPI(
        title="shardlib manager",
        summary="Shards and resharding jobs of a cluster.",
        version="1",
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.manager.docs else None,
        docs_url=None,  # its page would load a program from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    guard.install(app)
    install_problems(app)
    services = Services(Cluster(manager, catalog, settings.endpoints), changes, settings.limits.page_max)
    app.include_router(shard_routes(services))
    app.include_router(job_routes(services))
    app.include_router(look_routes(services))
    app.include_router(health_router(HealthChecks(_checks(catalog, audit))))
    app.add_middleware(Shell, guard=guard, limits=settings.limits, server=settings.manager, metrics=metrics)
    app.state.registry = metrics.registry
    roles = check_routes(app)
    install_refusals(app, guard, audit, roles)
    install_document(app, roles)
    return app


async def _ended(publishing: asyncio.Task[None]) -> None:
    publishing.cancel()
    await asyncio.wait([publishing])
    if not publishing.cancelled() and (error := publishing.exception()) is not None:
        _LOG.error("no heads of the audit log were published any more: %s", type(error).__name__)


def _checks(catalog: Catalog, audit: Audit) -> dict[str, Any]:
    async def reads() -> bool:
        await asyncio.to_thread(catalog.version)
        return True

    async def logs() -> bool:
        await audit.head()
        return True

    return {"catalog": reads, "audit": logs}


async def _close(owned: list[Manager | Audit | TokenVerifier], catalog: Catalog) -> None:
    """Close all of them, whatever happens to the others."""
    for each in owned:
        try:
            if isinstance(each, Manager | Audit):
                await each.close()
            else:
                await each.aclose()
        except Exception as error:  # noqa: BLE001 - the others are closed too
            _LOG.warning("%s was not closed: %s", type(each).__name__, type(error).__name__)
    await asyncio.to_thread(catalog.close)
