"""How much one request, caller or address may take: bodies, their depth, their time, and rates."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from shardlib_ops.serving.problem import problem
from shardlib_ops.serving.requests import Scope, header
from shardlib_ops.settings import LimitSettings

__all__ = ["ClientGone", "RateLimiter", "address_key", "has_body", "json_too_deep", "read_body"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Possessive, and content with the end of the text: a body of nothing but quotes must not be read again and again.
_STRINGS: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_CLOSE: Final = {"Connection": "close"}


class ClientGone(Exception):  # noqa: N818 - nobody waits for an answer any more
    """The client has closed the connection before its request was complete."""


class RateLimiter:
    """A token bucket for each key: so many at once, and so many a minute after that.

    At most `keys_max` keys are kept, the least recently seen ones go.

    Args:
        per_minute: size of a bucket, and what flows into it in a minute.
        monotonic: seconds of a clock that nobody sets.
        keys_max: bound on the memory that strangers can take.
    """

    def __init__(
        self, per_minute: int, *, monotonic: Callable[[], float] = time.monotonic, keys_max: int = 20_000
    ) -> None:
        self._size, self._per_s, self._monotonic, self._keys_max = (
            float(per_minute),
            per_minute / 60,
            monotonic,
            keys_max,
        )
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> float:
        """Take one: 0.0 if there was one, else seconds until there is."""
        now = self._monotonic()
        level, at = self._buckets.pop(key, (self._size, now))
        level = min(self._size, level + (now - at) * self._per_s)
        taken = level >= 1
        self._buckets[key] = (level - 1 if taken else level, now)
        while len(self._buckets) > self._keys_max:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1 - level) / self._per_s

    def __len__(self) -> int:
        return len(self._buckets)


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def address_key(address: str) -> str:
    """The key of an address: of IPv6 the network of 64 bits, since one host has all the addresses in it."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if found.version == 4 else str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))


def has_body(scope: Scope) -> bool:
    """Whether a body follows the head of the request."""
    length = header(scope, b"content-length")
    return header(scope, b"transfer-encoding") is not None or (length is not None and length.strip(b"0") != b"")


async def read_body(scope: Scope, receive: Receive, limits: LimitSettings) -> bytes:
    """The whole body; reading stops at the first byte too many.

    Raises:
        Problem: it is too large (413), comes too slowly (408), or is nested too deep (422).
        ClientGone: the client did not wait for the answer.
    """
    length = header(scope, b"content-length")
    if length is not None and (not length.isdigit() or len(length) > 18 or int(length) > limits.body_bytes):
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        detail = f"the body did not come within {limits.body_timeout_s:g} s"
        raise problem("request-timeout", detail, headers=_CLOSE) from None
    found = bytes(body)
    if json_too_deep(found, limits.json_depth):
        raise problem("invalid", f"the body is nested deeper than {limits.json_depth} levels, or is not JSON")
    return found


def json_too_deep(body: bytes, depth_max: int) -> bool:
    """Whether lists and objects lie in each other deeper than allowed, told without parsing.

    Each round takes the innermost pairs away; what is left after `depth_max` rounds was deeper, or has no pair. Costs
    a few passes over the body at the speed of C.
    """
    if body.count(b"[") + body.count(b"{") <= depth_max:
        return False
    left = _STRINGS.sub(b"", body).translate(None, _NOT_BRACKETS)
    for _ in range(depth_max):
        before = len(left)
        # Marked first, so that one round takes one level and not what lies around it too.
        left = left.replace(b"[]", b"x").replace(b"{}", b"x").replace(b"x", b"")
        if len(left) == before:
            break
    return bool(left)


def _too_large(limits: LimitSettings) -> Exception:
    return problem("body-too-large", f"at most {limits.body_bytes} bytes", headers=_CLOSE)
