"""A column's type says how its values become key bytes, or that they cannot.

The value that counts is the one that reaches the database: a `TypeDecorator` is applied first, an `Enum`
column stores names (or what its `values_callable` says), a numeric has the column's scale. A value that
PostgreSQL would quietly change on its way into the column is refused, since its key would not be that of the
stored row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, datetime
from decimal import Context, Decimal, InvalidOperation
from enum import Enum
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import bindparam
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.types import TypeDecorator, TypeEngine

from shardlib.errors import InvalidShardKey
from shardlib.key.encode import (
    encode_bool,
    encode_bytes,
    encode_date,
    encode_datetime,
    encode_decimal,
    encode_int,
    encode_text,
    encode_uuid,
)

__all__ = ["PartEncoder", "part_encoder", "type_name"]

PartEncoder = Callable[[Any], bytes]
"""From a value, as the application gives it for a column, to the key bytes of that part."""


class _At(NamedTuple):
    """A column for messages: its name with the table's, and its type as DDL."""

    where: str
    shown: str

    def refusal(self, value: object, wanted: str) -> InvalidShardKey:
        if value is None:
            return InvalidShardKey(value, f"column {self.where!r} got NULL, which belongs to no shard")
        return InvalidShardKey(value, f"column {self.where!r} is {self.shown}: give it {wanted}")

    def unfit(self, reason: str) -> InvalidShardKey:
        return InvalidShardKey(self.where, f"its type is {self.shown}: {reason}")


_WIDE: Final = Context(prec=147_455, traps=[InvalidOperation])
"""As many digits as PostgreSQL's numeric has: 131,072 before the point, 16,383 after it."""
_DIALECT: Final = PGDialect_psycopg()  # type: ignore[no-untyped-call]
_PADDED: Final = re.compile(r"N?CHAR\b")
_PRECISION: Final = re.compile(r"TIMESTAMP\((\d)\)")
_DETERMINISTIC: Final = re.compile(
    r"default|C|POSIX|ucs_basic|unicode|pg_c_utf8|pg_unicode_fast|C\.UTF-?8|[a-z]{2,3}_[A-Z]{2}(\.[\w-]+)?(@\w+)?|.*-x-icu",
    re.IGNORECASE,
)
"""The collations that PostgreSQL comes with; all are deterministic: equal means the same bytes."""


def part_encoder(kind: TypeEngine[Any], where: str, *, deterministic: bool = False) -> PartEncoder:
    """How values of a column become key bytes.

    Args:
        kind: the column's type; for several dialects, the one for PostgreSQL counts.
        where: the column's name, for messages.
        deterministic: the application says that the column's collation, which is not one of PostgreSQL's own, takes
            only the same bytes as equal.

    Raises:
        InvalidShardKey: values of the type have no text that is the same for all that PostgreSQL calls equal.
    """
    if kind.bind_expression(bindparam("value")) is not None:
        raise InvalidShardKey(where, "its type changes values by SQL on their way (bind_expression)")
    impl = kind.dialect_impl(_DIALECT)
    if isinstance(impl, TypeDecorator):
        if type(impl).bind_processor is not TypeDecorator.bind_processor:
            raise InvalidShardKey(where, f"its type {type(impl).__name__} hides what it stores (bind_processor)")
        return _decorated(impl, part_encoder(impl.impl_instance, where, deterministic=deterministic))
    if isinstance(impl, postgresql.DOMAIN):
        if impl.collation is not None and not deterministic:
            _check_collation(impl.collation, where)
        return part_encoder(impl.data_type, where, deterministic=deterministic)
    at = _At(where, kind.compile(dialect=_DIALECT))
    for base, maker in _MAKERS:
        if isinstance(impl, base):
            if isinstance(impl, sqltypes.String) and not deterministic:
                _check_collation(impl.collation, where)
            return maker(impl, at)
    raise at.unfit(
        "it has no text that is the same for all equal values; use a column of text, integer, uuid, bytea, "
        "boolean, date, timestamp, or numeric with a scale"
    )


def _check_collation(collation: str | None, where: str) -> None:
    if collation is not None and not _DETERMINISTIC.fullmatch(collation):
        raise InvalidShardKey(
            where,
            f"its collation {collation!r} may take different texts as equal; if it is deterministic, say so "
            'by info={"shard_key": True, "deterministic": True}',
        )


def _decorated(decorator: TypeDecorator[Any], inner: PartEncoder) -> PartEncoder:
    process = decorator.process_bind_param
    if type(decorator).process_bind_param is TypeDecorator.process_bind_param:
        return inner  # it decorates results, or nothing
    return lambda value: inner(process(value, _DIALECT))


def _text(kind: sqltypes.String, at: _At) -> PartEncoder:
    if _PADDED.match(at.shown):
        raise at.unfit("PostgreSQL pads its values with spaces; use text or varchar(n)")
    if isinstance(kind, postgresql.CITEXT):
        raise at.unfit("it takes texts of different bytes as equal; use text, and store lower case")
    length = kind.length

    def encode(value: object) -> bytes:
        if value.__class__ is not str and not isinstance(value, str):
            raise at.refusal(value, "a str")
        if length is not None and len(value) > length:  # PostgreSQL would cut spaces off, or refuse
            raise at.refusal(value, f"at most {length} characters")
        return encode_text(value)

    return encode


def _enum(kind: sqltypes.Enum, at: _At) -> PartEncoder:
    stored = kind.bind_processor(_DIALECT)  # type: ignore[no-untyped-call]
    if stored is None:  # pragma: no cover - SQLAlchemy's Enum always has one
        return _text(kind, at)
    labels = frozenset(kind.enums)

    def encode(value: object) -> bytes:
        if value is None or not isinstance(value, str | Enum):
            raise at.refusal(value, "a member of its enumeration")
        try:
            label = stored(value)
        except LookupError:
            label = None
        if label not in labels:
            raise at.refusal(value, f"one of {', '.join(map(repr, kind.enums))}")
        return encode_text(label)

    return encode


