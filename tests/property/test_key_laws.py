"""Laws of key bytes: equal keys have equal bytes, different keys different ones, and COPY gives the same."""

from __future__ import annotations

from datetime import UTC, timedelta, timezone
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from shardlib.key import copy_key, encode_key, join_parts
from shardlib.token import HASH_FUNCTIONS

texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)
zones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
parts = st.one_of(
    texts,
    st.integers(),
    st.booleans(),
    st.uuids(),
    st.binary(max_size=8),
    st.dates(),
    st.datetimes(),
    st.decimals(allow_nan=False, allow_infinity=False, places=3),
)
keys = st.one_of(parts, st.lists(parts, min_size=1, max_size=4).map(tuple))
raw_parts = st.lists(st.binary(max_size=6).map(lambda data: data.replace(b"\0", b"")), min_size=1, max_size=5)


@given(keys)
def test_a_key_is_utf8_and_has_a_zero_byte_only_between_parts(key: object) -> None:
    data = encode_key(key)
    assert data.decode("utf-8").encode() == data
    count = len(key) if isinstance(key, tuple) else 1
    assert data.count(b"\0") == count - 1
    assert data.split(b"\0") == [encode_key(part) for part in (key if isinstance(key, tuple) else (key,))]
    assert all(0 <= digest(data) < 2**64 for digest in HASH_FUNCTIONS.values())


@given(raw_parts, raw_parts)
def test_different_tuples_never_collide(one: list[bytes], other: list[bytes]) -> None:
    assert (join_parts(one) == join_parts(other)) == (one == other)
    assert join_parts(one).split(b"\0") == one


@given(st.lists(texts, min_size=1, max_size=3))
def test_the_key_of_a_copied_row_is_that_of_its_values(values: list[str]) -> None:
    escaped = [_copied(value.encode()) for value in values]
    assert copy_key(escaped) == encode_key(tuple(values))


def _copied(text: bytes) -> bytes:
    """The text as COPY writes it (PostgreSQL's CopyAttributeOutText)."""
    text = text.replace(b"\\", b"\\\\")
    for raw, letter in ((b"\b", b"b"), (b"\f", b"f"), (b"\n", b"n"), (b"\r", b"r"), (b"\t", b"t"), (b"\v", b"v")):
        text = text.replace(raw, b"\\" + letter)
    return text


@given(st.datetimes(min_value=None, timezones=zones).filter(lambda at: 2 <= at.year <= 9998))
def test_one_instant_is_one_key_in_every_zone(at: object) -> None:
    assert encode_key(at) == encode_key(at.astimezone(UTC))  # type: ignore[attr-defined]


@given(st.integers())
def test_a_whole_number_is_one_key_in_every_type(number: int) -> None:
    assert encode_key(number) == encode_key(str(number)) == encode_key(Decimal(number))
