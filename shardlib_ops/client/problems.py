"""The errors of a manager as the errors that the same would have been here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from shardlib.dsn import Dsn
from shardlib.errors import (
    CatalogUnavailable,
    InvalidArgument,
    InvalidShardKey,
    InvalidTopology,
    ShardlibError,
    ShardUnavailable,
    UnsupportedOperation,
)
from shardlib_ops.audit.errors import AuditUnavailable
from shardlib_ops.client.errors import ManagerRefused, ManagerUnavailable

__all__ = ["AT_WORK", "error_of", "passing", "slug_of"]

_TYPE: Final = "urn:shardlib:problem:"
_PASSING: Final = frozenset(
    {"audit-unavailable", "catalog-unavailable", "request-timeout", "stopping", "timeout", "too-many-requests",
     "unavailable"}
)  # fmt: skip
_PROXY: Final = frozenset({502, 503, 504})
AT_WORK: Final = 409
_SERVER: Final = 500
_NOTHING_HERE: Final = "There is nothing here"
_FIELD: Final = re.compile(r"(?:body\.|query\.|path\.)?([A-Za-z_][\w.-]*): (.+)", re.DOTALL)
_SHARD: Final = re.compile(r"shard '([^']*)' (.+)", re.DOTALL)
_WAY_IN: Final = "set SHARDLIB_TOKEN, or --token-file, to one from `shardlib-ops token issue`"


def slug_of(content: Mapping[str, Any]) -> str:
    """The kind of a problem; empty for what is none."""
    kind = str(content.get("type", ""))
    return kind.removeprefix(_TYPE) if kind.startswith(_TYPE) else ""


def passing(status: int, content: Mapping[str, Any], *, retry_after: bool) -> bool:
    """Whether the same request can have another answer in a moment."""
    slug = slug_of(content)
    if not slug:
        return status in _PROXY
    return slug in _PASSING or (status == AT_WORK and retry_after)


def error_of(
    url: str, status: int, content: Mapping[str, Any], *, asked: str, given: Mapping[str, Any] | None = None
) -> ShardlibError:
    """The error that an answer stands for.

    Args:
        url: of the manager.
        status: of HTTP.
        content: the problem document; empty for an answer that is none.
        asked: method and path.
        given: the values that were sent, so that a wrong one can be shown.
    """
    slug, detail = slug_of(content), str(content.get("detail", ""))
    found: ShardlibError
    match slug:
        case "":
            found = _of_another(url, status, asked)
        case "unauthenticated":
            found = ManagerRefused(url, "there is no token, or it does not count", _WAY_IN)
        case "forbidden":
            found = ManagerRefused(url, detail, "ask with a token of a role that may")
        case "not-found" if detail == _NOTHING_HERE:
            found = ManagerRefused(url, f"it has no call {asked}", "upgrade it, or use --catalog")
        case "not-found" | "conflict":
            found = InvalidTopology(*_halves(detail))
        case "invalid":
            found = _invalid(detail, given or {})
        case "catalog-unavailable":
            found = CatalogUnavailable(f"of the manager {url}", detail)
        case "shard-unavailable" if said := _SHARD.fullmatch(detail):
            found = ShardUnavailable(said[1], said[2], final="let this server in" in said[2])
        case "audit-unavailable" | "audit-incomplete":
            found = AuditUnavailable(f"of the manager {url}", detail, slug == "audit-incomplete")
        case "internal":
            number = content.get("error_id", "unknown")
            found = ManagerRefused(url, "something went wrong there", f"its log tells more, by the error id {number}")
        case _ if status >= _SERVER or slug in _PASSING:
            found = ManagerUnavailable(url, detail or slug, begun=slug in ("timeout", "outcome-unknown"))
        case _:
            found = ManagerRefused(url, detail or slug, "ask otherwise")
    return found


def _of_another(url: str, status: int, asked: str) -> ShardlibError:
    """What answered is no manager: a proxy before one, or something else."""
    what = f"{asked} was answered by HTTP {status}"
    if status in _PROXY:
        return ManagerUnavailable(url, what)
    return ManagerRefused(url, f"{what}, which is no answer of a manager", "look whether the URL is that of one")


def _halves(detail: str) -> tuple[str, str]:
    """What is wrong and the way out, as the error had them."""
    problem, _, way_out = detail.rpartition("; ") if detail.startswith("there is no ") else detail.partition("; ")
    return (problem, way_out) if problem else (detail, "look at it again")


def _invalid(detail: str, given: Mapping[str, Any]) -> ShardlibError:
    if (found := _FIELD.fullmatch(detail)) is not None:
        name = found[1]
        return InvalidArgument(name, _value(given, name), found[2])
    key = "the value cannot be a shard key: "
    if detail.startswith(key):
        return InvalidShardKey(given.get("keys"), detail.removeprefix(key))
    what, _, way_out = detail.partition("; ")
    return UnsupportedOperation(what, way_out or "ask otherwise")


def _value(given: Mapping[str, Any], name: str) -> object:
    """The value that was sent as this, without a password; a name of the command's is given if it is nowhere."""
    value: Any = given
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return "***"
    if not isinstance(value, str) or not ("://" in value or "=" in value):
        return value if isinstance(value, str | int | float) else "***"
    try:
        return Dsn(value).safe()
    except InvalidArgument:
        return "***"
