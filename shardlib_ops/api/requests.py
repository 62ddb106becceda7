"""What the routes have in common: who asks, which page, and how an answer is sent."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, TypeVar

from fastapi import Header, Path, Query, Request, Response
from pydantic import BaseModel

from shardlib_ops.api.answers import tag_of
from shardlib_ops.api.change import Change
from shardlib_ops.api.changes import Changes
from shardlib_ops.api.cluster import Cluster
from shardlib_ops.api.idempotency import Kept, request_hash
from shardlib_ops.api.models import REFERENCE
from shardlib_ops.serving.identity import actor_of
from shardlib_ops.serving.problem import KINDS, MEDIA_TYPE, problem
from shardlib_ops.serving.requests import request_info

__all__ = ["PREFIX", "Cursor", "JobId", "Key", "PageSize", "Services", "ShardId", "json_answer", "page", "problems"]

PREFIX: Final = "/api/v1"
PROBLEM_SCHEMA: Final = "#/components/schemas/ProblemAnswer"
PAGE_DEFAULT: Final = 100
ID_MAX: Final = 10**9

T = TypeVar("T")

ShardId = Annotated[
    str, Path(pattern=REFERENCE, description="name or id of a shard", examples=["shard-01"], max_length=63)
]
JobId = Annotated[int, Path(ge=1, le=ID_MAX, description="number of a job", examples=[7])]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="a text of the caller's, such as a UUID. The same request with the same key has one effect and one "
        "answer, for a day; another request with it is refused (422)",
        examples=["6f1c2a9e-3d5b-4c0e-9a51-7f0f6f0f8b11"],
    ),
]
PageSize = Annotated[int, Query(ge=1, description="most entries of the page", examples=[100])]
Cursor = Annotated[
    str | None,
    Query(min_length=1, max_length=100, description="`next_cursor` of the page before; left out for the first"),
]
IfNoneMatch = Annotated[
    str | None,
    Header(max_length=1000, description="`ETag` of an earlier answer: 304 if nothing has changed since"),
]


class Services:
    """What the routes work with.

    Attributes:
        cluster: the cluster.
        changes: makes changes.
        page_max: most entries of a page.
    """

    def __init__(self, cluster: Cluster, changes: Changes, page_max: int) -> None:
        self.cluster, self.changes, self.page_max = cluster, changes, page_max

    async def change(
        self, request: Request, change: Change, *, key: str | None = None, body: BaseModel | None = None
    ) -> Response:
        """Make a change, and answer what came of it."""
        content: Mapping[str, Any] = {} if body is None else _revealed(body)
        # The path without what a proxy or an outer application puts before it.
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        actor = actor_of(request_info(request.scope))
        kept = await self.changes.make(change, actor, key, request_hash(request.method, path, content))
        return _answer(request, kept)


def _revealed(body: BaseModel) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return {name: plain(getattr(value, name)) for name in type(value).model_fields}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return value.get_secret_value() if hasattr(value, "get_secret_value") else value

    found: dict[str, Any] = plain(body)
    return found


def _answer(request: Request, kept: Kept) -> Response:
    headers = dict(kept.headers)
    if "Location" in headers:
        headers["Location"] = f"{request.scope.get('root_path', '')}{PREFIX}{headers['Location']}"
    if not kept.body:
        return Response(status_code=kept.status, headers=headers)
    return Response(kept.body, kept.status, headers, media_type="application/json")


def json_answer(content: BaseModel, if_none_match: str | None) -> Response:
    """An answer with its entity tag; 304 without a body if the caller has it already."""
    tag = tag_of(content)
    if if_none_match is not None and tag in (each.strip() for each in if_none_match.split(",")):
        return Response(status_code=304, headers={"ETag": tag})
    return Response(content.model_dump_json(by_alias=True), headers={"ETag": tag}, media_type="application/json")


def page(items: Sequence[T], numbers: Sequence[int], limit: int, cursor: str | None) -> tuple[list[T], str | None]:
    """One page of something that is numbered and in rising order, and the cursor of the next.

    Raises:
        Problem: 422, the cursor is not one of ours.
    """
    after = 0 if cursor is None else _number(cursor)
    found = [(number, item) for number, item in zip(numbers, items, strict=True) if number > after]
    shown = found[:limit]
    more = len(found) > len(shown)
    return [item for _, item in shown], _cursor(shown[-1][0]) if more else None


def _cursor(number: int) -> str:
    return base64.urlsafe_b64encode(f"after {number}".encode()).decode().rstrip("=")


def _number(cursor: str) -> int:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
        word, _, number = text.partition(" ")
        if word == "after" and number.isdigit() and len(number) < 20 and _cursor(int(number)) == cursor:
            return int(number)
    except (binascii.Error, ValueError):
        pass  # not one of ours
    fault = {"in": "query.cursor", "message": "give `next_cursor` of a page as it is"}
    raise problem("invalid", f"{fault['in']}: {fault['message']}", errors=[fault])


def problems(*more: str) -> dict[int | str, dict[str, Any]]:
    """The errors of a call for the OpenAPI document: those of every call, and more by their kinds."""
    found: dict[int | str, dict[str, Any]] = {}
    always = (
        "bad-request", "unauthenticated", "forbidden", "request-timeout", "invalid", "too-many-requests", "internal",
        "unavailable", "timeout",
    )  # fmt: skip
    for slug in (*always, *more):
        status, title = KINDS[slug]
        # No `model`: FastAPI would build a validator for each of them, at each route.
        found.setdefault(status, {"description": title, "content": {MEDIA_TYPE: {"schema": {"$ref": PROBLEM_SCHEMA}}}})
    return dict(sorted(found.items(), key=lambda item: int(item[0])))
