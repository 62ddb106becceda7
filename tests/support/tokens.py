"""Tokens of every kind, right and wrong, for the tests of servers; and the keys to sign them with."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import uuid
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import SecretStr

from shardlib_ops.settings import AuthSettings

SECRET = "b7Kq0vXc3sWm9ZtLr5YpNf2HgJd8QaEu6TiRo1Vx4"
OTHER_SECRET = "Zx9wVu8tSr7qPo6nMl5kJi4hGf3eDc2bA1z0YxWv0"


def auth(**changes: Any) -> AuthSettings:
    """Settings of a server that believes `SECRET`."""
    return AuthSettings(**{"secret": SecretStr(SECRET), **changes})


def b64(data: bytes | object) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims(now: float, **changes: Any) -> dict[str, Any]:
    """What a good token says; a change to `...` leaves a claim out."""
    found = {
        "iss": "shardlib", "aud": "shardlib", "sub": "alice", "role": "viewer", "jti": uuid.uuid4().hex,
        "iat": int(now), "nbf": int(now), "exp": int(now) + 600, **changes,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not ...}


def forged(head: dict[str, Any], body: object, secret: bytes = SECRET.encode()) -> str:
    """A token with any head, signed by HMAC whatever its head says; made by hand, since libraries refuse to."""
    head = {name: value for name, value in {"typ": "at+jwt", "alg": "HS256", **head}.items() if value is not ...}
    signed = f"{b64(head)}.{b64(body)}"
    signature = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{b64(signature)}"


def key_pair(folder: Path, kind: str) -> tuple[Path, Path, Any]:
    """Files of a private and a public key, and the private key itself."""
    private: Any
    if kind == "RS256":
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    elif kind == "ES256":
        private = ec.generate_private_key(ec.SECP256R1())
    else:
        private = ed25519.Ed25519PrivateKey.generate()
    name = uuid.uuid4().hex[:8]
    files = folder / f"{name}.key", folder / f"{name}.pub"
    files[0].write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    files[1].write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return *files, private
