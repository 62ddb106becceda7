"""Several parts become one key, so that no two different tuples collide.

The rule, for any language: take the UTF-8 of PostgreSQL's text output of each part and put one zero byte
between them. PostgreSQL's text never contains a zero byte, so the parts can be read back, and a key of one
part is the part itself: `("acme", 42)` is `61636d65 00 3432`, `("acme",)` and `"acme"` are both `61636d65`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from shardlib.errors import InvalidShardKey

__all__ = ["SEPARATOR", "copy_key", "join_parts", "shown_key"]

SEPARATOR = b"\0"
"""What stands between two parts."""

_ESCAPE = re.compile(rb"\\([0-7]{1,3}|x[0-9A-Fa-f]{1,2}|.)", re.DOTALL)
_CONTROL = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def join_parts(parts: Iterable[bytes]) -> bytes:
    """The key bytes of a composite key from those of its parts, in the order of the key.

    Args:
        parts: one or more; none holds a zero byte, which every part that `encode_key` gives fulfils.

    Raises:
        InvalidShardKey: there is no part, or one holds a zero byte.
    """
    listed = tuple(parts)
    key = SEPARATOR.join(listed)
    if not listed:
        raise InvalidShardKey((), "it has no part")
    if key.count(SEPARATOR) != len(listed) - 1:
        raise InvalidShardKey(listed, "a part holds a zero byte, which PostgreSQL's text never does")
    return key


def shown_key(key: bytes) -> str | tuple[str, ...]:
    """Key bytes for a message: the text, or of several columns the tuple of the texts."""
    parts = key.decode(errors="replace").split(SEPARATOR.decode())
    return tuple(parts) if len(parts) > 1 else parts[0]


def copy_key(fields: Sequence[bytes]) -> bytes:
    r"""The key bytes of a row from its key columns as text COPY writes them, that is, escaped.

    Args:
        fields: the raw key columns of one line, in the order of the key, without tabs and newline.

    Raises:
        InvalidShardKey: a column is NULL (`\N`).
    """
    for field in fields:
        if field == rb"\N":
            raise InvalidShardKey(None, "a key column of the row is NULL")
    return SEPARATOR.join([field if b"\\" not in field else _ESCAPE.sub(_unescaped, field) for field in fields])


def _unescaped(found: re.Match[bytes]) -> bytes:
    code = found[1]
    if code[:1] == b"x" and len(code) > 1:
        return bytes((int(code[1:], 16),))
    if code[:1] in b"01234567":
        return bytes((int(code, 8) & 0xFF,))
    return _CONTROL.get(code, code)
