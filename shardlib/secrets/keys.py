"""The keys that passwords in the catalog are encrypted with: 32 random bytes each, which only processes have."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from shardlib.errors import InvalidArgument

__all__ = ["KEY_FILE_VARIABLE", "KEY_VARIABLE", "SecretKey", "is_key_file", "new_key", "parse_keys", "read_keys"]

KEY_VARIABLE: Final = "SHARDLIB_SECRET_KEY"
KEY_FILE_VARIABLE: Final = "SHARDLIB_SECRET_KEY_FILE"
_BYTES: Final = 32
_FILE_MAX: Final = 16_384


class SecretKey:
    """A key of AES-256. Shows its id only.

    Attributes:
        id: 8 hexadecimal digits, which follow from the key: what was encrypted names its key by them.
    """

    __slots__ = ("_raw", "id")

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.id = hashlib.sha256(b"shardlib key id\0" + raw).hexdigest()[:8]

    def reveal(self) -> bytes:
        """The 32 bytes. For the cipher, never for showing."""
        return self._raw

    def __repr__(self) -> str:
        return f"SecretKey({self.id})"


def new_key() -> str:
    """A new key as text, from the random source of the system."""
    return base64.urlsafe_b64encode(os.urandom(_BYTES)).decode().rstrip("=")


def read_keys(environ: Mapping[str, str] | None = None) -> tuple[SecretKey, ...]:
    """The keys of this process, read anew: the first one encrypts, each of them decrypts. Reads a file.

    Args:
        environ: where they are named; the environment of the process if left out.

    Raises:
        InvalidArgument: there is none, or both variables are set, or one is no key. The message holds no key.
    """
    environ = os.environ if environ is None else environ
    given, path = environ.get(KEY_VARIABLE), environ.get(KEY_FILE_VARIABLE)
    if given and path:
        raise InvalidArgument(KEY_FILE_VARIABLE, path, f"either it or {KEY_VARIABLE}, not both")
    if given:
        return parse_keys(given.replace(",", "\n"), KEY_VARIABLE, "***")
    if not path:
        raise InvalidArgument(
            KEY_FILE_VARIABLE, None,
            "the file of the keys that passwords are encrypted with; `shardlib-ops secret new-key` makes one",
        )  # fmt: skip
    return parse_keys(_content(path), KEY_FILE_VARIABLE, path)


def parse_keys(text: str, variable: str, shown: str) -> tuple[SecretKey, ...]:
    """One key a line; empty lines and those that begin with `#` are left out.

    Args:
        text: the lines.
        variable: what to name in an error.
        shown: its value there.

    Raises:
        InvalidArgument: a line that is no key, or none at all.
    """
    found: list[SecretKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        raw = _decoded(word)
        if raw is None:
            raise InvalidArgument(variable, shown, f"its key number {number} is no {_BYTES} bytes in base64")
        found.append(SecretKey(raw))
    if not found:
        raise InvalidArgument(variable, shown, "it holds no key")
    if len({key.id for key in found}) != len(found):
        raise InvalidArgument(variable, shown, "it holds a key twice")
    return tuple(found)


def is_key_file(path: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether a path leads to the file of the keys, by whatever name: a password is never read there."""
    environ = os.environ if environ is None else environ
    own = environ.get(KEY_FILE_VARIABLE)
    if not own:
        return False
    try:
        return Path(path).samefile(own)
    except (OSError, ValueError):
        return False


def _content(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_FILE_MAX + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidArgument(KEY_FILE_VARIABLE, path, f"the file cannot be read ({why})") from None
    # Python's error of a wrong encoding would hold the content.
    if len(content) > _FILE_MAX or not content.isascii():
        raise InvalidArgument(KEY_FILE_VARIABLE, path, "it is no file of keys: one in base64 on each line")
    return content.decode("ascii")


def _decoded(word: str) -> bytes | None:
    try:
        raw = base64.b64decode(word.replace("-", "+").replace("_", "/") + "=" * (-len(word) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if len(raw) == _BYTES else None
