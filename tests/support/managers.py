"""The manager's HTTP API in this process, with callers of each role, for tests."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from shardlib.catalog import open_catalog
from shardlib_ops.api import create_app
from shardlib_ops.audit import Audit, Entry, open_audit, verify, walk
from shardlib_ops.auth import issue_token
from shardlib_ops.reshard.job import Job, Kind, legs_of
from shardlib_ops.reshard.store import JobStore
from shardlib_ops.settings import LimitSettings, ServerSettings, Settings
from tests.support.tokens import auth
from tests.support.topologies import make_topology

BASE = "http://manager.test"


def manager_settings(catalog: str, **changes: Any) -> Settings:
    """Settings of a manager that lets tests ask as often as they like."""
    if (audit := changes.pop("audit_settings", None)) is not None:
        changes["audit"] = audit
    limits = changes.pop("limits", LimitSettings(failed_auth_per_minute=100_000, mutations_per_minute=1_000_000))
    return Settings(**{"catalog": catalog, "auth": auth(), "limits": limits, "manager": ServerSettings(), **changes})


def token(role: str = "admin", subject: str | None = None, *, ttl_s: int = 600, now: float | None = None) -> str:
    """A token that the tests' managers believe."""
    at = time.time() if now is None else now
    return issue_token(auth(), subject=subject or f"the-{role}", role=role, ttl_s=ttl_s, now=at)


class Api:
    """A manager, and who calls it."""

    def __init__(self, app: FastAPI, catalog: str, audit: str) -> None:
        self.app, self.catalog, self._audit = app, catalog, audit
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE, timeout=60)

    async def call(
        self, method: str, path: str, *, role: str | None = "admin", subject: str | None = None, **more: Any
    ) -> httpx.Response:
        """One request, by a caller of a role; None sends no token."""
        headers = dict(more.pop("headers", {}))
        if role is not None:
            headers.setdefault("Authorization", f"Bearer {token(role, subject)}")
        if (key := more.pop("key", None)) is not None:
            headers["Idempotency-Key"] = key
        return await self.client.request(method, path, headers=headers, **more)

    def entries(self) -> list[Entry]:
        """The audit log, which is whole."""
        return audit_entries(self.catalog, self._audit)


def audit_entries(catalog: str, audit: str = "catalog:") -> list[Entry]:
    """Every entry of an audit log; that it is chained as it should be is seen by the way."""
    opened = open_catalog(catalog)
    store = open_audit(audit, opened)
    try:
        found = [item for item in walk(store) if isinstance(item, Entry)]
        assert not list(verify(found))
        return found
    finally:
        store.close()
        opened.close()


@asynccontextmanager
async def serving(catalog: str, *, audit: Audit | None = None, **changes: Any) -> AsyncIterator[Api]:
    """A manager of the cluster in this catalog."""
    settings = manager_settings(catalog, **changes)
    app = create_app(settings, audit=audit)
    async with app.router.lifespan_context(app):
        api = Api(app, catalog, settings.audit.url)
        try:
            yield api
        finally:
            await api.client.aclose()


def fill(catalog: str, shards: int = 3, vnodes: int = 8) -> None:
    """Put a topology into an empty catalog. Its servers do not exist."""
    opened = open_catalog(catalog)
    opened.publish(make_topology(shards, vnodes), expected=None)
    opened.close()


def fill_job(catalog: str) -> None:
    """Put a job into a catalog, from its first shard to its second, that nobody runs."""
    opened = open_catalog(catalog)
    ranges = opened.load().ring.ranges_of("s1")
    JobStore(opened).create(Job(id=0, kind=Kind.SPLIT, legs=legs_of([("s1", "s2", ranges)]), created_at="2026-11-24"))
    opened.close()
