"""Unsigned 64-bit arithmetic as plpgsql text: PostgreSQL's `bigint` is signed, and an overflow is an error.

Each function gives SQL. What is called `name` is the name of a `bigint` variable, which holds the 64 bits as they are;
`l` is a scratch variable of the function that the text is put into.
"""

from __future__ import annotations

from typing import Final

__all__ = ["LOW_32", "SIGN", "add", "constant", "load", "multiply", "rotated", "shifted", "signed", "xorshift"]

LOW_32: Final = "4294967295"
SIGN: Final = "(-9223372036854775807 - 1)"
"""2**63 as a `bigint`: x # SIGN puts unsigned numbers in signed order."""

_MASK_63: Final = "9223372036854775807"
_REVERSE_SINCE: Final = 18_00_00


def signed(value: int) -> int:
    """The `bigint` with the same 64 bits as an unsigned number."""
    return value - (1 << 64) if value >> 63 else value


def constant(value: int) -> str:
    """A literal for these 64 bits."""
    number = signed(value)
    return SIGN if number == -(1 << 63) else f"({number})" if number < 0 else str(number)


def multiply(name: str, factor: int) -> str:
    """Statements: `name := name * factor`, modulo 2**64.

    The factor is cut into signed halves of 32 bits, so that each product stays within 63 bits and a sign.
    """
    low = factor & 0xFFFFFFFF
    low -= (low >> 31) << 32
    high = ((factor - low) >> 32) & 0xFFFFFFFF
    high -= (high >> 31) << 32
    return (
        f"l := {name} & {LOW_32};\n"
        f"{name} := ((((l * ({low})) >> 32) + ((l * ({high})) & {LOW_32}) + ({name} >> 32) * ({low})) << 32)"
        f" | ((l * ({low})) & {LOW_32});\n"
    )


def add(left: str, right: str) -> str:
    """Expression: `left + right`, modulo 2**64. Both are written more than once."""
    return f"(({left} + (({right} & {_MASK_63}) | (~{left} & {SIGN}))) # (~({left} # {right}) & {SIGN}))"


def shifted(value: str, bits: int) -> str:
    """Expression: `value >> bits`, with zeros from the left."""
    return f"(({value} >> {bits}) & {(1 << (64 - bits)) - 1})"


def rotated(value: str, bits: int) -> str:
    """Expression: `value` rotated to the left. It is written twice."""
    return f"(({value} << {bits}) | (({value} >> {64 - bits}) & {(1 << bits) - 1}))"


def xorshift(name: str, bits: int) -> str:
    """Statement: `name := name # (name >> bits)`."""
    return f"{name} := {name} # {shifted(name, bits)};\n"


def load(name: str, start: str, server_version: int, *, count: int = 8) -> str:
    """Statements: `name :=` the little-endian number of the up to `count` bytes of `key` from `start` (1 is the first).

    Args:
        name: the variable.
        start: expression, an `integer`.
        server_version: as libpq gives it; before 18 there is no `reverse(bytea)` and no cast to `bigint`.
        count: 8, or 4. Fewer bytes at the end of the key count as followed by zeros.
    """
    if server_version >= _REVERSE_SINCE:
        return f"{name} := reverse(substr(key, {start}, {count}))::bigint;\n"
    return (
        f"{name} := ('x' || encode(substr(key, {start}, {count}), 'hex'))::bit(64)::bigint;\n"
        f"{name} := (({name} & 71777214294589695) << 8) | (({name} >> 8) & 71777214294589695);\n"
        f"{name} := (({name} & 281470681808895) << 16) | (({name} >> 16) & 281470681808895);\n"
        f"{name} := ({name} << 32) | (({name} >> 32) & {LOW_32});\n"
    )
