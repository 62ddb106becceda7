"""Making a token that servers with the same settings believe."""

from __future__ import annotations

import json
import secrets

from jwt import PyJWS

from shardlib.errors import InvalidArgument
from shardlib_ops.auth.claims import TYP, identity_of
from shardlib_ops.auth.keys import signing_key
from shardlib_ops.auth.model import Role, Unauthenticated
from shardlib_ops.settings import AuthSettings

__all__ = ["issue_token"]


def issue_token(
    settings: AuthSettings, *, subject: str, role: Role | str, ttl_s: int, now: float, cluster: str | None = None
) -> str:
    """A signed token for the servers that have the same settings.

    Args:
        settings: issuer, audience, and the key to sign with.
        subject: who will call with it, at most 200 printable characters.
        role: what they may do.
        ttl_s: lifetime in seconds, at most `settings.ttl_max_s`.
        now: seconds since 1970.
        cluster: the one cluster that it is for; `settings.cluster` if left out.

    Raises:
        InvalidArgument: no key to sign with, or a value that no token may have.
    """
    if role not in set(Role):
        raise InvalidArgument("role", role, f"one of {', '.join(Role)}")
    if not 1 <= ttl_s <= settings.ttl_max_s:
        raise InvalidArgument("ttl", ttl_s, f"1 to {settings.ttl_max_s} seconds (auth.ttl_max_s)")
    key = signing_key(settings)
    issued_at = int(now)
    claims = {
        "iss": settings.issuer, "aud": settings.audience, "sub": subject, "role": str(role),
        "jti": secrets.token_hex(16), "iat": issued_at, "nbf": issued_at, "exp": issued_at + int(ttl_s),
    }  # fmt: skip
    if cluster is not None or settings.cluster is not None:
        claims["cluster"] = cluster or settings.cluster
    try:
        identity_of(claims, settings, now)
    except Unauthenticated as refused:
        name = {"sub": "subject"}.get(refused.reason_code, refused.reason_code)
        raise InvalidArgument(name, claims.get(refused.reason_code), "1 to 200 printable characters") from None
    head = {"typ": TYP, "kid": key.kid}
    return PyJWS().encode(json.dumps(claims).encode(), key.private, algorithm=key.algorithm, headers=head)
