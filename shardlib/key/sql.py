"""The text of a shard key, computed by the server: the same as the key bytes that a client computes.

A cast to text would depend on the session's settings (a date on DateStyle, a timestamp on TimeZone) or differ from the
type's output (`true` for `t`). These expressions give the canonical text under any settings. A property test holds them
against `encode_key`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from shardlib.errors import InvalidShardKey

__all__ = ["key_text"]

_JSON_TEXT: Final = "(to_json({0}) #>> '{{}}')"  # ISO 8601 whatever DateStyle says

_FORMS: Final[Mapping[str, Callable[[str], str]]] = {
    "text": lambda column: column,
    "character varying": lambda column: column,
    "smallint": lambda column: f"{column}::text",
    "integer": lambda column: f"{column}::text",
    "bigint": lambda column: f"{column}::text",
    "numeric": lambda column: f"{column}::text",
    "uuid": lambda column: f"{column}::text",
    "boolean": lambda column: f"(CASE WHEN {column} THEN 't' WHEN NOT {column} THEN 'f' END)",
    "bytea": lambda column: rf"('\x' || encode({column}, 'hex'))",
    "date": _JSON_TEXT.format,
    "timestamp without time zone": lambda column: f"replace({_JSON_TEXT.format(column)}, 'T', ' ')",
    # Infinity has no zone, and BC stands after it.
    "timestamp with time zone": lambda column: (
        f"regexp_replace(replace({_JSON_TEXT.format(f'({column} AT TIME ZONE {_UTC})')}, 'T', ' '), "
        rf"'(\d)( BC)?$', '\1+00\2')"
    ),
    "enum": lambda column: f"{column}::text",
}
_UTC: Final = "'UTC'"


def key_text(column: str, kind: str) -> str:
    """The SQL expression of the canonical text of one part of a shard key.

    Args:
        column: a column as SQL, quoted: `t."tenant"`.
        kind: the column's type as PostgreSQL's `format_type(oid, NULL)` names it, of a domain its base type, or
            `enum` for any enum.

    Raises:
        InvalidShardKey: columns of this type cannot be shard keys.
    """
    form = _FORMS.get(kind)
    if form is None:
        raise InvalidShardKey(column, f"a column of type {kind} cannot be a shard key")
    return form(column)
