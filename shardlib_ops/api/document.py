"""The OpenAPI document: what each call needs, and what every error looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from shardlib_ops.api.answers import ProblemAnswer
from shardlib_ops.auth import Role
from shardlib_ops.serving.problem import MEDIA_TYPE

__all__ = ["install_document"]

_ID_HEADER: Final = {
    "description": "names this request in logs and in the audit log",
    "schema": {"type": "string"},
}


def install_document(app: FastAPI, roles: Mapping[str, Role | None]) -> None:
    """Let `app.openapi()` tell the least role of each call, in `x-least-role` and in words, and mend its errors.

    Args:
        app: the application, whole.
        roles: from `check_routes`.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title, version=app.version, summary=app.summary, routes=app.routes, tags=app.openapi_tags
            )
            for path, calls in found["paths"].items():
                for method, call in calls.items():
                    _mend(call, roles.get(f"{method.upper()} {path}"))
            schemas = found["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            shape = ProblemAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(shape.pop("$defs", {}))
            schemas["ProblemAnswer"] = shape
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _mend(call: dict[str, Any], role: Role | None) -> None:
    call["x-least-role"] = "none" if role is None else role.value
    needed = "Open to everybody." if role is None else f"Least role: {role.value}."
    call["description"] = f"{call.get('description', '')}\n\n{needed}".strip()
    for status, answer in call["responses"].items():
        answer.setdefault("headers", {})["X-Request-Id"] = _ID_HEADER
        if int(status) >= 400 and MEDIA_TYPE in answer.get("content", {}):
            # Every error has one media type.
            answer["content"] = {MEDIA_TYPE: answer["content"][MEDIA_TYPE]}
