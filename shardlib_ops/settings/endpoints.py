"""Which servers a caller may name: schemes, parameters and addresses, looked at after names are resolved.

Whoever may name an endpoint makes this process connect to it. The metadata service of a cloud, say, answers every
process of a machine, and must not be reachable by a name in a request (OWASP API7, server side request forgery).
"""

from __future__ import annotations

import asyncio
import ipaddress
import posixpath
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from shardlib.errors import InvalidArgument
from shardlib_ops.settings.model import EndpointSettings

__all__ = ["AllowedEndpoint", "Resolve", "allowed_endpoint", "allowed_endpoint_async", "refused_address"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str], Iterable[str]]

_METADATA: Final = frozenset(
    map(ipaddress.ip_address, ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"))
)
"""Of AWS, GCP and Azure; AWS by IPv6; Alibaba; Oracle; the wire server of Azure."""

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_POSTGRESQL: Final = ("postgresql", "postgres")


class AllowedEndpoint(NamedTuple):
    """An endpoint that may be connected to.

    Attributes:
        hosts: names or addresses, as given.
        addresses: what they stand for now. A client that connects to one of them cannot be led elsewhere by a name
            server that answers otherwise the next time.
    """

    hosts: tuple[str, ...]
    addresses: tuple[str, ...]


def allowed_endpoint(text: str, settings: EndpointSettings, *, resolve: Resolve | None = None) -> AllowedEndpoint:
    """Check a DSN or URL that a caller has named. Blocks while names are resolved.

    Args:
        text: a PostgreSQL DSN in either form, or a URL.
        settings: what is allowed.
        resolve: the addresses of a name; those of the system's resolver if left out.

    Raises:
        InvalidArgument: it is not allowed. The message holds the host, and neither the rest of the text nor an address
            that only the resolver of this process knows.
    """
    dsn = _is_dsn(text)
    hosts, addresses = _postgresql(text, settings) if dsn else _url(text, settings)
    for host in hosts:
        if host.startswith(("/", "@")):
            if not settings.sockets:
                raise _refused(host, "a server is named by a host, not by a folder of sockets")
            continue
        addresses += [(host, address) for address in _resolved(host, resolve or _system)]
    for host, address in addresses:
        if why := refused_address(address, settings):
            raise _refused(host, why)
    if dsn and settings.sslmodes and not all(_within(address).is_loopback for _, address in addresses):
        sslmode = str(conninfo_to_dict(text).get("sslmode") or "")
        if sslmode not in settings.sslmodes:
            raise _refused(hosts[0], f"its sslmode is {' or '.join(settings.sslmodes)} (endpoints.sslmodes)")
    return AllowedEndpoint(tuple(hosts), tuple(dict.fromkeys(str(address) for _, address in addresses)))


async def allowed_endpoint_async(text: str, settings: EndpointSettings) -> AllowedEndpoint:
    """`allowed_endpoint` without blocking the event loop."""
    return await asyncio.to_thread(allowed_endpoint, text, settings)


def refused_address(address: Address, settings: EndpointSettings) -> str | None:
    """Why an address may not be connected to, None if it may."""
    address = _within(address)
    if address in _METADATA:
        return "the metadata service of a cloud is never a shard"
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return "link-local, multicast and unspecified addresses are not allowed"
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:
        return "site-local addresses are not allowed"
    if address.is_loopback and not settings.loopback:
        return "this machine itself is not allowed (endpoints.loopback)"
    if settings.networks and not any(address in network for network in settings.networks):
        return "it is in none of the allowed networks (endpoints.networks)"
    return None


def _within(address: Address) -> Address:
    """The IPv4 address that an IPv6 address carries, or the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.scope_id is not None:
            return ipaddress.IPv6Address(int(address))
    return address


def _is_dsn(text: str) -> bool:
    scheme, separator, _ = text.partition("://")
    return not separator or "=" in scheme or scheme in _POSTGRESQL


def _postgresql(text: str, settings: EndpointSettings) -> tuple[list[str], list[tuple[str, Address]]]:
    if not set(_POSTGRESQL) & set(settings.schemes):
        raise _refused("***", "PostgreSQL endpoints are not allowed (endpoints.schemes)")
    try:
        given: dict[str, Any] = conninfo_to_dict(text)
    except (ProgrammingError, UnicodeError):
        given = {}
    hosts = [host for host in str(given.get("host") or "").split(",") if host]
    if not hosts:
        raise _refused("***", "a DSN names its host, as in postgresql://user@host:port/database")
    if unknown := sorted(set(given) - set(settings.parameters)):
        raise _refused(hosts[0], f"the parameter {', '.join(unknown)} is not allowed (endpoints.parameters)")
    password = str(given.get("password") or "")
    # An encrypted one is of use for this very DSN only.
    if password.startswith(("env:", "file:", "exec:")) and not _referable(password, settings):
        raise _refused(hosts[0], "its password is a reference that is not allowed (endpoints.references)")
    # libpq connects to these, whatever the hosts are.
    addresses = [(each, _address(each)) for each in str(given.get("hostaddr") or "").split(",") if each]
    return hosts, addresses


def _referable(password: str, settings: EndpointSettings) -> bool:
    kind, _, name = password.partition(":")
    if kind == "file" and posixpath.normpath(name) != name:
        return False  # with `..` in it, a path does not lie where it begins
    return any(password.startswith(prefix) for prefix in settings.references)


def _url(text: str, settings: EndpointSettings) -> tuple[list[str], list[tuple[str, Address]]]:
    try:
        parts = urlsplit(text)
        host, scheme = parts.hostname, parts.scheme
    except ValueError:
        host, scheme = None, ""
    if scheme not in settings.schemes:
        shown = scheme if scheme.isalnum() else "***"
        raise _refused(shown, f"the scheme is one of {', '.join(settings.schemes)} (endpoints.schemes)")
    if not host:
        raise _refused("***", "a URL names its host")
    return [host], []


def _resolved(host: str, resolve: Resolve) -> list[Address]:
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass  # a name
    try:
        found = list(resolve(host))
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise _refused(host, "no address is known for this name")
    return [_address(each) for each in found]


def _system(host: str) -> list[str]:
    # Also what a libc makes of `127.1`, `0x7f000001` and `2130706433`: the client would connect there.
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise _refused(text, "it is no IP address") from None


def _refused(host: str, why: str) -> InvalidArgument:
    return InvalidArgument("endpoint", host, why)
