"""Tokens that were verified a moment ago, so that a caller with thousands of requests is checked once a minute."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from shardlib_ops.auth.model import Identity, Unauthenticated
from shardlib_ops.auth.verifier import TokenVerifier

__all__ = ["Remembered"]

KEEP_S: Final = 60.0
TOKENS_MAX: Final = 10_000


class Remembered:
    """A verifier that remembers what another one has believed.

    A remembered token is still refused once it has expired, and as soon as the list of denied tokens tells. A key
    that is withdrawn ends its tokens within `keep_s`. Tokens are remembered by their hash only.

    Args:
        inner: checks what is new; closed with this one.
        keep_s: how long a signature counts without being looked at again, in seconds.
        monotonic: seconds of a clock that nobody sets.
    """

    def __init__(
        self, inner: TokenVerifier, *, keep_s: float = KEEP_S, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._inner, self._keep_s, self._monotonic = inner, keep_s, monotonic
        self._known: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()

    @property
    def cluster(self) -> str | None:
        """The cluster that is served."""
        return self._inner.cluster

    @property
    def open_to_all(self) -> bool:
        """Whether a caller needs no token."""
        return self._inner.open_to_all

    async def verify(self, token: str) -> Identity:
        """Whom a token names.

        Raises:
            Unauthenticated: it is not believed, or not any more.
        """
        key = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(key)
        now = self._monotonic()
        if known is not None and now < known[1]:
            try:
                await self._inner.still(known[0])
            except Unauthenticated as refused:
                if refused.unavailable:
                    raise
                self._known.pop(key, None)  # the other verifier says why, and allows for clocks that differ
            else:
                return known[0]
        identity = await self._inner.verify(token)
        self._known.pop(key, None)
        self._known[key] = (identity, now + self._keep_s)
        if len(self._known) > TOKENS_MAX:
            self._known.popitem(last=False)
        return identity

    async def still(self, identity: Identity) -> None:
        """Look again at somebody who was let in before.

        Raises:
            Unauthenticated: the token has expired or is denied by now.
        """
        await self._inner.still(identity)

    async def aclose(self) -> None:
        """Release what the other verifier holds; idempotent."""
        self._known.clear()
        await self._inner.aclose()
