"""What a token must say, apart from its signature. Pure: the time is an argument.

Source: RFC 7519 4.1; RFC 8725 3.8 to 3.12; RFC 9068 2.1 for `at+jwt`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from shardlib_ops.auth.model import Identity, Role, Unauthenticated
from shardlib_ops.settings import AuthSettings

__all__ = ["TYP", "checked_head", "identity_of"]

TYP: Final = "at+jwt"
_TYPES: Final = (TYP, f"application/{TYP}")

# A head that brings its own key, or asks for a treatment that is not given here.
_REFUSED: Final = ("jku", "jwk", "x5u", "x5c", "crit", "b64", "zip", "enc")
_KID: Final = re.compile(r"[A-Za-z0-9._=+-]{1,128}")
_TEXT_MAX: Final = 200


def checked_head(head: Mapping[str, Any]) -> tuple[str, str | None]:
    """Algorithm and key id that a token's head names. Nothing in it is believed yet.

    Raises:
        Unauthenticated: it is not the head of one of our tokens.
    """
    if any(name in head for name in _REFUSED):
        raise Unauthenticated("head")
    typ = head.get("typ")
    if not isinstance(typ, str) or typ.lower() not in _TYPES:
        raise Unauthenticated("typ")
    algorithm, kid = head.get("alg"), head.get("kid")
    if not isinstance(algorithm, str):
        raise Unauthenticated("alg")
    if kid is not None and (not isinstance(kid, str) or not _KID.fullmatch(kid)):
        raise Unauthenticated("kid")
    return algorithm, kid


def identity_of(claims: object, settings: AuthSettings, now: float) -> Identity:
    """Whom a token with a valid signature names.

    Args:
        claims: the decoded payload.
        settings: what must stand in it.
        now: seconds since 1970.

    Raises:
        Unauthenticated: it is not ours, not yet or no longer valid, or lives for too long.
    """
    if not isinstance(claims, Mapping):
        raise Unauthenticated("claims")
    if claims.get("iss") != settings.issuer:
        raise Unauthenticated("iss")
    audience = claims.get("aud")
    if settings.audience not in (audience if isinstance(audience, list) else [audience]):
        raise Unauthenticated("aud")
    subject, token_id = _text(claims, "sub"), _text(claims, "jti")
    expires_at = _times(claims, settings, now, subject)
    role = claims.get("role")
    if not isinstance(role, str) or role not in set(Role):
        raise Unauthenticated("role", subject)
    cluster = _text(claims, "cluster") if "cluster" in claims else None
    return Identity(subject, Role(role), token_id, expires_at, cluster)


def _times(claims: Mapping[str, Any], settings: AuthSettings, now: float, subject: str) -> float:
    issued_at, expires_at = _time(claims, "iat", subject), _time(claims, "exp", subject)
    begins_at = _time(claims, "nbf", subject) if "nbf" in claims else issued_at
    if now >= expires_at + settings.leeway_s:
        raise Unauthenticated("expired", subject)
    if max(begins_at, issued_at) > now + settings.leeway_s:
        raise Unauthenticated("not-yet", subject)
    if expires_at - min(issued_at, begins_at) > settings.ttl_max_s:
        raise Unauthenticated("lifetime", subject)
    return expires_at


def _time(claims: Mapping[str, Any], name: str, subject: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unauthenticated(name, subject)
    return float(value)


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _TEXT_MAX or not value.isprintable():
        raise Unauthenticated(name)
    return value
