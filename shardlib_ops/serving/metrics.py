"""What Prometheus is told of the HTTP servers: by route template, method and status; never by path, key or caller."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shardlib_ops.serving.problem import problem, problem_bytes

__all__ = ["HttpMetrics", "MetricsApp"]

_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class HttpMetrics:
    """Requests of one server.

    Args:
        server: `manager` or `gateway`.
        registry: where they are; one of its own if left out, so that several servers fit into a process.
    """

    def __init__(self, server: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        labels = ("server", "method", "route", "status")
        self._requests = Counter(
            "shardlib_http_requests", "Requests that were answered.", labels, registry=self.registry
        )
        self._seconds = Histogram(
            "shardlib_http_request_seconds", "Time until a request was answered.", labels[:3],
            registry=self.registry, buckets=_BUCKETS,
        )  # fmt: skip
        self.running = Gauge(
            "shardlib_http_requests_running", "Requests that are being answered.", ("server",), registry=self.registry
        ).labels(server)
        self._server = server
        self._known: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def record(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        key = (method, route, status)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = (
                self._requests.labels(self._server, method, route, str(status)),
                self._seconds.labels(self._server, method, route),
            )
        found[0].inc()
        found[1].observe(seconds)


class MetricsApp:
    """An ASGI application that answers `GET /metrics` and nothing else; for a port of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"a connection of type {scope['type']!r} is not served here")
        if scope["path"] != "/metrics":
            status, headers, body = problem_bytes(problem("not-found"), None)
        elif scope["method"] not in ("GET", "HEAD"):
            refused = problem("method-not-allowed", headers={"Allow": "GET, HEAD"})
            status, headers, body = problem_bytes(refused, None)
        else:
            status, body = 200, generate_latest(self._registry)
            headers = [(b"content-type", CONTENT_TYPE_LATEST.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
