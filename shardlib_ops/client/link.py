"""The way to a manager: one connection pool, a token that is read again when it is refused, and bounded retries."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import random
import ssl
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from shardlib.errors import InvalidArgument
from shardlib_ops.client.errors import ManagerRefused, ManagerUnavailable
from shardlib_ops.client.problems import AT_WORK, error_of, passing

__all__ = ["Link", "Reach"]

_LOG = logging.getLogger("shardlib.ops.client")

PREFIX: Final = "/api/v1"
CONNECT_S: Final = 5.0
ANSWER_S: Final = 180.0
"""Longer than a manager takes for any call: it looks at servers first, each within limits of its own."""
RETRY_S: Final = 30.0
"""For so long after the first failure the same is asked again."""
PAUSE_S: Final = 0.2
PAUSE_MAX_S: Final = 5.0
UNAUTHENTICATED: Final = 401
TOKEN_MAX: Final = 16_384


@dataclass(frozen=True)
class Reach:
    """How a manager is reached.

    Attributes:
        url: `https://host:8081`; `http://` on this machine only.
        token: a bearer token; never shown.
        token_file: a file with one, which is read again when the token does not count any more.
        ca_file: PEM of the authorities that are believed; None for those of this machine.
        cert_file: PEM of a client's certificate, for mutual TLS.
        key_file: PEM of its key; None if it stands in `cert_file`.
        retry_s: for so long after the first failure the same is asked again.
    """

    url: str
    token: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    retry_s: float = RETRY_S

    def __repr__(self) -> str:
        return f"Reach({self.url!r})"


class Link:
    """Requests to one manager. Nothing is connected before the first.

    Every POST has an `Idempotency-Key` of its own, which stays the same however often it has to be sent: what was done
    once is not done again.

    Raises:
        InvalidArgument: a URL that is none or would send the token in the open, or a file that cannot be used.
    """

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self.url = _checked(reach.url)
        self._token = (
            _read_token(reach.token_file) if reach.token_file is not None else _sane("SHARDLIB_TOKEN", reach.token)
        )
        self._command, self._posts = uuid.uuid4().hex, 0
        self._client = httpx.AsyncClient(
            base_url=self.url + PREFIX,
            verify=_tls(reach),
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            follow_redirects=False,
            trust_env=False,  # a proxy or a .netrc of the environment would get to see the token
            headers={"Accept": "application/json", "User-Agent": "shardlib-ops"},
        )

    async def close(self) -> None:
        """Close the connections; idempotent."""
        await self._client.aclose()

    async def get(self, path: str, **params: Any) -> Any:
        """The JSON of an answer."""
        return await self._send("GET", path, params=params)

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, given: Mapping[str, Any] | None = None
    ) -> Any:
        """Ask for something, once; the JSON of the answer. `given` are values that an error may name besides."""
        self._posts += 1
        return await self._send("POST", path, body=body, key=f"{self._command}-{self._posts}", given=given)

    async def delete(self, path: str) -> None:
        """Ask that something is taken away."""
        await self._send("DELETE", path)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        key: str | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Any:
        asked, failed_at, pause_s, lost, renewed = f"{method} {path}", 0.0, PAUSE_S, False, False
        while True:
            wait_s = 0.0
            try:
                answer = await self._client.request(
                    method, path, params=params or None, json=body, headers=self._headers(key)
                )
            except httpx.TransportError as error:
                if (fault := _tls_fault(error)) is not None:
                    raise ManagerRefused(
                        self.url, fault, "look at --ca-file, --cert-file and the name in the URL"
                    ) from None
                lost = lost or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
                last: Exception = ManagerUnavailable(self.url, _said(error), begun=lost and method != "GET")
                patience_s = self._reach.retry_s
            else:
                if answer.is_success:
                    return answer.json() if answer.content else None
                if answer.status_code == UNAUTHENTICATED and not renewed and self._renew():
                    renewed = True
                    continue
                content = _content(answer)
                if method == "DELETE" and lost and answer.status_code == httpx.codes.NOT_FOUND:
                    return None  # an answer that was lost had done it
                last = error_of(
                    self.url, answer.status_code, content, asked=asked, given={**(given or {}), **(body or {})}
                )
                after = answer.headers.get("Retry-After", "")
                if not passing(answer.status_code, content, retry_after=bool(after)):
                    raise last
                wait_s = float(after) if after.isdigit() else 0.0
                # The request itself is still at work there, and has its own limits.
                patience_s = ANSWER_S if answer.status_code == AT_WORK else self._reach.retry_s
            now = time.monotonic()
            failed_at = failed_at or now
            wait_s = max(wait_s, pause_s * (0.5 + random.random() / 2))  # noqa: S311 - jitter
            if now + wait_s - failed_at > patience_s:
                raise last
            _LOG.warning("%s; %s is asked again in %.1f s", last, asked, wait_s)
            await asyncio.sleep(wait_s)
            pause_s = min(PAUSE_MAX_S, pause_s * 2)

    def _headers(self, key: str | None) -> dict[str, str]:
        found = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        return found if key is None else {**found, "Idempotency-Key": key}

    def _renew(self) -> bool:
        """Read the token's file again; whether it is another one now."""
        if self._reach.token_file is None:
            return False
        before, self._token = self._token, _read_token(self._reach.token_file)
        return self._token != before


