"""The OpenAPI document of the gateway. Written by hand, since no framework is there to derive it; a test holds it to
what the gateway does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from shardlib_ops.gateway.asked import PARAMS_MAX, TIMEOUT_S_MIN
from shardlib_ops.gateway.problems import GATEWAY_KINDS
from shardlib_ops.serving.problem import KINDS, MEDIA_TYPE, TYPE_PREFIX
from shardlib_ops.settings import Settings

if TYPE_CHECKING:
    from shardlib_ops.gateway.calls import Route

__all__ = ["CALLS", "document"]

_ID_HEADER: Final = {
    "description": "names this request in logs and in the audit log",
    "schema": {"type": "string"},
}
_ALWAYS: Final = ("head-too-large", "internal", "method-not-allowed", "bad-request", "unavailable")
_WITH_TOKEN: Final = ("unauthenticated", "forbidden", "not-found", "too-many-requests", "audit-unavailable")
_WITH_BODY: Final = ("body-too-large", "unsupported-media-type", "request-timeout", "invalid")

_PART: Final = {"type": ["string", "number", "boolean"]}
_KEY: Final = {
    "description": "the shard key; for a composite one its parts in order",
    "oneOf": [_PART, {"type": "array", "items": _PART, "minItems": 2, "maxItems": 32}],
    "examples": ["tenant-42", 42, ["eu", 7]],
}


def document(routes: Iterable[Route], settings: Settings) -> dict[str, Any]:
    """The document of the calls that there are."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        described = CALLS.get(f"{route.method} {route.path}")
        if described is None:
            continue  # the document itself
        paths.setdefault(route.path, {})[route.method.lower()] = _call(route, described, settings)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "shardlib gateway",
            "summary": "SQL statements for the shard that owns a key.",
            "version": "1",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(settings),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "`shardlib-ops token issue` makes a token.",
                }
            },
        },
    }


