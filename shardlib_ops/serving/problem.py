"""Errors as `application/problem+json` (RFC 9457): stable types, and nothing of what is behind the server in them."""

from __future__ import annotations

import json
import logging
import re
import secrets
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from shardlib.catalog import Conflict
from shardlib.errors import (
    CatalogUnavailable,
    CommitOutcomeUnknown,
    CrossShardTransaction,
    InvalidArgument,
    InvalidShardKey,
    InvalidTopology,
    LockTimeout,
    PoolTimeout,
    RetryableError,
    ShardKeyChanged,
    ShardKeyMismatch,
    ShardKeyRequired,
    ShardlibError,
    ShardUnavailable,
    StaleTopology,
    UnsupportedCrossShardQuery,
    UnsupportedOperation,
)
from shardlib_ops.audit.errors import AuditUnavailable
from shardlib_ops.audit.text import cleaned

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = [
    "KINDS", "MEDIA_TYPE", "Problem", "install_problems", "log_unhandled", "problem", "problem_bytes", "problem_of",
    "problem_response", "public_text",
]  # fmt: skip

_LOG = logging.getLogger("shardlib.ops.serving")

MEDIA_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:shardlib:problem:"

KINDS: Final[Mapping[str, tuple[int, str]]] = {
    "bad-request": (400, "The request cannot be read"),
    "unauthenticated": (401, "A valid token is needed"),
    "forbidden": (403, "The role does not suffice"),
    "not-found": (404, "There is nothing here"),
    "method-not-allowed": (405, "The method is not allowed here"),
    "request-timeout": (408, "The request came too slowly"),
    "conflict": (409, "The state of the cluster does not allow it"),
    "body-too-large": (413, "The body is too large"),
    "unsupported-media-type": (415, "The type of the body is not supported"),
    "invalid": (422, "The request is not valid"),
    "too-many-requests": (429, "Too many requests"),
    "head-too-large": (431, "The head of the request is too large"),
    "outcome-unknown": (500, "The outcome is unknown"),
    "audit-incomplete": (500, "The outcome could not be recorded"),
    "internal": (500, "Something went wrong here"),
    "audit-unavailable": (503, "The audit log is not available"),
    "catalog-unavailable": (503, "The catalog is not available"),
    "shard-unavailable": (503, "The shard is not available"),
    "stopping": (503, "The server is being stopped"),
    "unavailable": (503, "The server cannot answer now"),
    "timeout": (504, "The request took too long"),
}
"""Every problem by the end of its `type`: status and title."""

# The general one of each status stands last.
_OF_STATUS: Final = {status: slug for slug, (status, _) in KINDS.items()}
_ERRORS_MAX: Final = 20
_TEXT_MAX: Final = 600

# Where something is, in the words of libpq, psycopg, grpc and our own errors.
_PLACES: Final = re.compile(
    r"\b[a-z][a-z0-9+.-]*://[^\s,;'\")]*"  # a URL
    r"|\bserver at \"[^\"]*\"(?: \([^)]*\))?(?:, port \d+)?"
    r"|\b(?:host|hostaddr|address|user|role|database) (?:name )?\"[^\"]*\""
    r"|\[[0-9a-f:.%]*:[0-9a-f:.%]*\](?::\d+)?"  # [IPv6]:port
    r"|\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?\b"
    r"|\b[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?:\d{2,5}\b",
    re.IGNORECASE,
)


_DAMAGED: Final = re.compile(
    r"cannot be read|does not match its digest|damaged|lacks a|catalog .*empty|holds no topology"
)


class Problem(Exception):  # noqa: N818 - it is an answer, not a fault of this process
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        title: the same for every problem of its type.
        detail: what is wrong in this request. It is shown to the caller as it is.
        slug: end of the `type`.
        headers: more headers of the answer.
        errors: for a body or parameter that is not valid: what, where.
        error_id: by which the log tells of the same error.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str = "",
        slug: str = "",
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, str]] = (),
        error_id: str | None = None,
    ) -> None:
        super().__init__(status, title, detail, slug)
        self.status, self.title, self.detail = status, title, detail
        self.slug = slug or _OF_STATUS.get(status, "internal" if status >= 500 else "bad-request")
        self.headers, self.errors, self.error_id = dict(headers or {}), tuple(errors), error_id

    def __str__(self) -> str:
        return f"{self.status} {self.slug}: {self.detail or self.title}"

    def content(self, request_id: str | None = None) -> dict[str, Any]:
        """The members of the document."""
        found: dict[str, Any] = {
            "type": TYPE_PREFIX + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.detail or self.title,
        }
        if request_id is not None:
            found["instance"] = f"urn:shardlib:request:{request_id}"
        if self.errors:
            found["errors"] = list(self.errors[:_ERRORS_MAX])
        if self.error_id is not None:
            found["error_id"] = self.error_id
        return found


def problem(slug: str, detail: str = "", *, headers: Mapping[str, str] | None = None, **more: Any) -> Problem:
    """A problem of a known kind."""
    status, title = KINDS[slug]
    return Problem(status, title, detail, slug, headers, **more)


