"""`GET /health`: whether a server can do its work, told to everybody, and so with nothing of what is behind it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from shardlib_ops.serving.identity import anybody

__all__ = ["Health", "HealthChecks", "health_router"]

_LOG = logging.getLogger("shardlib.ops.serving")

CHECK_S: Final = 3.0
KEEP_S: Final = 1.0


class Health(BaseModel):
    """The answer of `GET /health`."""

    status: str = Field(description="`ok`, or `degraded` when a check fails (the status of HTTP is 503 then)")
    version: str = Field(description="of shardlib")
    uptime_seconds: float
    checks: dict[str, bool] = Field(description="each part that the server needs, and whether it answers")


class HealthChecks:
    """Asks the parts that a server needs, at most once a second: everybody may ask it.

    Args:
        checks: name -> coroutine function, True if the part answers. One that raises or takes too long does not.
        monotonic: seconds of a clock that nobody sets.
    """

    def __init__(
        self,
        checks: Mapping[str, Callable[[], Awaitable[bool]]],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checks, self._monotonic = dict(checks), monotonic
        self._started_at = monotonic()
        self._seen: dict[str, bool] = {}
        self._seen_at = float("-inf")
        self._asking: asyncio.Lock | None = None

    async def health(self) -> Health:
        """How the server is."""
        from importlib.metadata import version

        if self._asking is None:
            self._asking = asyncio.Lock()
        async with self._asking:
            if self._monotonic() - self._seen_at >= KEEP_S:
                names = list(self._checks)
                answers = await asyncio.gather(*(self._ask(name) for name in names))
                self._seen, self._seen_at = dict(zip(names, answers, strict=True)), self._monotonic()
        return Health(
            status="ok" if all(self._seen.values()) else "degraded",
            version=version("shardlib"),
            uptime_seconds=round(self._monotonic() - self._started_at, 3),
            checks=self._seen,
        )

    async def _ask(self, name: str) -> bool:
        try:
            async with asyncio.timeout(CHECK_S):
                return await self._checks[name]()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a part, the server says that it is
            _LOG.warning("the check %s fails: %s", name, type(error).__name__)
            return False


def health_router(checks: HealthChecks) -> APIRouter:
    """A router with `GET /health`, open to everybody."""
    router = APIRouter()
    unavailable: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "A part does not answer"}}

    @router.get(
        "/health",
        operation_id="health",
        summary="Whether the server can do its work",
        dependencies=[Depends(anybody)],
        responses=unavailable,
        tags=["health"],
    )
    async def health(response: Response) -> Health:
        """Whether the server can do its work."""
        found = await checks.health()
        if found.status != "ok":
            response.status_code = 503
        return found

    return router
