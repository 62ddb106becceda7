"""MurmurHash3 as plpgsql, bit for bit what `shardlib.token` computes."""

from __future__ import annotations

from typing import Final

from shardlib_ops.reshard.guard.arithmetic import LOW_32, add, load, multiply, rotated, xorshift

__all__ = ["DECLARE", "body"]

DECLARE: Final = "n bigint; i integer; k bigint; l bigint; g bigint;"
"""The variables of `body`, besides `key` and `token`."""

_C1: Final = 0x87C37B91114253D5
_C2: Final = 0x4CF5AD432745937F
_FINAL: Final = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)


def body(server_version: int) -> str:
    """Statements that set `token` (`bigint`, the 64 bits as they are) to the hash of `key` (`bytea`), of any length.

    x64 128-bit variant, seed 0, the first 64 bits. About 4 us for a key of 12 bytes, 7 us for 36.

    Source: Austin Appleby, MurmurHash3 (public domain), `MurmurHash3_x64_128`.
    """
    return (
        "n := length(key); token := 0; g := 0; i := 1;\n"
        "WHILE i + 15 <= n LOOP\n"
        + load("k", "i", server_version)
        + _first()
        + f"token := {rotated('(token # k)', 27)};\n"
        + _times_5("token", "g", 0x52DCE729)
        + load("k", "i + 8", server_version)
        + _second()
        + f"g := {rotated('(g # k)', 31)};\n"
        + _times_5("g", "token", 0x38495AB5)
        + "i := i + 16;\n"
        "END LOOP;\n"
        "IF i + 8 <= n THEN\n" + load("k", "i + 8", server_version) + _second() + "g := g # k;\nEND IF;\n"
        "IF i <= n THEN\n" + load("k", "i", server_version) + _first() + "token := token # k;\nEND IF;\n"
        "token := token # n; g := g # n;\n"
        f"token := {add('token', 'g')};\n"
        f"g := {add('g', 'token')};\n" + _mixed("token") + _mixed("g") + f"token := {add('token', 'g')};\n"
    )


def _first() -> str:
    return multiply("k", _C1) + f"k := {rotated('k', 31)};\n" + multiply("k", _C2)


def _second() -> str:
    return multiply("k", _C2) + f"k := {rotated('k', 33)};\n" + multiply("k", _C1)


def _times_5(name: str, other: str, more: int) -> str:
    """`name := (name + other) * 5 + more`."""
    return (
        f"l := (({name} & {LOW_32}) + ({other} & {LOW_32})) * 5 + {more};\n"
        f"{name} := (((l >> 32) + (({name} >> 32) + ({other} >> 32)) * 5) << 32) | (l & {LOW_32});\n"
    )


def _mixed(name: str) -> str:
    return (
        xorshift(name, 33)
        + multiply(name, _FINAL[0])
        + xorshift(name, 33)
        + multiply(name, _FINAL[1])
        + xorshift(name, 33)
    )