def problem_bytes(found: Problem, request_id: str | None) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of the answer, for ASGI."""
    body = json.dumps(found.content(request_id), ensure_ascii=False).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in found.headers.items()]
    return found.status, headers, body


def problem_response(found: Problem, request_id: str | None = None) -> Response:
    """The answer as a response of Starlette."""
    from starlette.responses import Response

    status, headers, body = problem_bytes(found, request_id)
    response = Response(body, status)
    response.raw_headers = headers
    return response


def problem_of(error: Exception) -> Problem:
    """The problem that an error of the library is, by its kind. What is not known to be harmless is not told."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RetryableError):
        return _of_retryable(error)
    if isinstance(error, InvalidTopology):
        return _of_topology(error)
    slug, detail = "internal", ""
    match error:
        case InvalidArgument():
            slug, detail = "invalid", f"{error.name}: {error.allowed}"
        case InvalidShardKey():
            slug, detail = "invalid", f"the value cannot be a shard key: {error.reason}"
        case ShardKeyMismatch() | ShardKeyChanged():
            slug, detail = "invalid", "the row has another shard key than the one that the request names"
        case ShardKeyRequired() | UnsupportedCrossShardQuery() | UnsupportedOperation() | CrossShardTransaction():
            slug, detail = "invalid", str(error)
        case CommitOutcomeUnknown():
            slug, detail = "outcome-unknown", f"the COMMIT on shard {error.shard!r} may have happened; read it back"
        case Conflict():
            slug, detail = "conflict", "somebody else changed the same at the same time; ask again"
    return problem(slug, public_text(detail))


def _of_retryable(error: RetryableError) -> Problem:
    slug, detail = "unavailable", "nothing was done; ask again later"
    match error:
        case AuditUnavailable():
            if error.done:
                return problem("audit-incomplete", "the work is over: look at what came of it before asking again")
            slug = "audit-unavailable"
        case CatalogUnavailable():
            slug, detail = "catalog-unavailable", "nothing can be changed or looked up now"
        case ShardUnavailable():
            why = "does not let this server in" if error.final else "is not reachable"
            slug, detail = "shard-unavailable", f"shard {error.shard!r} {why}"
        case StaleTopology():
            slug, detail = "shard-unavailable", f"rows of shard {error.shard!r} are being moved"
        case PoolTimeout() | LockTimeout():
            slug, detail = "shard-unavailable", f"shard {error.shard!r} is too busy"
    return problem(slug, detail, headers={"Retry-After": "1"})


def _of_topology(error: InvalidTopology) -> Problem:
    text = public_text(f"{error.problem}; {error.way_out}")
    if error.problem.startswith("there is no "):
        return problem("not-found", text)
    if re.search(
        r"cannot be read|does not match its digest|damaged|lacks a|catalog .*empty|holds no topology", error.problem
    ):
        detail = "what the catalog holds cannot be used; its operator must look at it"
        return problem("catalog-unavailable", detail, headers={"Retry-After": "60"})
    return problem("conflict", text)


def public_text(text: str) -> str:
    """A message of the library as a stranger may see it: no secrets, no URLs, hosts or ports, on one line."""
    found = _PLACES.sub("***", cleaned(text))
    return found if len(found) <= _TEXT_MAX else found[: _TEXT_MAX - 3] + "..."


def log_unhandled(error: BaseException, what: str) -> str:
    """Log an error that nobody expected, and return the id that the caller is told.

    The frames are logged, and of each error in the chain its kind and its text without secrets: the text of another
    library's error may hold whatever was given to it.
    """
    error_id = secrets.token_hex(8)
    lines: list[str] = []
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        lines += [f"{type(found).__qualname__}: {cleaned(found)}\n", *traceback.format_tb(found.__traceback__)]
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    _LOG.error("error %s in %s\n%s", error_id, cleaned(what), "".join(lines))
    return error_id


def install_problems(app: FastAPI) -> None:
    """Let a FastAPI application answer with problems, whatever is raised in it."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    from shardlib_ops.serving.requests import request_info

    def answer(request: Request, found: Problem) -> Response:
        return problem_response(found, request_info(request.scope).request_id)

    async def known(request: Request, error: Exception) -> Response:
        found = problem_of(error)
        if found.slug == "internal":
            found.error_id = log_unhandled(error, _place(request))
        return answer(request, found)

    async def http(request: Request, error: Exception) -> Response:
        status = int(getattr(error, "status_code", 500))
        slug = _OF_STATUS.get(status)
        found = problem(slug) if slug is not None else Problem(status, "The request failed")
        found.headers = {**(getattr(error, "headers", None) or {}), **found.headers}
        return answer(request, found)

    async def invalid(request: Request, error: Exception) -> Response:
        faults = error.errors() if isinstance(error, RequestValidationError) else ()
        errors = [_place_of(each) for each in faults[:_ERRORS_MAX]]
        first = errors[0] if errors else {"in": "request", "message": "it is not valid"}
        return answer(request, problem("invalid", f"{first['in']}: {first['message']}", errors=errors))

    async def unhandled(request: Request, error: Exception) -> Response:
        info = request_info(request.scope)
        info.error_id = log_unhandled(error, _place(request))
        return answer(request, problem("internal", error_id=info.error_id))

    for kind in (Problem, ShardlibError, Conflict):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unhandled)


def _place(request: Request) -> str:
    return f"{request.method} {request.url.path}"


def _place_of(fault: Mapping[str, Any]) -> dict[str, str]:
    """Where a value is wrong and why; the value itself, which may be a DSN, is left out."""
    where = ".".join(cleaned(part)[:80] for part in fault.get("loc", ()))
    return {"in": where or "request", "message": public_text(str(fault.get("msg", "")).removeprefix("Value error, "))}
