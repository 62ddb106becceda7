"""A gateway that is served over a real connection, and callers of each role, for tests."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from shardlib_ops.audit import Entry
from shardlib_ops.auth import issue_token
from shardlib_ops.gateway import Gateway, create_gateway
from shardlib_ops.serving.server import Listening, listen
from shardlib_ops.settings import GatewaySettings, LimitSettings, Settings
from tests.support.managers import audit_entries
from tests.support.tokens import auth


def gateway_settings(catalog: str, **changes: Any) -> Settings:
    """Settings of a gateway for trials, on free ports; what is no section is an option of the gateway."""
    sections = {name: changes.pop(name) for name in ("limits", "auth") if name in changes}
    server = GatewaySettings(**{"port": 0, "metrics_port": 0, "dev": True, "docs": True, "shutdown_s": 20, **changes})
    limits = LimitSettings(failed_auth_per_minute=100_000)
    return Settings(**{"catalog": catalog, "auth": auth(), "limits": limits, "gateway": server, **sections})


class Caller:
    """A gateway, and who calls it."""

    def __init__(self, gateway: Gateway, listening: Listening, client: httpx.AsyncClient, settings: Settings) -> None:
        self.gateway, self.listening, self.client, self.settings = gateway, listening, client, settings

    def headers(self, role: str = "admin", **claims: Any) -> dict[str, str]:
        """Of a caller with this role."""
        given = {"subject": f"the-{role}", "role": role, "ttl_s": 600, "now": time.time(), **claims}
        return {"Authorization": f"Bearer {issue_token(self.settings.auth, **given)}"}

    async def execute(
        self, query: str, *params: object, key: object = "a", role: str = "admin", **more: Any
    ) -> httpx.Response:
        """One statement; `more` are further fields of its body."""
        body = {"shard_key": key, "query": query, "params": list(params), **more}
        return await self.client.post("/v1/execute", json=body, headers=self.headers(role))

    async def rows(self, query: str, *params: object, **more: Any) -> Any:
        """The rows of a statement that succeeds."""
        answer = await self.execute(query, *params, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()["rows"]

    async def get(self, path: str, role: str | None = "viewer") -> httpx.Response:
        """One GET."""
        return await self.client.get(path, headers={} if role is None else self.headers(role))

    def refused(self) -> list[Entry]:
        """What the audit log tells of refusals."""
        return [entry for entry in audit_entries(self.settings.catalog) if entry.kind == "refused"]


@asynccontextmanager
async def gateway_of(catalog: str, **changes: Any) -> AsyncIterator[Caller]:
    """A gateway of the cluster in this catalog, served until the end of the block."""
    settings = gateway_settings(catalog, **changes)
    gateway = create_gateway(settings)
    async with (
        listen(gateway, settings.gateway, limits=settings.limits, metrics=gateway.registry) as (listening, _),
        httpx.AsyncClient(base_url=listening.url, timeout=60) as client,
    ):
        yield Caller(gateway, listening, client, settings)