def _checked(text: str) -> str:
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise InvalidArgument("manager", "***", "https://host:8081, without a user or a password")
    shown = str(url).rstrip("/")
    if url.scheme == "http" and not _here(url.host):
        raise InvalidArgument("manager", shown, "https://...: the token would cross the network unencrypted")
    return shown


def _here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tls(reach: Reach) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for name, path in (("ca_file", reach.ca_file), ("cert_file", reach.cert_file), ("key_file", reach.key_file)):
        if path is not None and not os.access(path, os.R_OK):
            raise InvalidArgument(name, str(path), "a PEM file that can be read")
    if reach.ca_file is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(reach.ca_file)
        except ssl.SSLError:
            raise InvalidArgument("ca_file", str(reach.ca_file), "a PEM file of certificates") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if reach.cert_file is None:
        if reach.key_file is not None:
            raise InvalidArgument("key_file", str(reach.key_file), "only beside a cert_file")
        return context
    try:
        context.load_cert_chain(reach.cert_file, reach.key_file, password=_no_password)
    except (ssl.SSLError, ValueError):
        wanted = "a PEM file with a certificate, and its key in it or in key_file, without a passphrase"
        raise InvalidArgument("cert_file", str(reach.cert_file), wanted) from None
    return context


def _no_password() -> str:
    """Instead of asking at the terminal."""
    raise ValueError("the key has a passphrase")


def _read_token(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("token_file", str(path), f"a file with a token ({type(error).__name__})") from None
    found = _sane("token_file", text.strip())
    if found is None:
        raise InvalidArgument("token_file", str(path), "a file with a token; it is empty")
    return found


def _sane(name: str, token: str | None) -> str | None:
    """A token that can stand in a header. The message never holds it."""
    if not token:
        return None
    if len(token) > TOKEN_MAX or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidArgument(name, "***", "a token as `shardlib-ops token issue` prints it")
    return token


def _content(answer: httpx.Response) -> dict[str, Any]:
    """The problem document of an answer; empty for another page."""
    if answer.headers.get("Content-Type", "").partition(";")[0].strip() != "application/problem+json":
        return {}
    try:
        found = json.loads(answer.content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tls_fault(error: BaseException) -> str | None:
    """What TLS refuses; None for anything that may pass."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return f"its certificate is not believed ({seen.verify_message})"
        if isinstance(seen, ssl.SSLError) and not isinstance(seen, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return f"TLS: {seen.reason or type(seen).__name__}"
        seen = seen.__cause__ or seen.__context__
    return None


def _said(error: httpx.TransportError) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