def _boolean(_: sqltypes.Boolean, at: _At) -> PartEncoder:
    def encode(value: object) -> bytes:
        if value.__class__ is not bool:
            raise at.refusal(value, "True or False")
        return encode_bool(value)

    return encode


def _integer(_: sqltypes.Integer, at: _At) -> PartEncoder:
    def encode(value: object) -> bytes:
        if value.__class__ is not int and (not isinstance(value, int) or isinstance(value, bool)):
            raise at.refusal(value, "an int")
        return encode_int(value)

    return encode


def _numeric(kind: sqltypes.Numeric[Any], at: _At) -> PartEncoder:
    """Values at the column's scale. Without one, 1.5 and 1.50 are equal in PostgreSQL but have two texts."""
    scale = kind.scale
    if scale is None and kind.precision is not None:
        scale = 0  # as in SQL: numeric(p) is numeric(p, 0)
    if scale is None or scale < 0:
        raise at.unfit("without a scale, equal numbers may have different texts (1.5, 1.50); use Numeric(p, s)")
    step = Decimal(1).scaleb(-scale)

    def encode(value: object) -> bytes:
        if not isinstance(value, Decimal | int) or isinstance(value, bool):
            raise at.refusal(value, "a Decimal")
        number = Decimal(value)
        if not number.is_finite():
            return encode_decimal(number)  # which refuses it
        _, digits, exponent = number.as_tuple()
        # By its digits: arithmetic is cut off at the precision of the caller's context.
        if isinstance(exponent, int) and exponent < -scale and any(digits[exponent + scale :]):
            raise at.refusal(value, f"at most {scale} digits after the point, or round it first")
        try:
            return encode_decimal(number.quantize(step, context=_WIDE))
        except InvalidOperation:
            raise at.refusal(value, "a number that fits its precision") from None

    return encode


def _uuid(kind: sqltypes.Uuid[Any], at: _At) -> PartEncoder:
    """A uuid column, or CHAR(32) with the hex digits alone: always full, so never padded."""
    native = at.shown == "UUID"

    def encode(value: object) -> bytes:
        if not isinstance(value, UUID):
            try:
                value = UUID(value)  # type: ignore[arg-type]
            except (TypeError, ValueError, AttributeError):
                raise at.refusal(value, "a UUID, or its text") from None
        return encode_uuid(value) if native else value.hex.encode()

    return encode


def _binary(_: sqltypes.LargeBinary, at: _At) -> PartEncoder:
    def encode(value: object) -> bytes:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise at.refusal(value, "bytes")
        return encode_bytes(value)

    return encode


def _date(_: sqltypes.Date, at: _At) -> PartEncoder:
    def encode(value: object) -> bytes:
        if not isinstance(value, date) or isinstance(value, datetime):
            raise at.refusal(value, "a date")
        return encode_date(value)

    return encode


def _datetime(kind: sqltypes.DateTime, at: _At) -> PartEncoder:
    """PostgreSQL would read the other kind, aware or naive, by the session's time zone: the key would depend on it."""
    aware = bool(kind.timezone)
    found = _PRECISION.match(at.shown)  # the dialect's own type has lost it
    precision = int(found[1]) if found else 6
    coarsest = 10 ** max(0, 6 - precision)
    wanted = "an aware datetime" if aware else "a naive datetime"

    def encode(value: object) -> bytes:
        if not isinstance(value, datetime) or (value.utcoffset() is not None) is not aware:
            raise at.refusal(value, wanted)
        if value.microsecond % coarsest:
            raise at.refusal(value, f"at most {precision} digits of a second, or round it first")
        return encode_datetime(value)

    return encode


_MAKERS: Final[tuple[tuple[type, Callable[[Any, _At], PartEncoder]], ...]] = (
    (sqltypes.Enum, _enum),
    (sqltypes.String, _text),
    (sqltypes.Boolean, _boolean),
    (sqltypes.Integer, _integer),
    (sqltypes.Numeric, _numeric),
    (sqltypes.Uuid, _uuid),
    (sqltypes.LargeBinary, _binary),
    (sqltypes.DateTime, _datetime),
    (sqltypes.Date, _date),
)


_TYPE_NAMES: Final[tuple[tuple[type, str], ...]] = (
    (sqltypes.Enum, "enum"),
    (sqltypes.String, "text"),
    (sqltypes.Boolean, "boolean"),
    (sqltypes.Integer, "bigint"),
    (sqltypes.Numeric, "numeric"),
    (sqltypes.Uuid, "uuid"),
    (sqltypes.LargeBinary, "bytea"),
    (sqltypes.Date, "date"),
)


def type_name(kind: TypeEngine[Any]) -> str:
    """The type of a key column as `key_text` wants it: that of PostgreSQL, or one with the same text.

    Args:
        kind: a type for which `part_encoder` has an encoder.

    Raises:
        InvalidShardKey: columns of the type cannot be shard keys.
    """
    impl = kind.dialect_impl(_DIALECT)
    if isinstance(impl, TypeDecorator):
        return type_name(impl.impl_instance)
    if isinstance(impl, postgresql.DOMAIN):
        return type_name(impl.data_type)
    if isinstance(impl, sqltypes.DateTime):
        return f"timestamp {'with' if impl.timezone else 'without'} time zone"
    for base, name in _TYPE_NAMES:
        if isinstance(impl, base):
            return name
    raise InvalidShardKey(kind, "columns of this type cannot be shard keys")
