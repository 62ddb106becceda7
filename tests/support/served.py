"""A small application behind the shell of the servers, and clients for it; for the tests of what both servers share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from shardlib_ops.audit import Actor
from shardlib_ops.auth import Identity, Role, issue_token, verifier_for
from shardlib_ops.auth.verifier import TokenVerifier
from shardlib_ops.serving.health import HealthChecks, health_router
from shardlib_ops.serving.identity import Guard, needs, while_valid
from shardlib_ops.serving.metrics import HttpMetrics
from shardlib_ops.serving.problem import install_problems
from shardlib_ops.serving.requests import request_info
from shardlib_ops.serving.shell import Shell
from shardlib_ops.settings import AuthSettings, LimitSettings, ServerSettings
from tests.support.tokens import auth


class Named(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=80)
    tree: Any = None


class Recorded:
    """Refusals as they would stand in the audit log; can be away, as a full disk is."""

    def __init__(self) -> None:
        self.entries: list[tuple[Actor, str, str, str]] = []
        self.fails: Exception | None = None

    async def refused(self, actor: Actor, action: str, target: str, why: str) -> None:
        if self.fails is not None:
            raise self.fails
        self.entries.append((actor, action, target, why))


class Served:
    """The application, and what is around it."""

    def __init__(
        self,
        *,
        settings: AuthSettings | None = None,
        server: ServerSettings | None = None,
        limits: LimitSettings | None = None,
        verifier: TokenVerifier | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        checks: dict[str, Any] | None = None,
    ) -> None:
        self.auth = settings or auth()
        self.server = server or ServerSettings(port=0, metrics_port=0)
        self.limits = limits or LimitSettings()
        self.audit, self.metrics = Recorded(), HttpMetrics("test")
        self.verifier = verifier or verifier_for(self.auth, self.server)
        self.guard = Guard(self.verifier, self.limits, audit=self.audit, monotonic=monotonic)
        self.raises: Exception | None = None
        self.waits = asyncio.Event()
        self.entered = asyncio.Event()
        self.closed = False
        self.app = self._application(checks or {})
        self.asgi = Shell(self.app, self.guard, limits=self.limits, server=self.server, metrics=self.metrics)

    def _application(self, checks: dict[str, Any]) -> FastAPI:
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        install_problems(app)
        self.guard.install(app)
        app.include_router(health_router(HealthChecks(checks)))

        router = APIRouter()

        @router.get("/things/{thing}")
        async def things(thing: str, who: Annotated[Identity, Depends(needs(Role.VIEWER))]) -> dict[str, str]:
            return {"thing": thing}

        app.include_router(router, prefix="/api/v1")

        @app.get("/view/{item}")
        async def view(item: str, who: Annotated[Identity, Depends(needs(Role.VIEWER))]) -> dict[str, str]:
            return {"subject": who.subject, "item": item}

        @app.post("/operate")
        async def operate(body: Named, who: Annotated[Identity, Depends(needs(Role.OPERATOR))]) -> dict[str, str]:
            return {"name": body.name}

        @app.post("/create", status_code=201)
        async def create(
            body: Named, who: Annotated[Identity, Depends(needs(Role.ADMIN, action="thing.create"))]
        ) -> dict[str, str]:
            return {"name": body.name}

        @app.post("/query")
        async def query(
            body: Named, who: Annotated[Identity, Depends(needs(Role.VIEWER, mutating=False))]
        ) -> dict[str, str]:
            return {"name": body.name}

        @app.get("/raise")
        async def raising(who: Annotated[Identity, Depends(needs(Role.VIEWER))]) -> None:
            if self.raises is not None:
                raise self.raises

        @app.get("/wait")
        async def wait(who: Annotated[Identity, Depends(needs(Role.VIEWER))]) -> dict[str, str]:
            self.entered.set()
            await self.waits.wait()
            return {"waited": "to the end"}

        @app.get("/stream")
        async def stream(request: Request, who: Annotated[Identity, Depends(needs(Role.VIEWER))]) -> StreamingResponse:
            request_info(request.scope).allow(None)
            return StreamingResponse(while_valid(self.guard, who, self._lines(), recheck_s=0.05))

        @app.get("/broken")
        async def broken(who: Annotated[Identity, Depends(needs(Role.VIEWER))]) -> StreamingResponse:
            async def lines() -> AsyncIterator[bytes]:
                yield b"a part\n"
                raise RuntimeError("in the middle")

            return StreamingResponse(lines())

        return app

    async def _lines(self) -> AsyncIterator[bytes]:
        try:
            yield b"first\n"
            self.entered.set()
            await self.waits.wait()
            yield b"second\n"
        finally:
            self.closed = True

    def token(self, role: str = "viewer", subject: str = "alice", **more: Any) -> str:
        return issue_token(self.auth, **{"subject": subject, "role": role, "ttl_s": 600, "now": time.time(), **more})

    def headers(self, role: str = "viewer", subject: str = "alice", **more: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(role, subject, **more)}"}

    @asynccontextmanager
    async def client(self, address: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
        """A client that calls the application without a network."""
        transport = httpx.ASGITransport(self.asgi, client=(address, 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            yield client


def problem_in(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The problem of an answer, which must be a whole one."""
    found: dict[str, Any] = response.json()
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert (found["type"], found["status"]) == (f"urn:shardlib:problem:{slug}", status)
    assert found["title"]
    assert found["detail"]
    assert found["instance"] == f"urn:shardlib:request:{response.headers['x-request-id']}"
    return found
