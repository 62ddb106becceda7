"""Signed heads: what is kept elsewhere, so that a cut tail is noticed.

A chain shows what was changed in its middle. It cannot show that its end was cut off, or that the whole of it was
written anew: for that somebody else has to know how far it once was.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from shardlib.errors import InvalidArgument
from shardlib_ops.audit.entry import SEQ_MAX, Head

__all__ = ["SignedHead", "find_heads", "read_key", "sign_head"]

_BYTES_MIN: Final = 32
_FORM: Final = re.compile(r"\bshardlib-audit-head:v1:(\d{1,12}):([0-9a-f]{64}):([0-9a-f]{64})\b")


class SignedHead(NamedTuple):
    """A head as it was published."""

    head: Head
    signature: str

    def signed_by(self, key: bytes) -> bool:
        """Whether the holder of this key signed it."""
        return hmac.compare_digest(self.signature, _signature(key, self.head))

    def __str__(self) -> str:
        return f"shardlib-audit-head:v1:{self.head.seq}:{self.head.hash}:{self.signature}"


def sign_head(key: bytes, head: Head) -> str:
    """`shardlib-audit-head:v1:NUMBER:HASH:SIGNATURE`, the signature an HMAC-SHA256 of what stands before it.

    Args:
        key: at least 32 bytes that who can write the log does not know.
        head: of the log.

    Raises:
        InvalidArgument: the key is too short, or the head's number none.
    """
    if len(key) < _BYTES_MIN:
        raise InvalidArgument("key", f"{len(key)} bytes", f"at least {_BYTES_MIN} bytes")
    if not 0 <= head.seq <= SEQ_MAX or not re.fullmatch("[0-9a-f]{64}", head.hash):
        raise InvalidArgument("head", head, "the number and the hash of an entry")
    return str(SignedHead(head, _signature(key, head)))


def _signature(key: bytes, head: Head) -> str:
    return hmac.new(key, f"shardlib-audit-head:v1:{head.seq}:{head.hash}".encode(), hashlib.sha256).hexdigest()


def find_heads(text: str) -> Iterator[SignedHead]:
    """Every signed head in a text, such as a whole log of the manager."""
    for found in _FORM.finditer(text):
        yield SignedHead(Head(int(found[1]), found[2]), found[3])


def read_key(path: Path) -> bytes:
    """The key in the first line of a file.

    Raises:
        InvalidArgument: there is no such file, or the line is too short. The message does not hold it.
    """
    try:
        key = path.read_bytes().split(b"\n", 1)[0].strip()
    except OSError as error:
        raise InvalidArgument("key_file", str(path), f"a file that can be read ({error.strerror})") from None
    if len(key) < _BYTES_MIN:
        raise InvalidArgument("key_file", str(path), f"a file whose first line has at least {_BYTES_MIN} bytes")
    return key
