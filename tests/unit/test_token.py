"""Tokens: fixed for ever by vectors, the same in every process, and what their names say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from shardlib.errors import InvalidArgument, InvalidShardKey
from shardlib.key import encode_key
from shardlib.token import HASH_FUNCTIONS, hash_of, token_of

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "tokens.json").read_text(encoding="utf-8"))["keys"]
READERS: dict[str, Any] = {
    "str": str,
    "int": int,
    "bool": {"t": True, "f": False}.__getitem__,
    "uuid": UUID,
    "bytes": bytes.fromhex,
    "date": date.fromisoformat,
    "datetime": datetime.fromisoformat,
    "decimal": Decimal,
}


def value_of(vector: dict[str, Any]) -> object:
    """The key of a vector: a text to be read by its type, or for a composite key several of them."""
    if vector["type"] == "tuple":
        return tuple(value_of(part) for part in vector["value"])
    return READERS[vector["type"]](vector["value"])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['type']}-{vector['hex'][:24]}")
def test_vectors(vector: dict[str, Any]) -> None:
    key = encode_key(value_of(vector))
    assert key.hex() == vector["hex"]
    for name, token in vector["tokens"].items():
        assert hash_of(name)(key) == int(token)
        assert token_of(name)(value_of(vector)) == int(token)


def test_the_vectors_cover_every_type_and_function() -> None:
    assert {vector["type"] for vector in VECTORS} == {*READERS, "tuple"}
    assert all(set(vector["tokens"]) == set(HASH_FUNCTIONS) for vector in VECTORS)


def test_published_values() -> None:
    assert hash_of("murmur3")(b"") == 0
    assert hash_of("murmur3")(b"hello") == 0xCBD8A7B341BD9B02
    assert hash_of("xxhash")(b"") == 0x2D06800538D394C2


def murmur3(key: bytes) -> int:
    """MurmurHash3 x64 128-bit, seed 0, first 64 bits, from the description of Austin Appleby's algorithm."""
    mask, c1, c2 = (1 << 64) - 1, 0x87C37B91114253D5, 0x4CF5AD432745937F

    def turn(x: int, by: int) -> int:
        return (x << by | x >> (64 - by)) & mask

    def finish(h: int) -> int:
        h = (h ^ h >> 33) * 0xFF51AFD7ED558CCD & mask
        h = (h ^ h >> 33) * 0xC4CEB9FE1A85EC53 & mask
        return h ^ h >> 33

    h1 = h2 = 0
    for start in range(0, len(key), 16):
        block = key[start : start + 16]
        k1, k2 = int.from_bytes(block[:8], "little"), int.from_bytes(block[8:], "little")
        h1 ^= turn(k1 * c1 & mask, 31) * c2 & mask
        h2_mixed = turn(k2 * c2 & mask, 33) * c1 & mask
        if len(block) < 16:
            h2 ^= h2_mixed
            break
        h1 = (turn(h1, 27) + h2) * 5 + 0x52DCE729 & mask
        h2 = (turn(h2 ^ h2_mixed, 31) + h1) * 5 + 0x38495AB5 & mask
    h1, h2 = h1 ^ len(key), h2 ^ len(key)
    h1 = (h1 + h2) & mask
    h2 = (h2 + h1) & mask
    return (finish(h1) + finish(h2)) & mask


def test_murmur3_is_the_algorithm_of_that_name() -> None:
    """Any language can compute a token: nothing here depends on the package that does it for us."""
    text = bytes(range(256)) * 2
    for length in [*range(70), 255, 256, 511]:
        assert hash_of("murmur3")(text[:length]) == murmur3(text[:length])


def test_tokens_are_the_same_in_every_process() -> None:
    program = (
        "from shardlib.key import encode_key; from shardlib.token import hash_of; "
        "from shardlib.ring import build_ring; key = encode_key(('tenant', 42)); "
        "ring = build_ring({name: 8 for name in {'s1', 's2', 's3'}}); "
        "print(hash_of('murmur3')(key), hash_of('xxhash')(key), list(ring))"
    )
    seen = set()
    for seed in ("0", "1", "4242"):
        answer = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        seen.add(answer.stdout)
    assert len(seen) == 1
    assert str(hash_of("murmur3")(encode_key(("tenant", 42)))) in seen.pop()


@pytest.mark.parametrize("name", ["md5", "", "Murmur3", None, ["murmur3"]])
def test_an_unknown_function_is_refused_with_the_known_ones(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="'murmur3', 'xxhash'"):
        hash_of(name)
    with pytest.raises(InvalidArgument, match="'murmur3', 'xxhash'"):
        token_of(name)


@pytest.mark.parametrize("name", HASH_FUNCTIONS)
@pytest.mark.parametrize("alphabet", ["a-z09", "aé", "日本", "a\U0001f600"])
def test_a_text_has_the_token_of_its_bytes(name: str, alphabet: str) -> None:
    for length in range(40):
        text = (alphabet * length)[:length]
        assert token_of(name)(text) == hash_of(name)(text.encode())


@pytest.mark.parametrize("name", HASH_FUNCTIONS)
@pytest.mark.parametrize("value", ["a\0b", "\ud800", None, 1.5])
def test_what_is_no_key_has_no_token(name: str, value: object) -> None:
    with pytest.raises(InvalidShardKey):
        token_of(name)(value)
