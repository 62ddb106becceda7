"""What is known of a request before anybody has looked into it: its id, and who sent it from where."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import secrets
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from shardlib_ops.auth.model import Identity, Unauthenticated
from shardlib_ops.settings.model import Network

__all__ = ["RequestInfo", "client_address", "header", "request_id_of", "request_info"]

Scope = MutableMapping[str, Any]

_KEY: Final = "shardlib_ops.request"
_ID: Final = re.compile(rb"[A-Za-z0-9._-]{8,64}")
_HOPS_MAX: Final = 20


@dataclass(slots=True)
class RequestInfo:
    """One request.

    Attributes:
        request_id: the caller's `X-Request-Id` if it is sane, else one of ours.
        address: of the client, as trusted proxies tell it.
        identity: whom its token names, None without a token that is believed.
        failure: why its token is not believed, None if there is none or it is.
        error_id: of an error that nobody expected.
        deadline: when the request is answered with 504; `allow` moves it.
    """

    request_id: str
    address: str
    identity: Identity | None = None
    failure: Unauthenticated | None = None
    error_id: str | None = None
    deadline: asyncio.Timeout | None = None

    def allow(self, seconds: float | None) -> None:
        """Give the request so many seconds from now; None takes its time limit away, for a stream."""
        if self.deadline is not None and not self.deadline.expired():
            loop = asyncio.get_running_loop()
            self.deadline.reschedule(None if seconds is None else loop.time() + seconds)


def request_info(scope: Scope) -> RequestInfo:
    """What is known of the request; made from the connection alone where no `Shell` stands before the application."""
    found = scope.get(_KEY)
    if not isinstance(found, RequestInfo):
        found = scope[_KEY] = RequestInfo(request_id_of(scope), client_address(scope, ()))
    return found


def put_info(scope: Scope, info: RequestInfo) -> None:
    """Keep what is known of a request with it."""
    scope[_KEY] = info


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of a name (in lower case), None if there is none."""
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


def request_id_of(scope: Scope) -> str:
    """The caller's id for the request, or a new one: it is printed, and must not be able to forge a line of a log."""
    given = header(scope, b"x-request-id")
    if given is not None and _ID.fullmatch(given):
        return given.decode("ascii")
    return secrets.token_hex(12)


def client_address(scope: Scope, trusted: Iterable[Network]) -> str:
    """The address of who asks.

    `X-Forwarded-For` is read from its end, and only as far as the addresses in it are those of trusted proxies: what
    stands before them was written by the caller. `X-Real-IP` and `Forwarded` are not read.
    """
    peer = scope.get("client")
    address = _address(peer[0]) if peer else None
    if address is None:
        return "unknown"
    networks = tuple(trusted)
    if networks and any(address in network for network in networks):
        given = b",".join(value for key, value in scope["headers"] if key == b"x-forwarded-for")
        for hop in reversed(given.decode("latin-1").split(",")[-_HOPS_MAX:]):
            found = _address(hop.strip())
            if found is None:
                break
            address = found
            if not any(address in network for network in networks):
                break
    return str(address)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = getattr(found, "ipv4_mapped", None)
    return mapped if mapped is not None else found
