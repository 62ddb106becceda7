"""A URL becomes a catalog."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from shardlib.catalog.base import POLL_S, Catalog
from shardlib.catalog.memory import MemoryStore
from shardlib.catalog.store import Store
from shardlib.catalog.stored import StoredCatalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument

__all__ = ["open_catalog"]

_FORMS: Final = (
    "etcd://[user:password@]host:port[,host:port...]/name (etcds:// for TLS), "
    "postgresql://.../database?catalog=name, or memory://name"
)
_FILES: Final = ("ca", "cert", "key", "server_name")


def open_catalog(url: str, *, timeout_s: float = 3.0, poll_s: float = POLL_S) -> Catalog:
    """The catalog at a URL. Nothing is connected yet.

    ::

        etcd://[user:password@]host:port[,host:port...]/name
        etcds://...?ca=/path&cert=/path&key=/path&server_name=etcd.internal     TLS, files in PEM
        postgresql://user:password@host:port/database?catalog=name              `default` if no catalog is named
        memory://name                                                           shared by this process

    Args:
        url: user and password are percent-encoded. The password may be a reference, `env:NAME` or `file:/path`
            (`file:%2Fpath` in an etcd URL), which is read anew for each login.
        timeout_s: longest time for each call; a topology of many megabytes gets more for its chunks.
        poll_s: seconds between two reads of the head by a watch, beside its stream.

    Raises:
        InvalidArgument: not such a URL. The message never holds a password.
    """
    if not isinstance(url, str):
        # Of another object only the type, since it may hold a password.
        raise InvalidArgument("url", None if url is None else type(url).__name__, _FORMS)
    scheme = url.split("://", 1)[0] if "://" in url else ""
    if scheme == "memory":
        name = url.removeprefix("memory://").rstrip("/")
        if not name or "/" in name or "?" in name or "@" in name:
            raise InvalidArgument("url", _shown(url), "memory://name, a name without / ? @")
        return StoredCatalog(MemoryStore(name), timeout_s=timeout_s, poll_s=poll_s)
    if scheme in ("postgresql", "postgres"):
        return StoredCatalog(_postgres(url), timeout_s=timeout_s, poll_s=poll_s)
    if scheme in ("etcd", "etcds"):
        return StoredCatalog(_etcd(url, tls=scheme == "etcds"), timeout_s=timeout_s, poll_s=poll_s)
    raise InvalidArgument("url", f"{scheme}://..." if scheme.isalnum() else "***", _FORMS)


def _postgres(url: str) -> Store:
    base, _, query = url.partition("?")
    name, kept = "default", []
    for part in query.split("&") if query else ():
        key, _, value = part.partition("=")
        if unquote(key) == "catalog":
            name = unquote(value)
        else:
            kept.append(part)  # as it is written: libpq takes a + for a plus
    if not name or len(name) > 200:
        raise InvalidArgument("catalog", name, "1 to 200 characters")
    dsn = Dsn(f"{base}?{'&'.join(kept)}" if kept else base)
    from shardlib.catalog.postgres import PostgresStore

    return PostgresStore(dsn, name)


def _etcd(url: str, *, tls: bool) -> Store:
    from shardlib.catalog.etcd import EtcdStore, EtcdTarget

    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise InvalidArgument("url", f"{'etcds' if tls else 'etcd'}://***", _FORMS) from None
    login, _, hosts = parts.netloc.rpartition("@")
    user, colon, password = login.partition(":")
    name = parts.path.strip("/")
    endpoints = tuple(_endpoint(text) for text in hosts.split(","))
    if not name or not all(endpoints) or bool(login) != bool(user and colon and password):
        raise InvalidArgument("url", _shown(url), _FORMS)
    if unknown := set(options) - set(_FILES):
        raise InvalidArgument("url", f"?{min(unknown)}=...", f"an etcd URL knows {', '.join(_FILES)}")
    files = {key: values[-1] for key, values in options.items()}
    if files and not tls:
        raise InvalidArgument("url", f"?{min(files)}=...", "TLS options need an etcds:// URL")
    if ("cert" in files) != ("key" in files):
        raise InvalidArgument("url", "?cert=... or key=... alone", "a client certificate needs both cert and key")
    return EtcdStore(
        EtcdTarget(
            endpoints=endpoints,
            name=unquote(name),
            user=unquote(user),
            password=unquote(password),
            tls=tls,
            **files,
        )
    )


def _shown(url: str) -> str:
    """A wrong URL as far as no part of it can be a password: without a login, and with nothing like one."""
    scheme, _, rest = url.partition("://")
    hosts, slash, name = rest.partition("/")
    plain = "@" not in unquote(rest) and all(":" not in part or _endpoint(part) for part in hosts.split(","))
    return f"{scheme}://{hosts}{slash}{name.partition('?')[0]}" if plain and ":" not in name else f"{scheme}://***"


def _endpoint(text: str) -> str:
    """`host:port` if it is that, else an empty string. An IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        return ""
    return text if host.startswith("[") == host.endswith("]") and (host[0] == "[" or ":" not in host) else ""
