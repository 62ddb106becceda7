"""Several columns as one key: what joins them, and the same from the raw columns of a COPY."""

from __future__ import annotations

import pytest

from shardlib.errors import InvalidShardKey
from shardlib.key import copy_key, encode_key, join_parts
from shardlib.key.composite import shown_key


def test_parts_are_joined_by_a_zero_byte() -> None:
    assert join_parts([b"acme", b"42"]) == bytes.fromhex("61636d65 00 3432")


def test_one_part_is_the_part_itself() -> None:
    assert join_parts([b"acme"]) == b"acme" == encode_key("acme") == encode_key(("acme",))


@pytest.mark.parametrize("parts", [[], [b"a\0"], [b"a", b"\0"]])
def test_no_part_or_a_zero_byte_inside_is_refused(parts: list[bytes]) -> None:
    with pytest.raises(InvalidShardKey):
        join_parts(parts)


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ([b"plain"], "plain"),
        ([rb"a\tb\nc\rd\\e"], "a\tb\nc\rd\\e"),
        ([rb"\b\f\v"], "\b\f\v"),
        ([rb"\\N"], r"\N"),
        ([rb"\\x00ff"], b"\x00\xff"),
        ([rb"\x41\101"], "AA"),
        ([b"acme", b"42"], ("acme", 42)),
        ([rb"a\tb", rb"\\x61"], ("a\tb", b"a")),
        ([b""], ""),
    ],
)
def test_the_key_of_a_copied_row(fields: list[bytes], value: object) -> None:
    assert copy_key(fields) == encode_key(value)


def test_a_row_without_a_key_is_refused() -> None:
    with pytest.raises(InvalidShardKey, match="NULL"):
        copy_key([b"acme", rb"\N"])


@pytest.mark.parametrize(
    ("key", "shown"), [("acme", "acme"), (("eu", 7), ("eu", "7")), (("", ""), ("", "")), (b"\0", "\\x00")]
)
def test_a_key_in_a_message_is_a_tuple_of_its_parts(key: object, shown: object) -> None:
    assert shown_key(encode_key(key)) == shown
