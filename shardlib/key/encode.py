"""A Python value becomes key bytes: the UTF-8 of PostgreSQL's own text output of the value.

The text is that of the type's output function, which is what COPY and the logical stream write, under the
settings `DateStyle=ISO`, `TimeZone=UTC`, `bytea_output=hex`. So a key read from either hashes with no
conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Final
from uuid import UUID

from shardlib.errors import InvalidShardKey
from shardlib.key.composite import join_parts

__all__ = ["encode_key"]


def encode_key(value: object) -> bytes:
    r"""The key bytes of a shard key.

    =================== ============================= ========================================================
    Python              PostgreSQL                    bytes
    =================== ============================= ========================================================
    str                 text, varchar(n), enum        its UTF-8
    int                 smallint, integer, bigint     `42`, `-7`
    UUID                uuid                          `0e984725-c51c-4bf4-9960-e1c80e27aba0`
    bytes               bytea                         `\x00ff`
    bool                boolean                       `t`, `f`
    date                date                          `2024-05-06`
    datetime, naive     timestamp                     `2024-05-06 07:08:09.5`
    datetime, aware     timestamptz                   the same in UTC, with `+00`
    Decimal             numeric(p, s)                 `1.50`, digits at its own scale: give it the column's
    Enum                enum, varchar                 its member's name, as SQLAlchemy stores it
    tuple               several columns               its parts, a zero byte between them (see `join_parts`)
    =================== ============================= ========================================================

    A tuple of one element is that element. An Enum that is also a str or int is refused unless name and value
    give the same bytes: a plain column holds its value and an Enum column its name, so pass the one that is
    meant. Where the table is known, `KeySpec.encode` knows which, and also the scale of a numeric.

    Raises:
        InvalidShardKey: None, float, NaN, a str with a zero character or a lone surrogate, or any other type.
    """
    kind = value.__class__
    if kind is str and "\0" not in value:  # type: ignore[operator]  # the usual key, without a second call
        try:
            return value.encode()  # type: ignore[attr-defined, no-any-return]
        except UnicodeEncodeError:
            pass  # encode_text says what is wrong
    encoder = _ENCODERS.get(kind)
    return encoder(value) if encoder is not None else _by_base(value)


def encode_text(value: str) -> bytes:
    """UTF-8 of a str that PostgreSQL can store."""
    if "\0" in value:
        raise InvalidShardKey(value, "PostgreSQL's text cannot hold a zero character")
    try:
        return str.encode(value)
    except UnicodeEncodeError:
        raise InvalidShardKey(value, "it holds a lone surrogate, which is no character and has no UTF-8") from None


def encode_int(value: int) -> bytes:
    """Decimal digits."""
    try:
        return str(int(value)).encode()
    except ValueError:  # past Python's limit of digits for a conversion
        raise InvalidShardKey("a very large int", "it has thousands of digits") from None


def encode_bool(value: bool) -> bytes:
    """The output of PostgreSQL's boolean."""
    return b"t" if value else b"f"


def encode_uuid(value: UUID) -> bytes:
    """Lower-case, with hyphens."""
    return str(value).encode()


def encode_bytes(value: bytes | bytearray | memoryview) -> bytes:
    r"""The hex output of bytea."""
    return b"\\x" + value.hex().encode()


def encode_date(value: date) -> bytes:
    """ISO date; the year has four digits, as in PostgreSQL."""
    return b"%04d-%02d-%02d" % (value.year, value.month, value.day)


def encode_datetime(value: datetime) -> bytes:
    """ISO timestamp, or timestamptz in UTC; a fraction without trailing zeros, as in PostgreSQL."""
    zone = b""
    if value.tzinfo is not None and value.utcoffset() is not None:
        try:
            value = value.astimezone(UTC)
        except OverflowError:
            raise InvalidShardKey(value, "in UTC it falls outside of the years 1 to 9999") from None
        zone = b"+00"
    text = b"%04d-%02d-%02d %02d:%02d:%02d" % (
        value.year, value.month, value.day, value.hour, value.minute, value.second,
    )  # fmt: skip
    if value.microsecond:
        text += (b".%06d" % value.microsecond).rstrip(b"0")
    return text + zone


def encode_decimal(value: Decimal) -> bytes:
    """Digits without an exponent, at the value's own scale; PostgreSQL's numeric has no negative zero."""
    if not value.is_finite():
        raise InvalidShardKey(value, "it is not a number that equals itself in every program")
    return format(value or abs(value), "f").encode()


def encode_enum(value: Enum) -> bytes:
    """The member's name; its value too must say the same where a plain column would store that."""
    name = encode_text(value.name)
    if isinstance(value, str | int):
        stored = encode_text(str(value.value)) if isinstance(value, str) else encode_int(int(value))
        if stored != name:
            raise InvalidShardKey(
                value, "an Enum column stores its name and a plain column its value; pass .name or .value"
            )
    return name


def encode_tuple(value: tuple[object, ...]) -> bytes:
    """The parts, joined."""
    for part in value:
        if isinstance(part, tuple):
            raise InvalidShardKey(value, "a part of a composite key cannot be a tuple")
    return join_parts(map(encode_key, value))


def _by_base(value: object) -> bytes:
    """Subclasses, which are rare enough to be looked up in turn; a type stands before the one it derives from."""
    for base, encoder in _BASES:
        if isinstance(value, base):
            return encoder(value)
    if value is None:
        raise InvalidShardKey(value, "NULL belongs to no shard")
    if isinstance(value, float):
        raise InvalidShardKey(value, "a float has no exact text; use int, Decimal or str")
    allowed = "str, int, UUID, bytes, bool, date, datetime, Decimal, Enum, or a tuple of these"
    raise InvalidShardKey(value, f"its type has no stable text in PostgreSQL; use {allowed}")


_BASES: Final[tuple[tuple[type, Callable[[Any], bytes]], ...]] = (
    (Enum, encode_enum),
    (str, encode_text),
    (bool, encode_bool),
    (int, encode_int),
    (UUID, encode_uuid),
    (bytes, encode_bytes),
    (bytearray, encode_bytes),
    (memoryview, encode_bytes),
    (datetime, encode_datetime),
    (date, encode_date),
    (Decimal, encode_decimal),
    (tuple, encode_tuple),
)

_ENCODERS: Final[dict[type, Callable[[Any], bytes]]] = dict(_BASES)
