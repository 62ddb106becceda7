"""Key bytes become a token: an unsigned 64-bit hash, by the function that the cluster was created with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmh3 import hash128, mmh3_x64_128_uintdigest
from xxhash import xxh3_64_intdigest

from shardlib.errors import InvalidArgument
from shardlib.key.encode import encode_key

__all__ = ["HASH_FUNCTIONS", "hash_of", "token_of"]


_LOW_64: Final = (1 << 64) - 1


def _murmur3(key: bytes) -> int:
    """MurmurHash3, x64 128-bit, seed 0: its first 64 bits, little-endian as its author's code writes them."""
    return mmh3_x64_128_uintdigest(key) & _LOW_64


HASH_FUNCTIONS: Final[dict[str, Callable[[bytes], int]]] = {"murmur3": _murmur3, "xxhash": xxh3_64_intdigest}
"""The hash functions by name. A cluster chooses one when it is created and keeps it."""


def hash_of(name: str) -> Callable[[bytes], int]:
    """The hash function of that name: key bytes to a token, 0 <= token < 2**64.

    Args:
        name: `murmur3` (MurmurHash3 x64 128-bit, seed 0, first 64 bits) or `xxhash` (XXH3 64-bit, seed 0).

    Raises:
        InvalidArgument: there is no such function.
    """
    try:
        return HASH_FUNCTIONS[name]
    except (KeyError, TypeError):
        raise InvalidArgument("hash_function", name, f"one of {', '.join(map(repr, HASH_FUNCTIONS))}") from None


def token_of(name: str) -> Callable[[object], int]:
    """The function from a shard key's value to its token: `hash_of(name)(encode_key(value))`, in one call.

    A text, the usual key, takes no detour through other functions of ours: each costs as much as the hash itself.

    Args:
        name: as for `hash_of`.

    Raises:
        InvalidArgument: there is no such hash function. The function it returns raises `InvalidShardKey`.
    """
    digest = hash_of(name)
    return _murmur3_of if digest is _murmur3 else lambda value: digest(encode_key(value))


def _murmur3_of(value: object) -> int:
    if value.__class__ is str and "\0" not in value:
        if value.isascii():
            # Hashed where it lies, without a copy as bytes. Not for other texts: hash128 crashes on a lone surrogate.
            return hash128(value) & 0xFFFFFFFFFFFFFFFF
        try:
            return mmh3_x64_128_uintdigest(value.encode()) & 0xFFFFFFFFFFFFFFFF
        except UnicodeEncodeError:
            pass  # encode_key says what is wrong
    return mmh3_x64_128_uintdigest(encode_key(value)) & _LOW_64
