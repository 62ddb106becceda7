"""XXH3 (64 bits) as plpgsql, bit for bit what `shardlib.token` computes."""

from __future__ import annotations

import struct
from typing import Final

from shardlib_ops.reshard.guard.arithmetic import (
    LOW_32,
    add,
    constant,
    load,
    multiply,
    rotated,
    shifted,
    signed,
    xorshift,
)

__all__ = ["DECLARE", "body"]

DECLARE: Final = (
    "n bigint; i integer; j integer; k bigint; l bigint; g bigint; p numeric; q numeric; secret bigint[];"
    + "".join(f" a{lane} bigint;" for lane in range(8))
)
"""The variables of `body`, besides `key` and `token`."""

_SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_P32: Final = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_P64: Final = (
    0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5,
)  # fmt: skip
_LANES: Final = (_P32[2], _P64[0], _P64[1], _P64[2], _P64[3], _P32[1], _P64[4], _P32[0])
_STRIPES: Final = (len(_SECRET) - 64) // 8
_TWO_64: Final = "18446744073709551616"
_TWO_63: Final = "9223372036854775808"


def body(server_version: int) -> str:
    """Statements that set `token` (`bigint`, the 64 bits as they are) to the hash of `key` (`bytea`), of any length.

    Seed 0, the default secret. About 4 us for a key of 12 to 19 bytes, 9 us for 36; longer keys cost about 2 us more
    for each 16 bytes.

    Source: Yann Collet, xxHash (BSD 2-clause), the specification of XXH3.
    """
    version = server_version
    return (
        "n := length(key);\n"
        f"IF n > 240 THEN\n{_long(version)}"
        f"ELSIF n > 128 THEN\n{_up_to_240(version)}"
        f"ELSIF n > 16 THEN\n{_up_to_128(version)}"
        f"ELSIF n > 8 THEN\n{_up_to_16(version)}"
        f"ELSIF n > 3 THEN\n{_up_to_8(version)}"
        f"ELSIF n > 0 THEN\n{_up_to_3()}"
        f"ELSE\ntoken := {constant(_word(56) ^ _word(64))};\n{_mix_64()}"
        "END IF;\n"
    )


def _word(offset: int) -> int:
    """The secret's 8 bytes from there."""
    return int(struct.unpack_from("<Q", _SECRET, offset)[0])


def _up_to_3() -> str:
    flip = (_word(0) & 0xFFFFFFFF) ^ (_word(0) >> 32)
    return (
        "token := (get_byte(key, 0)::bigint << 16) | (get_byte(key, (n >> 1)::integer)::bigint << 24)"
        f" | get_byte(key, (n - 1)::integer) | (n << 8);\ntoken := token # {flip};\n" + _mix_64()
    )


def _up_to_8(version: int) -> str:
    prime = 0x9FB21C651E98DF25
    return (
        load("k", "1", version, count=4)
        + load("token", "(n - 3)::integer", version, count=4)
        + f"token := {add('token', '(k << 32)')};\n"
        f"token := token # {constant(_word(8) ^ _word(16))};\n"
        f"token := token # {rotated('token', 49)} # {rotated('token', 24)};\n"
        + multiply("token", prime)
        + f"token := token # ({shifted('token', 35)} + n);\n"
        + multiply("token", prime)
        + xorshift("token", 28)
    )


def _up_to_16(version: int) -> str:
    return (
        load("k", "1", version)
        + load("g", "(n - 7)::integer", version)
        + f"k := k # {constant(_word(24) ^ _word(32))};\n"
        f"g := g # {constant(_word(40) ^ _word(48))};\n"
        # The first word with its bytes the other way round.
        "token := ((k & 71777214294589695) << 8) | ((k >> 8) & 71777214294589695);\n"
        "token := ((token & 281470681808895) << 16) | ((token >> 16) & 281470681808895);\n"
        f"token := (token << 32) | ((token >> 32) & {LOW_32});\n"
        f"token := {add('token', 'n')};\n"
        f"token := {add('token', 'g')};\n" + _folded() + _avalanche()
    )


def _up_to_128(version: int) -> str:
    text = _length_times_prime()
    for at in (48, 32, 16, 0):
        mixed = _mix_16(version, f"{at + 1}", at * 2) + _mix_16(version, f"(n - {at + 15})::integer", at * 2 + 16)
        text += f"IF n > {at * 2} THEN\n{mixed}END IF;\n" if at else mixed
    return text + _avalanche()


