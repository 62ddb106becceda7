"""From a bearer token to an identity."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Final, Protocol

from jwt import PyJWS
from jwt.exceptions import PyJWTError

from shardlib.errors import InvalidArgument
from shardlib_ops.auth.claims import checked_head, identity_of
from shardlib_ops.auth.denied import Denied
from shardlib_ops.auth.jwks import Jwks
from shardlib_ops.auth.keys import Key, read_keys
from shardlib_ops.auth.model import Identity, Role, Unauthenticated
from shardlib_ops.settings import AuthSettings, EndpointSettings, ServerSettings
from shardlib_ops.settings.model import ALGORITHMS, loopback

__all__ = ["Everybody", "TokenVerifier", "Verifier", "verifier_for"]

TOKEN_CHARS_MAX: Final = 8192


class TokenVerifier(Protocol):
    """What a server asks who calls."""

    @property
    def cluster(self) -> str | None:
        """The cluster that is served; a token for another one finds nothing here."""
        ...

    @property
    def open_to_all(self) -> bool:
        """Whether a caller needs no token."""
        ...

    async def verify(self, token: str) -> Identity:
        """Whom a token names.

        Raises:
            Unauthenticated: it is not believed.
        """
        ...

    async def still(self, identity: Identity) -> None:
        """Look again at somebody who was let in before.

        Raises:
            Unauthenticated: the token has expired or is denied by now.
        """
        ...

    async def aclose(self) -> None:
        """Release what it holds; idempotent."""
        ...


class Verifier:
    """Believes tokens that one of the keys has signed, that are for this audience, and that nobody has denied.

    Args:
        settings: what a token must say.
        keys: from files and secrets.
        jwks: keys from an address, or None.
        denied: the list of those that count no more, or None for none.
        clock: seconds since 1970. May jump: nothing but the times in a token is compared with it.
    """

    open_to_all: Final = False

    def __init__(
        self,
        settings: AuthSettings,
        keys: tuple[Key, ...],
        *,
        jwks: Jwks | None = None,
        denied: Denied | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.cluster = settings.cluster
        self._settings, self._keys, self._jwks, self._denied, self._clock = settings, keys, jwks, denied, clock
        self._signatures = {name: PyJWS(algorithms=[name]) for name in ALGORITHMS}

    @classmethod
    def from_settings(
        cls,
        settings: AuthSettings,
        *,
        denied: Denied | None = None,
        endpoints: EndpointSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Verifier:
        """A verifier with the keys that the settings name.

        Raises:
            InvalidArgument: no key at all, a weak secret, an unusable key file, a JWKS address without TLS.
        """
        keys = read_keys(settings)
        jwks = None
        if settings.jwks_url is not None:
            scheme, _, rest = settings.jwks_url.partition("://")
            if scheme != "https" and not (scheme == "http" and loopback(rest.split("/")[0].rsplit(":", 1)[0])):
                raise InvalidArgument("auth.jwks_url", f"{scheme}://...", "https, or http on loopback")
            jwks = Jwks(settings, endpoints if endpoints is not None else EndpointSettings())
        if not keys and jwks is None:
            raise InvalidArgument(
                "auth",
                "no key",
                "set SHARDLIB_JWT_SECRET, SHARDLIB_JWT_KEY_FILE or SHARDLIB_JWKS_URL; or, for trials on this machine "
                "only, start with --dev",
            )
        return cls(settings, keys, jwks=jwks, denied=denied, clock=clock)

    async def verify(self, token: str) -> Identity:
        """Whom a token names.

        Raises:
            Unauthenticated: its head, signature, claims or times do not fit, or it is denied.
        """
        if len(token) > TOKEN_CHARS_MAX or not token.isascii():
            raise Unauthenticated("malformed")
        payload = await self._payload(token)
        try:
            claims = json.loads(payload)
        except (ValueError, RecursionError):
            raise Unauthenticated("malformed") from None
        identity = identity_of(claims, self._settings, self._clock())
        if self._denied is not None:
            await self._denied.check(identity)
        return identity

    async def still(self, identity: Identity) -> None:
        """Look again at somebody who was let in before.

        Raises:
            Unauthenticated: the token has expired or is denied by now.
        """
        if self._clock() >= identity.expires_at:
            raise Unauthenticated("expired", identity.subject)
        if self._denied is not None:
            await self._denied.check(identity)

    async def aclose(self) -> None:
        """End what runs in the background; idempotent."""
        if self._jwks is not None:
            await self._jwks.aclose()
        if self._denied is not None:
            await self._denied.aclose()

    async def _payload(self, token: str) -> bytes:
        try:
            head = self._signatures["HS256"].get_unverified_header(token)
        except (PyJWTError, RecursionError):
            raise Unauthenticated("malformed") from None
        algorithm, kid = checked_head(head)
        for key in await self._candidates(algorithm, kid):
            # The algorithm is that of the key: with the head's, a public key could be taken for a secret.
            try:
                checked = self._signatures[key.algorithm].decode_complete(token, key.public, algorithms=[key.algorithm])
            except (PyJWTError, ValueError):
                continue  # another key may have signed it
            payload: bytes = checked["payload"]
            return payload
        raise Unauthenticated("signature")

    async def _candidates(self, algorithm: str, kid: str | None) -> list[Key]:
        if algorithm not in (self._settings.algorithms or ALGORITHMS):
            raise Unauthenticated("alg")
        keys = self._keys
        if self._jwks is not None and (kid is None or all(key.kid != kid for key in keys)):
            keys += await self._jwks.keys(kid)
        named = [key for key in keys if kid is None or key.kid == kid]
        if not named:
            raise Unauthenticated("kid")
        found = [key for key in named if key.algorithm == algorithm]
        if not found:
            raise Unauthenticated("alg")
        return found


class Everybody:
    """Takes every caller for an admin. Only for trials, on a server that listens on loopback.

    Args:
        clock: seconds since 1970.
    """

    open_to_all: Final = True
    cluster: str | None = None

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    async def verify(self, token: str) -> Identity:
        """The admin `dev`, whatever the token is."""
        return Identity("dev", Role.ADMIN, "dev", self._clock() + 3600)

    async def still(self, identity: Identity) -> None:
        """Everybody stays."""

    async def aclose(self) -> None:
        """Nothing to release."""


def verifier_for(
    auth: AuthSettings,
    server: ServerSettings,
    *,
    denied: Denied | None = None,
    endpoints: EndpointSettings | None = None,
    clock: Callable[[], float] = time.time,
) -> TokenVerifier:
    """What a server with these settings asks who calls: the keys, or nobody with `dev` and no key.

    Raises:
        InvalidArgument: no key, and not `dev` on loopback; or a key that cannot be used.
    """
    if server.dev and not auth.keyed:
        if not loopback(server.host):
            raise InvalidArgument("dev", True, "only on a loopback address")
        return Everybody(clock)
    return Verifier.from_settings(auth, denied=denied, endpoints=endpoints, clock=clock)
