r"""Values between JSON and PostgreSQL, through PostgreSQL's own text form: nothing is rounded on the way.

A parameter goes to the server as untyped text, as a literal in quotes would, and the server decides by the place where
it stands what it is. A column comes back as text, and becomes JSON by its type:

==========================  ===========================================================================
int2, int4, int8, oid       number, all digits
float4, float8              number; `"NaN"`, `"Infinity"`, `"-Infinity"` as strings, which JSON has no numbers for
numeric                     string, all digits: most JSON parsers would round a number
bool                        true, false
json, jsonb                 the value itself, its numbers as they are stored
timestamp, timestamptz      string, ISO 8601 with microseconds as stored: `2026-01-31T09:30:00.25+00:00`
bytea                       string, `\x` and hexadecimal digits
arrays                      array, of arrays if there are several dimensions; elements as above
everything else             string, as PostgreSQL writes it: uuid, date, time, interval, inet, ranges, enums
==========================  ===========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

import msgspec
import psycopg

from shardlib.errors import InvalidArgument

__all__ = ["Encoder", "array_text", "encoder_of", "needs_type", "parameter_text", "read_json"]

Encoder = Callable[[bytes], bytes]
"""From a value's text to JSON, both in bytes."""

_TYPES: Final = psycopg.adapters.types
_EXACT: Final = msgspec.json.Encoder(decimal_format="number")
_NOT_NUMBERS: Final = frozenset({b"NaN", b"Infinity", b"-Infinity"})
_DIGITS_MAX: Final = 4_000
_JSON_OIDS: Final = frozenset({_TYPES["json"].oid, _TYPES["jsonb"].oid})


def read_json(body: bytes) -> Any:
    """JSON with every digit of its numbers: integers as int, all others as Decimal.

    Raises:
        ValueError: it is no JSON in UTF-8, nested too deeply, or a number has more than 4,000 digits.
    """
    try:
        return json.loads(body, parse_float=_decimal, parse_int=_integer, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _decimal(text: str) -> Decimal:
    if len(text) > _DIGITS_MAX:
        raise ValueError(f"a number of {len(text)} characters")
    return Decimal(text)


def _integer(text: str) -> int:
    if len(text) > _DIGITS_MAX:
        raise ValueError(f"a number of {len(text)} characters")
    return int(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def needs_type(value: object) -> bool:
    """Whether a parameter's text depends on its type: a JSON array may be an array or a JSON document."""
    return isinstance(value, list)


def parameter_text(value: object, oid: int | None = None) -> bytes | None:
    """The text of a parameter, None for NULL.

    Args:
        value: null, bool, int, Decimal, str, an object (a JSON document), or a list.
        oid: the parameter's type; needed for a list only, see `needs_type`.

    Raises:
        InvalidArgument: a text with a NUL, which PostgreSQL does not have.
    """
    match value:
        case None:
            return None
        case bool():
            return b"true" if value else b"false"
        case str():
            return _no_nul(value).encode()
        case int() | Decimal():
            return str(value).encode()
        case list() if oid not in _JSON_OIDS:
            return array_text(value).encode()
    return _EXACT.encode(value)


def array_text(values: Sequence[object]) -> str:
    """An array literal: `{1,NULL,"a b"}`. Lists inside are further dimensions, objects are JSON documents."""
    parts = []
    for value in values:
        if isinstance(value, list):
            parts.append(array_text(value))
        elif value is None:
            parts.append("NULL")
        else:
            text = (parameter_text(value) or b"").decode()
            parts.append('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
    return "{" + ",".join(parts) + "}"


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise InvalidArgument("params", text[:40], "text without a NUL character, which PostgreSQL does not have")
    return text


def _as_it_is(text: bytes) -> bytes:
    return text


def _string(text: bytes) -> bytes:
    return msgspec.json.encode(text.decode())


def _float(text: bytes) -> bytes:
    return b'"' + text + b'"' if text in _NOT_NUMBERS else text


def _bool(text: bytes) -> bytes:
    return b"true" if text == b"t" else b"false"


def _timestamp(text: bytes) -> bytes:
    """`2026-01-31 09:30:00.25+00` as ISO 8601 has it; years before 1 and `infinity` stay as they are."""
    if text.endswith((b"BC", b"infinity")):
        return _string(text)
    date, _, time = text.partition(b" ")
    zone = max(time.rfind(b"+"), time.rfind(b"-"))
    if zone > 0 and len(time) - zone == len("+00"):
        time += b":00"
    return b'"' + date + b"T" + time + b'"'


def _table() -> Mapping[int, Encoder]:
    by_name: dict[str, Encoder] = {
        **dict.fromkeys(("int2", "int4", "int8", "oid", "json", "jsonb"), _as_it_is),
        **dict.fromkeys(("float4", "float8"), _float),
        **dict.fromkeys(("timestamp", "timestamptz"), _timestamp),
        "bool": _bool,
    }
    found: dict[int, Encoder] = {_TYPES[name].oid: encoder for name, encoder in by_name.items()}
    for info in _TYPES:
        if info.array_oid:
            found[info.array_oid] = _array(found.get(info.oid, _string), ";" if info.name == "box" else ",")
    return found


def encoder_of(oid: int) -> Encoder:
    """How the values of a column become JSON. Of a type that PostgreSQL does not bring with it: as strings."""
    return _ENCODERS.get(oid, _string)


def _array(element: Encoder, delimiter: str) -> Encoder:
    def encode(text: bytes) -> bytes:
        # Bounds that do not start at 1 stand in front: [0:2]={1,2,3}
        literal = text[text.index(b"=") + 1 :] if text[:1] == b"[" else text
        return _array_json(literal.decode(), element, delimiter)

    return encode


def _array_json(text: str, element: Encoder, delimiter: str) -> bytes:
    """The JSON of an array's text, in one pass."""
    out: list[bytes] = []
    at, size = 0, len(text)
    while at < size:
        mark = text[at]
        if mark == "{":
            out.append(b"[")
        elif mark == "}":
            out.append(b"]")
        elif mark == delimiter:
            out.append(b",")
        elif mark == '"':
            value, at = _quoted(text, at + 1)
            out.append(element(value.encode()))
            continue
        else:
            end = at
            while text[end] not in (delimiter, "}"):
                end += 1
            value = text[at:end]
            out.append(b"null" if value == "NULL" else element(value.encode()))
            at = end
            continue
        at += 1
    return b"".join(out)


def _quoted(text: str, at: int) -> tuple[str, int]:
    """A quoted element that begins at `at`, and where what follows its closing quote stands."""
    parts: list[str] = []
    while (mark := text[at]) != '"':
        if mark == "\\":
            at += 1
            mark = text[at]
        parts.append(mark)
        at += 1
    return "".join(parts), at + 1


_ENCODERS: Final = _table()