def _up_to_240(version: int) -> str:
    text = _length_times_prime()
    for number in range(8):
        text += _mix_16(version, f"{number * 16 + 1}", number * 16)
    text += _avalanche()
    for number in range(8, 15):
        mixed = _mix_16(version, f"{number * 16 + 1}", (number - 8) * 16 + 3)
        text += f"IF n >= {number * 16 + 16} THEN\n{mixed}END IF;\n"
    return text + _mix_16(version, "(n - 15)::integer", 136 - 17) + _avalanche()


def _long(version: int) -> str:
    """Stripes of 64 bytes in 8 lanes; after each 16 stripes the lanes are scrambled."""
    words = ", ".join(str(signed(_word(offset))) for offset in range(0, len(_SECRET), 8))
    text = f"secret := '{{{words}}}';\n"
    text += "".join(f"a{lane} := {constant(value)};\n" for lane, value in enumerate(_LANES))
    # `j`: the stripe's number in its block.
    text += "i := 1; j := 0;\nWHILE i + 63 < n LOOP\n"
    text += _stripe(version, "i", [f"secret[j + {lane + 1}]" for lane in range(8)])
    text += f"i := i + 64; j := j + 1;\nIF j = {_STRIPES} AND i <= n THEN\nj := 0;\n"
    for lane in range(8):
        word = constant(_word(len(_SECRET) - 64 + lane * 8))
        text += xorshift(f"a{lane}", 47) + f"a{lane} := a{lane} # {word};\n" + multiply(f"a{lane}", _P32[0])
    text += "END IF;\nEND LOOP;\n"
    last = len(_SECRET) - 64 - 7
    text += _stripe(version, "(n - 63)::integer", [constant(_word(last + lane * 8)) for lane in range(8)])
    text += _length_times_prime()
    for pair in range(4):
        text += (
            f"k := a{pair * 2} # {constant(_word(11 + pair * 16))};\n"
            f"g := a{pair * 2 + 1} # {constant(_word(11 + pair * 16 + 8))};\n"
        ) + _folded()
    return text + _avalanche()


def _stripe(version: int, start: str, words: list[str]) -> str:
    text = ""
    for lane, word in enumerate(words):
        text += load("k", f"{start} + {lane * 8}", version)
        text += f"a{lane ^ 1} := {add(f'a{lane ^ 1}', 'k')};\n"
        text += f"k := k # {word};\ng := {shifted('k', 32)}; k := k & {LOW_32};\n"
        # 32 by 32 bits need 64, one more than there are: the second factor in halves.
        text += f"l := (k * (g >> 16)) << 16; k := k * (g & 65535); k := {add('k', 'l')};\n"
        text += f"a{lane} := {add(f'a{lane}', 'k')};\n"
    return text


def _mix_16(version: int, start: str, offset: int) -> str:
    return (
        load("k", start, version)
        + load("g", f"{start} + 8", version)
        + f"k := k # {constant(_word(offset))}; g := g # {constant(_word(offset + 8))};\n"
        + _folded()
    )


def _folded() -> str:
    """`token := token + (low # high)` of the 128-bit product of `k` and `g`."""
    return (
        f"p := (CASE WHEN k < 0 THEN k + {_TWO_64} ELSE k::numeric END)"
        f" * (CASE WHEN g < 0 THEN g + {_TWO_64} ELSE g::numeric END);\n"
        f"q := div(p, {_TWO_64}); p := p - q * {_TWO_64};\n"
        f"k := (CASE WHEN p >= {_TWO_63} THEN p - {_TWO_64} ELSE p END)::bigint"
        f" # (CASE WHEN q >= {_TWO_63} THEN q - {_TWO_64} ELSE q END)::bigint;\n"
        f"token := {add('token', 'k')};\n"
    )


def _length_times_prime() -> str:
    return "token := n;\n" + multiply("token", _P64[0])


def _avalanche() -> str:
    return xorshift("token", 37) + multiply("token", 0x165667919E3779F9) + xorshift("token", 32)


def _mix_64() -> str:
    return (
        xorshift("token", 33)
        + multiply("token", _P64[1])
        + xorshift("token", 29)
        + multiply("token", _P64[2])
        + xorshift("token", 32)
    )
