"""Requests that are not valid: refused, and written to the audit log if they would have changed something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from shardlib_ops.audit import Audit, AuditUnavailable
from shardlib_ops.serving.identity import SAFE_METHODS, Guard, Needs, actor_of, route_of
from shardlib_ops.serving.problem import Problem, problem, problem_of, problem_response
from shardlib_ops.serving.requests import Scope, header, request_info

__all__ = ["install_refusals"]

_ERRORS_MAX: Final = 20
BAD_REQUEST: Final = 400
METHOD_NOT_ALLOWED: Final = 405


def install_refusals(app: FastAPI, guard: Guard, audit: Audit, calls: Iterable[str]) -> None:
    """Let an application that has its problems installed also write refused changes to the audit log.

    Args:
        app: the application.
        guard: who may come in.
        audit: where refused changes are written.
        calls: every call, such as `GET /health`, for the header `Allow`.
    """
    methods: dict[str, list[str]] = {}
    for call in calls:
        method, _, path = call.partition(" ")
        methods.setdefault(path, []).append(method)
    inner: Any = app.exception_handlers[RequestValidationError]
    other: Any = app.exception_handlers[HTTPException]

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - it is installed for these
        # What is no JSON is told before the dependencies of the route were asked.
        unasked = any(fault.get("type") == "json_invalid" for fault in error.errors())
        return await answered(request, error, inner, unasked=unasked, found=_media_type(request.scope, error))

    async def unreadable(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - it is installed for these
        if error.status_code == METHOD_NOT_ALLOWED and (known := methods.get(route_of(request.scope))):
            # Starlette names the methods of the first route of that path only.
            error.headers = {**dict(error.headers or {}), "Allow": ", ".join(sorted(known))}
        if error.status_code != BAD_REQUEST:
            return await other(request, error)  # type: ignore[no-any-return]
        # JSON in form, with a number that Python does not read.
        found = problem("invalid", "body: it cannot be read as JSON")
        return await answered(request, error, other, unasked=True, found=found)

    async def answered(
        request: Request, error: Exception, else_: Any, *, unasked: bool, found: Problem | None
    ) -> Response:
        stated, info = _stated(request.scope), request_info(request.scope)
        if stated is not None and request.method not in SAFE_METHODS:
            try:
                if unasked:
                    await guard.admit(request.scope, stated.least, mutating=stated.mutating, action=stated.action)
                action = stated.action or request.method
                await audit.refused(actor_of(info), action, request.scope["path"], "invalid request")
            except (Problem, AuditUnavailable) as refusal:
                found = problem_of(refusal)
        if found is not None:
            return problem_response(found, info.request_id)
        return await else_(request, error)  # type: ignore[no-any-return]

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unreadable)


def _media_type(scope: Scope, error: RequestValidationError) -> Problem | None:
    """415 for a body that is not said to be JSON."""
    given = header(scope, b"content-type")
    if given is None or not any(fault.get("loc", ())[:1] == ("body",) for fault in error.errors()[:_ERRORS_MAX]):
        return None
    kind = given.decode("latin-1").partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return None
    return problem("unsupported-media-type", "the body is application/json")


def _stated(scope: Scope) -> Needs | None:
    """What the route of a request needs."""
    return next(
        (call for call in _calls(getattr(scope.get("route"), "dependant", None)) if isinstance(call, Needs)), None
    )


def _calls(dependant: Any) -> Iterator[object]:
    for each in getattr(dependant, "dependencies", ()):
        yield each.call
        yield from _calls(each)
