"""Keys that tokens are checked and signed with. Each is for exactly one algorithm, whatever a token's head says.

Source: RFC 8725 (best current practices of JSON Web Tokens) 3.1, 3.5; RFC 7518 3.2, 3.3 for the least lengths.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from shardlib.dsn import resolve_secret
from shardlib.errors import InvalidArgument
from shardlib_ops.settings import AuthSettings
from shardlib_ops.settings.model import ALGORITHMS

__all__ = ["Key", "keys_of_document", "read_keys", "signing_key"]

SECRET_BYTES_MIN: Final = 32
RSA_BITS_MIN: Final = 2048
_DISTINCT_MIN: Final = 10
_UNIT_MAX: Final = 16
_KNOWN: Final = ("your-256-bit-secret", "changeme", "change-me", "change_me", "password", "secretkey", "secret-key")
_PEM: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Key:
    """A key that tokens are believed by.

    Attributes:
        kid: its name in a token's head.
        algorithm: the only one that it is used with.
        public: what checks a signature; the secret itself for HS256.
        private: what makes one, None if that is elsewhere.
    """

    kid: str
    algorithm: str
    public: Any = field(repr=False)
    private: Any = field(default=None, repr=False)


def read_keys(settings: AuthSettings) -> tuple[Key, ...]:
    """The keys that are here, without those that a JWKS address publishes.

    Raises:
        InvalidArgument: a weak secret, a file that holds no key, or keys that `algorithms` leaves no use for.
    """
    keys: list[Key] = []
    for name in ("secret", "previous_secret"):
        given = getattr(settings, name)
        if given is not None:
            secret = _checked(f"auth.{name}", resolve_secret(given.get_secret_value()))
            keys.append(Key(_kid_of_secret(secret), "HS256", secret, secret))
    if settings.key_file is not None:
        keys += _of_file(settings.key_file)
    allowed = [key for key in keys if not settings.algorithms or key.algorithm in settings.algorithms]
    if keys and not allowed:
        raise InvalidArgument(
            "auth.algorithms",
            list(settings.algorithms),
            f"the keys that are given are for {', '.join(sorted({key.algorithm for key in keys}))}",
        )
    return tuple(allowed)


def signing_key(settings: AuthSettings) -> Key:
    """The key that new tokens are signed with: the secret, or the first private key of the file.

    Raises:
        InvalidArgument: there is none, or it is weak.
    """
    for key in read_keys(settings):
        if key.private is not None:
            return key
    raise InvalidArgument(
        "auth", "no key", "tokens are signed with auth.secret (SHARDLIB_JWT_SECRET) or a private key in auth.key_file"
    )


def keys_of_document(document: object, algorithms: tuple[str, ...] = ()) -> tuple[Key, ...]:
    """The usable keys of a JWKS document (RFC 7517); those for another use, too short or unknown are left out.

    Raises:
        ValueError: it is no such document.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("keys"), list):
        raise ValueError("no JWKS document")  # noqa: TRY004 - what came is wrong, not its Python type
    found = [_of_jwk(each) for each in document["keys"][:100] if isinstance(each, Mapping)]
    return tuple(key for key in found if key is not None and (not algorithms or key.algorithm in algorithms))


def _of_jwk(jwk: Mapping[str, Any]) -> Key | None:
    kid = jwk.get("kid")
    # `oct` would be a secret that everybody can read, and `d` a private key.
    if not isinstance(kid, str) or jwk.get("use", "sig") != "sig" or jwk.get("kty") == "oct" or "d" in jwk:
        return None
    if jwk.get("alg", ALGORITHMS[0]) not in ALGORITHMS:
        return None
    try:
        public = PyJWK({**jwk}, algorithm=jwk.get("alg") or _algorithm_of_kind(jwk)).key
        algorithm = _algorithm(public)
    except (PyJWTError, InvalidArgument, ValueError, TypeError, KeyError):
        return None
    return Key(kid, algorithm, public) if jwk.get("alg", algorithm) == algorithm else None


def _algorithm_of_kind(jwk: Mapping[str, Any]) -> str | None:
    return {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}.get(str(jwk.get("kty")))


def _of_file(path: Path) -> list[Key]:
    problem, content = "", b""
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = f"the file cannot be read ({error.strerror or type(error).__name__})"
    if problem:
        raise InvalidArgument("auth.key_file", str(path), problem)
    if content.lstrip().startswith(b"{"):
        keys: list[Key] = []
        try:
            keys = list(keys_of_document(json.loads(content)))
        except (ValueError, RecursionError):
            pass  # said below, without the content
    else:
        keys = [_of_pem(path, found[0], found[1].decode()) for found in _PEM.finditer(content)]
    if not keys:
        raise InvalidArgument(
            "auth.key_file", str(path), "it holds no key: PEM of RSA, P-256 or Ed25519 keys, or a JWKS document"
        )
    return keys


def _of_pem(path: Path, pem: bytes, label: str) -> Key:
    private, public = None, None
    try:
        if "PRIVATE" in label:
            private = serialization.load_pem_private_key(pem, password=None)
            public = private.public_key()
        else:
            public = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError):
        public = None  # the error may hold a part of the file
    if public is None:
        raise InvalidArgument("auth.key_file", str(path), f"its part {label!r} is no key, or one with a passphrase")
    spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Key(hashlib.sha256(spki).hexdigest()[:32], _algorithm(public, str(path)), public, private)


def _algorithm(public: object, where: str = "***") -> str:
    """The algorithm that a key is for.

    Raises:
        InvalidArgument: it is for none that is allowed, or too short.
    """
    if isinstance(public, rsa.RSAPublicKey):
        if public.key_size < RSA_BITS_MIN:
            raise InvalidArgument("auth.key_file", where, f"an RSA key has at least {RSA_BITS_MIN} bits")
        return "RS256"
    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
        return "ES256"
    if isinstance(public, ed25519.Ed25519PublicKey):
        return "EdDSA"
    raise InvalidArgument("auth.key_file", where, "a key is RSA, on the curve P-256, or Ed25519")


def _kid_of_secret(secret: bytes) -> str:
    return hmac.new(secret, b"shardlib key id", hashlib.sha256).hexdigest()[:16]


def _checked(name: str, secret: str) -> bytes:
    """The secret as bytes.

    Raises:
        InvalidArgument: it could be guessed. The message does not hold it.
    """
    found = secret.encode()
    if len(found) < SECRET_BYTES_MIN:
        raise InvalidArgument(name, "***", f"at least {SECRET_BYTES_MIN} bytes; `openssl rand -base64 48` makes one")
    lowered = secret.lower()
    repeated = any(found == (found[:unit] * len(found))[: len(found)] for unit in range(1, _UNIT_MAX + 1))
    if repeated or len(set(found)) < _DISTINCT_MIN or any(known in lowered for known in _KNOWN):
        raise InvalidArgument(name, "***", "it can be guessed; `openssl rand -base64 48` makes one that cannot")
    if found.lstrip().startswith((b"-----BEGIN", b"ssh-")):
        raise InvalidArgument(name, "***", "it is a key for another algorithm; give it as auth.key_file")
    return found
