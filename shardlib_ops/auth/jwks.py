"""Keys that another issuer publishes at an address (JWKS), fetched with bounds on time, size and place."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import httpx

from shardlib.errors import InvalidArgument
from shardlib_ops.auth.keys import Key, keys_of_document
from shardlib_ops.settings import AuthSettings, EndpointSettings, allowed_endpoint_async

__all__ = ["Jwks"]

_LOG = logging.getLogger("shardlib.ops.auth")

FETCH_S: Final = 5.0
BYTES_MAX: Final = 256 * 1024
REFRESH_S: Final = 300.0
UNKNOWN_KID_S: Final = 60.0
"""Least pause between two fetches that an unknown key id has asked for, in seconds: anybody can name one."""


class Jwks:
    """The keys at `settings.jwks_url`.

    They are fetched at first need, again every five minutes, and when a token names a key that is not among them, at
    most once a minute. While the address does not answer, the last keys count for `jwks_stale_max_s`.

    Args:
        settings: address, algorithms, and how long old keys count.
        endpoints: which addresses may be connected to.
        monotonic: seconds of a clock that nobody sets.
        verify: checks the certificate of the address; the system's authorities if left out.
    """

    def __init__(
        self,
        settings: AuthSettings,
        endpoints: EndpointSettings,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        if settings.jwks_url is None:
            raise InvalidArgument("auth.jwks_url", None, "an address")
        self._url, self._endpoints, self._settings = settings.jwks_url, endpoints, settings
        self._monotonic, self._verify = monotonic, verify
        self._keys: tuple[Key, ...] = ()
        self._fetched_at = self._tried_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self.fetches = 0

    async def keys(self, kid: str | None) -> tuple[Key, ...]:
        """The keys that count now; fetched before if there are none, or if none has this id."""
        known = self._believed()
        if known and (kid is None or any(key.kid == kid for key in known)):
            if self._monotonic() - self._fetched_at > REFRESH_S and self._due(UNKNOWN_KID_S):
                self._fetch_soon()  # nobody waits for it: the keys that are here still count
            return known
        if self._due(UNKNOWN_KID_S):
            self._fetch_soon()
        if self._fetching is not None:
            await asyncio.wait([self._fetching], timeout=FETCH_S + 1)
        return self._believed()

    async def aclose(self) -> None:
        """End a fetch that is under way; idempotent."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching], timeout=FETCH_S)

    def _believed(self) -> tuple[Key, ...]:
        old = self._monotonic() - self._fetched_at > max(self._settings.jwks_stale_max_s, REFRESH_S)
        return () if old else self._keys

    def _due(self, pause_s: float) -> bool:
        return self._fetching is None and self._monotonic() - self._tried_at >= pause_s

    def _fetch_soon(self) -> None:
        self._tried_at = self._monotonic()
        self._fetching = asyncio.get_running_loop().create_task(self._fetch())

    async def _fetch(self) -> None:
        self.fetches += 1
        try:
            async with asyncio.timeout(FETCH_S):
                found = keys_of_document(json.loads(await self._download()), self._settings.algorithms)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's document leads to, the old keys still count
            _LOG.warning("the keys at auth.jwks_url cannot be fetched: %s", _why(error))
        else:
            if found:
                self._keys, self._fetched_at = found, self._monotonic()
            else:
                _LOG.warning("the document at auth.jwks_url holds no key that can be used")
        finally:
            self._fetching = None

    async def _download(self) -> bytes:
        # The connection goes to the address that was checked: a name could lead elsewhere the next time it is asked.
        parts = urlsplit(self._url)
        host = parts.hostname or ""
        allowed = await allowed_endpoint_async(self._url, self._endpoints)
        address = f"[{allowed.addresses[0]}]" if ":" in allowed.addresses[0] else allowed.addresses[0]
        place = address if parts.port is None else f"{address}:{parts.port}"
        url = urlunsplit((parts.scheme, place, parts.path or "/", parts.query, ""))
        body = bytearray()
        async with (
            httpx.AsyncClient(timeout=FETCH_S, follow_redirects=False, trust_env=False, verify=self._verify) as client,
            client.stream(
                "GET",
                url,
                headers={
                    "Host": parts.netloc.rpartition("@")[2],
                    "Accept": "application/json",
                    "Accept-Encoding": "identity",
                },
                extensions={"sni_hostname": host},
            ) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"it answers with status {response.status_code}")
            # As sent: what is packed could be a thousand times as large before its size is seen.
            async for part in response.aiter_raw():
                body += part
                if len(body) > BYTES_MAX:
                    raise ValueError(f"it sends more than {BYTES_MAX} bytes")
        return bytes(body)


def _why(error: BaseException) -> str:
    # What httpx or a parser says may hold a part of the URL or of the document.
    return str(error) if type(error) in (ValueError, InvalidArgument) else type(error).__name__
