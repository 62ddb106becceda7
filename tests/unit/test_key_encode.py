"""Key bytes of single values: the text that PostgreSQL writes, or a refusal that says why."""

from __future__ import annotations

import enum
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from uuid import UUID

import pytest

from shardlib.errors import InvalidShardKey
from shardlib.key import encode_key


class Color(enum.Enum):
    RED = 1
    HOT = "warm"


class Same(enum.StrEnum):
    gold = "gold"


class Other(enum.StrEnum):
    GOLD = "gold"


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    """A str by another name, as many libraries have one."""

    __slots__ = ()

    def encode(self, *_: object, **__: object) -> bytes:
        return b"not this one"


class Number(int):
    def __str__(self) -> str:
        return "not this one"


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("tenant-42", b"tenant-42"),
        ("", b""),
        (" é\t\n\\ ", b" \xc3\xa9\t\n\\ "),
        ("\U0001f600", b"\xf0\x9f\x98\x80"),
        (Text("plain"), b"plain"),
        (42, b"42"),
        (-7, b"-7"),
        (0, b"0"),
        (2**80, b"1208925819614629174706176"),
        (Number(5), b"5"),
        (True, b"t"),
        (False, b"f"),
        (UUID("0E984725-C51C-4BF4-9960-E1C80E27ABA0"), b"0e984725-c51c-4bf4-9960-e1c80e27aba0"),
        (b"\x00\xff", b"\\x00ff"),
        (b"", b"\\x"),
        (bytearray(b"a"), b"\\x61"),
        (memoryview(b"a"), b"\\x61"),
        (date(2024, 5, 6), b"2024-05-06"),
        (date(1, 1, 1), b"0001-01-01"),
        (datetime(2024, 5, 6, 7, 8, 9), b"2024-05-06 07:08:09"),
        (datetime(2024, 5, 6, 7, 8, 9, 500_000), b"2024-05-06 07:08:09.5"),
        (datetime(2024, 5, 6, 7, 8, 9, 10), b"2024-05-06 07:08:09.00001"),
        (datetime(2024, 5, 6, 7, 8, 9, 500_000, UTC), b"2024-05-06 07:08:09.5+00"),
        (datetime(2024, 5, 6, 0, 30, tzinfo=timezone(HOUR)), b"2024-05-05 23:30:00+00"),
        (Decimal("1.50"), b"1.50"),
        (Decimal(42), b"42"),
        (Decimal("-0.00"), b"0.00"),
        (Decimal("1E+2"), b"100"),
        (Decimal("1E-7"), b"0.0000001"),
        (Color.RED, b"RED"),
        (Color.HOT, b"HOT"),
        (Same.gold, b"gold"),
        (("acme", 42), b"acme\x0042"),
        (("acme",), b"acme"),
        (("", ""), b"\x00"),
        ((True, b"\x00", "x"), b"t\x00\\x00\x00x"),
    ],
)
def test_the_text_of_a_value(value: object, expected: bytes) -> None:
    assert encode_key(value) == expected


def test_a_number_and_its_text_are_one_key() -> None:
    assert encode_key(42) == encode_key("42") == encode_key(Decimal(42))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "NULL"),
        (1.5, "float"),
        (float("nan"), "float"),
        (Decimal("NaN"), "not a number"),
        (Decimal("Infinity"), "not a number"),
        ("a\0b", "zero character"),
        (Text("a\0b"), "zero character"),
        ("\ud800", "surrogate"),
        (Other.GOLD, r"\.name or \.value"),
        (Level.LOW, r"\.name or \.value"),
        ((), "no part"),
        (("a", None), "NULL"),
        (("a", ("b", "c")), "tuple"),
        (("a\0", "b"), "zero character"),
        ([1], "stable text"),
        (object(), "stable text"),
        (Fraction(1, 2), "stable text"),
        (timedelta(1), "stable text"),
        (datetime(2024, 1, 1).time(), "stable text"),
        (datetime(1, 1, 1, tzinfo=timezone(HOUR)), "years 1 to 9999"),
        (datetime(9999, 12, 31, 23, 30, tzinfo=timezone(-HOUR)), "years 1 to 9999"),
    ],
)
def test_what_cannot_be_a_key_is_refused_by_name(value: object, says: str) -> None:
    with pytest.raises(InvalidShardKey, match=says) as caught:
        encode_key(value)
    assert str(caught.value)


def test_the_error_holds_the_value() -> None:
    with pytest.raises(InvalidShardKey) as caught:
        encode_key(1.5)
    assert caught.value.value == 1.5
    assert "1.5" in str(caught.value)


def test_a_number_past_what_python_prints_is_refused() -> None:
    with pytest.raises(InvalidShardKey, match="digits") as caught:
        encode_key(10**5000)
    assert len(str(caught.value)) < 200
