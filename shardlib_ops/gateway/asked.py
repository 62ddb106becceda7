"""What a request asks for: its body or its query string, every field checked, all faults told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final
from urllib.parse import parse_qsl

from shardlib.errors import InvalidArgument, InvalidShardKey
from shardlib.key import encode_key
from shardlib.route.consistency import Consistency
from shardlib_ops.gateway.execute import Statement
from shardlib_ops.gateway.statement import check_statement
from shardlib_ops.gateway.values import read_json
from shardlib_ops.serving.problem import Problem, problem, public_text

__all__ = ["PARAMS_MAX", "TIMEOUT_S_MIN", "Asked", "asked_key", "read_asked"]

PARAMS_MAX: Final = 65_535
"""What the protocol of PostgreSQL has numbers for."""
TIMEOUT_S_MIN: Final = Decimal("0.01")
_KEY_PARTS_MAX: Final = 32
_KEY_TEXT_MAX: Final = 8_192
_REQUIRED: Final = ("shard_key", "query")


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request.

    Attributes:
        statement: what to run.
        stream: whether the rows shall come as lines; None leaves it to the `Accept` of the request.
    """

    statement: Statement
    stream: bool | None


class _WrongError(ValueError):
    """A field's value will not do; the text says what would."""


def read_asked(body: bytes, timeout_max_s: float, *, read_only: bool) -> Asked:
    """The request that a body of JSON holds.

    Args:
        body: as it came.
        timeout_max_s: what `timeout_s` may be at most.
        read_only: whether the caller may only read.

    Raises:
        Problem: 422, with each field that is wrong.
    """
    try:
        found = read_json(body)
    except ValueError as error:
        # The decoder's own text may hold a part of the body.
        reason = "it is no JSON in UTF-8" if isinstance(error, UnicodeDecodeError) else _first_line(error)
        raise problem("invalid", f"body: {reason}") from None
    if not isinstance(found, dict):
        raise problem("invalid", "body: it is an object")
    values: dict[str, Any] = {}
    faults = [
        {"in": f"body.{public_text(name)[:80]}", "message": "there is no such field"}
        for name in found
        if name not in _FIELDS
    ]
    for name, check in _FIELDS.items():
        if name in found:
            try:
                values[name] = check(found[name])
            except (_WrongError, InvalidArgument, InvalidShardKey, UnicodeEncodeError) as error:
                faults.append({"in": f"body.{name}", "message": _message(error)})
        elif name in _REQUIRED:
            faults.append({"in": f"body.{name}", "message": "it is needed"})
    timeout_s = values.get("timeout_s")
    if timeout_s is not None and timeout_s > timeout_max_s:
        faults.append({"in": "body.timeout_s", "message": f"at most {timeout_max_s:g} seconds"})
    if faults:
        raise _invalid(faults)
    statement = Statement(values["shard_key"], values["query"], values.get("params", ()), read_only, timeout_s)
    return Asked(statement, values.get("stream"))


def asked_key(query_string: bytes) -> object:
    """The shard key of `?key=`, repeated for the parts of a composite one.

    Raises:
        Problem: 422.
    """
    try:
        pairs = parse_qsl(
            query_string.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query_string), errors="strict",
            max_num_fields=_KEY_PARTS_MAX,
        )  # fmt: skip
    except ValueError:
        fault = {"in": "query", "message": f"at most {_KEY_PARTS_MAX} parameters, percent-encoded in UTF-8"}
        raise _invalid([fault]) from None
    faults = [
        {"in": f"query.{public_text(name)[:80]}", "message": "there is no such parameter"}
        for name, _ in pairs
        if name != "key"
    ]
    parts = [value for name, value in pairs if name == "key"]
    if not parts:
        faults.append({"in": "query.key", "message": "it is needed"})
    elif not faults:
        try:
            return _shard_key(parts if len(parts) > 1 else parts[0])
        except (_WrongError, InvalidArgument, InvalidShardKey, UnicodeEncodeError) as error:
            faults.append({"in": "query.key", "message": _message(error)})
    raise _invalid(faults)


def _invalid(faults: list[dict[str, str]]) -> Problem:
    return problem("invalid", f"{faults[0]['in']}: {faults[0]['message']}", errors=faults)


def _message(error: Exception) -> str:
    match error:
        case InvalidArgument():
            return public_text(str(error.allowed))
        case InvalidShardKey():
            return public_text(f"it cannot be a shard key: {error.reason}")
        case UnicodeEncodeError():
            return "a text holds half of a surrogate pair, which is no character"
    return str(error)


def _first_line(error: ValueError) -> str:
    return public_text(str(error).splitlines()[0] if str(error) else "it is no JSON")


def _shard_key(value: object) -> object:
    if isinstance(value, list):
        if not 2 <= len(value) <= _KEY_PARTS_MAX or any(
            isinstance(part, list | dict) or part is None for part in value
        ):
            raise _WrongError(f"a composite key is a list of 2 to {_KEY_PARTS_MAX} strings, numbers or booleans")
        key: object = tuple(value)
    elif isinstance(value, str | int | Decimal):
        key = value
    else:
        raise _WrongError("a string, number or boolean, or a list of these")
    if len(encode_key(key)) > _KEY_TEXT_MAX:
        raise _WrongError(f"at most {_KEY_TEXT_MAX} bytes")
    return key


def _query(value: object) -> str:
    if not isinstance(value, str):
        raise _WrongError("a string")
    if "\0" in value:
        raise _WrongError("a text without a NUL character, where PostgreSQL would stop to read")
    value.encode()
    check_statement(value)
    return value


def _params(value: object) -> list[object]:
    if not isinstance(value, list):
        raise _WrongError("a list")
    if len(value) > PARAMS_MAX:
        raise _WrongError(f"at most {PARAMS_MAX} parameters")
    return value


def _consistency(value: object) -> Consistency:
    if not isinstance(value, str):
        raise _WrongError("one of 'strong', 'session', 'eventual'")
    return Consistency.of(value)


def _stream(value: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongError("true or false")
    return value


def _timeout_s(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | Decimal) or not TIMEOUT_S_MIN <= value < 10**6:
        raise _WrongError(f"seconds, at least {TIMEOUT_S_MIN}")
    return float(value)


_FIELDS: Final[Mapping[str, Callable[[object], Any]]] = {
    "shard_key": _shard_key,
    "query": _query,
    "params": _params,
    "consistency": _consistency,
    "stream": _stream,
    "timeout_s": _timeout_s,
}
