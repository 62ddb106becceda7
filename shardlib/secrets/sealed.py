"""``enc:KEY ID:BASE64``: a password that is encrypted for one DSN, so that it says nothing in any other.

AES-256-GCM (NIST SP 800-38D) with a random nonce of 96 bits. The associated data is what the password is bound to:
a ciphertext that is moved to the DSN of another server, or to one that would send it less safely, is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shardlib.errors import InvalidArgument
from shardlib.secrets.keys import SecretKey

__all__ = ["PREFIX", "key_id_of", "seal", "shown", "unseal"]

PREFIX: Final = "enc:"
_FORM: Final = re.compile(r"enc:([0-9a-f]{8}):([A-Za-z0-9_-]+)")
_NONCE: Final = 12
_TAG: Final = 16
_BLOCK: Final = 32
"""Passwords are filled up to a multiple of this, so that the length of a ciphertext does not tell theirs."""
_MAX: Final = 4096
_DOMAIN: Final = b"shardlib password 1\n"


def seal(password: str, bound: Mapping[str, str], key: SecretKey) -> str:
    """Encrypt a password for the DSN with these parameters.

    Args:
        password: the plain one.
        bound: what it is bound to, see `shardlib.dsn.Dsn.bound`.
        key: which to encrypt with.

    Raises:
        InvalidArgument: a password that no server takes, or `cryptography` is missing. The message never holds it.
    """
    plain = password.encode("utf-8", "surrogateescape")
    if not plain or len(plain) > _MAX or b"\0" in plain:
        raise InvalidArgument("password", "***", f"1 to {_MAX} bytes of text, without a NUL")
    nonce = os.urandom(_NONCE)
    filled = plain + b"\0" * (-len(plain) % _BLOCK)
    sealed = _cipher(key).encrypt(nonce, filled, _associated(bound))
    return f"{PREFIX}{key.id}:{base64.urlsafe_b64encode(nonce + sealed).decode().rstrip('=')}"


def unseal(text: str, bound: Mapping[str, str], keys: Sequence[SecretKey]) -> str:
    """The password that was encrypted for the DSN with these parameters.

    Raises:
        InvalidArgument: none of the keys is the one it names, it was changed, or it was encrypted for another DSN; or
            `cryptography` is missing. The message holds the id of the key only.
    """
    key_id = key_id_of(text)
    key = next((key for key in keys if key.id == key_id), None)
    if key is None:
        have = ", ".join(key.id for key in keys)
        raise InvalidArgument("password", shown(text), f"this process has no such key; it has {have}")
    sealed = _bytes(text)
    cipher = _cipher(key)
    from cryptography.exceptions import InvalidTag

    plain: bytes | None
    try:
        plain = cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], _associated(bound))
    except InvalidTag:
        plain = None
    if plain is None:
        raise InvalidArgument(
            "password", shown(text),
            "it was changed, or encrypted for a DSN with another user, host, port, database or TLS: encrypt it anew",
        )  # fmt: skip
    return plain.rstrip(b"\0").decode("utf-8", "surrogateescape")


def key_id_of(text: str) -> str:
    """The id of the key that an encrypted password names.

    Raises:
        InvalidArgument: it is no encrypted password.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidArgument("password", shown(text), "enc:KEY ID:BASE64, as `shardlib-ops secret encrypt` prints it")
    return found[1]


def shown(text: str) -> str:
    """An encrypted password as messages show it: which key it names."""
    found = _FORM.fullmatch(text)
    return f"{PREFIX}{found[1] if found else '***'}"


def _bytes(text: str) -> bytes:
    found = _FORM.fullmatch(text)
    word = found[2] if found else ""
    try:
        sealed = base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))
    except (binascii.Error, ValueError):
        sealed = b""
    if len(sealed) < _NONCE + _TAG + _BLOCK:
        raise InvalidArgument("password", shown(text), "it is cut off: encrypt it anew")
    return sealed


def _associated(bound: Mapping[str, str]) -> bytes:
    # JSON: no two mappings have one text, whatever signs stand in names and values.
    return _DOMAIN + json.dumps(sorted(bound.items()), ensure_ascii=True, separators=(",", ":")).encode()


def _cipher(key: SecretKey) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        missing = True
    else:
        missing = False
    if missing:
        raise InvalidArgument(
            "password", f"{PREFIX}{key.id}",
            "encrypted passwords need the package `cryptography`: pip install 'shardlib[secrets]'",
        )  # fmt: skip
    return AESGCM(key.reveal())
