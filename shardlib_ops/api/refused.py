"""Requests that are not valid: refused, and written to the audit log if they would have changed something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from shardlib_ops.audit import Audit
from shardlib_ops.serving.identity import SAFE_METHODS, Guard, Needs, actor_of
from shardlib_ops.serving.problem import Problem, problem, problem_of, problem_response
from shardlib_ops.serving.requests import Scope, header, request_info

__all__ = ["install_refusals"]

_ERRORS_MAX: Final = 20


def install_refusals(app: FastAPI, guard: Guard, audit: Audit) -> None:
    """Let an application that has its problems installed also write refused changes to the audit log."""
    inner: Any = app.exception_handlers[RequestValidationError]

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - it is installed for these
        try:
            return await refused(request, error)
        except Exception as other:  # noqa: BLE001 - an error handler answers; what is not known is a 500
            found = problem_of(other)
            return problem_response(found, request_info(request.scope).request_id)

    async def refused(request: Request, error: RequestValidationError) -> Response:
        stated = _stated(request.scope)
        if stated is None or request.method in SAFE_METHODS:
            answer: Response = await inner(request, error)
            return answer
        info = request_info(request.scope)
        if any(fault.get("type") == "json_invalid" for fault in error.errors()):
            # What is no JSON is told before the dependencies of the route were asked.
            await guard.admit(request.scope, stated.least, mutating=stated.mutating, action=stated.action)
        await audit.refused(actor_of(info), stated.action or request.method, request.scope["path"], "invalid request")
        if (found := _media_type(request.scope, error)) is not None:
            return problem_response(found, info.request_id)
        return await inner(request, error)  # type: ignore[no-any-return]

    app.add_exception_handler(RequestValidationError, invalid)


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