def _call(route: Route, described: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    kinds = {**KINDS, **GATEWAY_KINDS}
    needed = "Open to everybody." if route.least is None else f"Least role: {route.least.value}."
    found: dict[str, Any] = {
        "operationId": route.action.replace("-", "_"),
        "summary": described["summary"],
        "description": f"{described['description']}\n\n{needed}",
        "x-least-role": "none" if route.least is None else route.least.value,
        "responses": {},
    }
    if route.least is not None:
        found["security"] = [{"bearer": []}]
    for name in ("parameters", "requestBody"):
        if name in described:
            found[name] = described[name]
    responses = dict(described["responses"])
    slugs = [*described.get("problems", ()), *_ALWAYS]
    slugs += _WITH_TOKEN if route.least is not None else ()
    slugs += _WITH_BODY if route.method == "POST" else ()
    by_status: dict[int, list[str]] = {}
    for slug in slugs:
        by_status.setdefault(kinds[slug][0], []).append(slug)
    for status, names in sorted(by_status.items()):
        if str(status) in responses:
            continue
        told = "; ".join(f"`{name}`: {kinds[name][1].lower()}" for name in sorted(names))
        responses[str(status)] = {
            "description": told,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    for answer in responses.values():
        found["responses"] = responses
        answer.setdefault("headers", {})["X-Request-Id"] = _ID_HEADER
    return found


def _schemas(settings: Settings) -> dict[str, Any]:
    gateway = settings.gateway
    rows = {"type": "array", "items": {"type": "object"}, "description": "objects of column names and values"}
    whole = {"type": "integer", "minimum": 0}
    return {
        "Execute": {
            "type": "object",
            "additionalProperties": False,
            "required": ["shard_key", "query"],
            "properties": {
                "shard_key": _KEY,
                "query": {
                    "type": "string",
                    "minLength": 1,
                    "description": "one SELECT, INSERT, UPDATE, DELETE, MERGE, VALUES, TABLE, WITH or EXPLAIN, its "
                    "parameters as `$1`, `$2`",
                    "examples": ["SELECT id, total FROM orders WHERE tenant = $1"],
                },
                "params": {
                    "type": "array",
                    "items": {},
                    "maxItems": PARAMS_MAX,
                    "default": [],
                    "description": "a value for each parameter; what type it has is told by its place in the query",
                    "examples": [["tenant-42"]],
                },
                "consistency": {
                    "type": "string",
                    "enum": ["strong", "session", "eventual"],
                    "default": "strong",
                    "description": "how fresh reads must be. The primary answers all three for now",
                },
                "stream": {
                    "type": "boolean",
                    "description": "rows as lines of JSON, without a limit of rows and bytes; by `Accept` if left out",
                },
                "timeout_s": {
                    "type": "number",
                    "minimum": float(TIMEOUT_S_MIN),
                    "maximum": gateway.statement_timeout_s,
                    "description": "seconds after which the statement is cancelled",
                },
            },
        },
        "Executed": {
            "type": "object",
            "required": ["shard_id", "rows", "row_count", "latency_ms"],
            "properties": {
                "shard_id": {"type": "string", "description": "where it ran", "examples": ["s1"]},
                "rows": {**rows, "maxItems": gateway.rows_max},
                "row_count": {**whole, "description": "of the rows; or those changed, if the statement returns none"},
                "latency_ms": {"type": "number", "description": "milliseconds from its begin to its COMMIT"},
            },
        },
        "Line": {
            "description": "one line of a stream: a row; then `end` once all is committed, or `error`",
            "oneOf": [
                {"type": "object", "required": ["row"], "properties": {"row": {"type": "object"}}},
                {
                    "type": "object",
                    "required": ["end"],
                    "properties": {
                        "end": {
                            "type": "object",
                            "required": ["shard_id", "row_count", "latency_ms"],
                            "properties": {
                                "shard_id": {"type": "string"},
                                "row_count": whole,
                                "latency_ms": {"type": "number"},
                            },
                        }
                    },
                },
                {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"$ref": "#/components/schemas/Problem"}},
                },
            ],
        },
        "Place": {
            "type": "object",
            "required": ["shard_id", "shard_name", "hash_value"],
            "properties": {
                "shard_id": {"type": "string", "examples": ["s1"]},
                "shard_name": {"type": "string", "examples": ["shard-01"]},
                "hash_value": {
                    "type": "string",
                    "pattern": "^[0-9]{1,20}$",
                    "description": "the key's unsigned 64-bit hash; a string, since many JSON parsers round above 2^53",
                },
            },
        },
        "Health": {
            "type": "object",
            "required": ["status", "version", "uptime_seconds", "checks"],
            "properties": {
                "status": {"type": "string", "enum": ["ok", "degraded"]},
                "version": {"type": "string"},
                "uptime_seconds": {"type": "number"},
                "checks": {"type": "object", "additionalProperties": {"type": "boolean"}},
            },
        },
        "Problem": {
            "type": "object",
            "description": "RFC 9457",
            "required": ["type", "title", "status", "detail"],
            "properties": {
                "type": {
                    "type": "string",
                    "enum": sorted(TYPE_PREFIX + slug for slug in {**KINDS, **GATEWAY_KINDS}),
                },
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string"},
                "instance": {"type": "string"},
                "errors": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"in": {"type": "string"}, "message": {"type": "string"}},
                    },
                },
                "error_id": {"type": "string", "description": "by which the log tells of the same error"},
                "sqlstate": {"type": "string", "description": "PostgreSQL's code", "examples": ["23505"]},
                "constraint": {"type": "string"},
                "table": {"type": "string"},
                "column": {"type": "string"},
            },
        },
    }


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


CALLS: Final[Mapping[str, Mapping[str, Any]]] = {
    "POST /v1/execute": {
        "summary": "Run a statement on the shard of a key",
        "description": "It runs in a transaction of its own, which is committed before the answer. A viewer's is "
        "read-only. With `stream`, or `Accept: application/x-ndjson`, the rows come as lines: only a line `end` says "
        "that it is committed.",
        "requestBody": {"required": True, "content": _json("Execute")},
        "responses": {
            "200": {
                "description": "It is committed; a stream: if its last line is `end`",
                "content": {
                    **_json("Executed"),
                    "application/x-ndjson": {"schema": {"$ref": "#/components/schemas/Line"}},
                },
            }
        },
        "problems": [*GATEWAY_KINDS, "shard-unavailable", "catalog-unavailable", "timeout", "stopping"],
    },
    "GET /v1/shard-for-key": {
        "summary": "Where a key is",
        "description": "By the topology that the gateway has now.",
        "parameters": [
            {
                "name": "key",
                "in": "query",
                "required": True,
                "description": "the text of the shard key, as PostgreSQL writes it; repeated for a composite one",
                "schema": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 32},
                "style": "form",
                "explode": True,
            }
        ],
        "responses": {"200": {"description": "The shard that owns the key", "content": _json("Place")}},
        "problems": ["invalid"],
    },
    "GET /health": {
        "summary": "Whether the gateway can route",
        "description": "It can while it has a topology, also while the catalog is away. A shard that is away does not "
        "count either: it is told by the requests for its keys.",
        "responses": {
            "200": {"description": "It can", "content": _json("Health")},
            "503": {"description": "It cannot", "content": _json("Health")},
        },
    },
}
"""What the document says of each call."""
