"""A URL becomes an audit log."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import unquote

from shardlib.catalog import Catalog
from shardlib.errors import InvalidArgument
from shardlib_ops.audit.base import AuditStore
from shardlib_ops.audit.in_catalog import CatalogAudit
from shardlib_ops.audit.in_file import FileAudit
from shardlib_ops.audit.in_postgres import PostgresAudit

__all__ = ["open_audit"]

_FORMS: Final = "catalog: (beside the topology), postgresql://.../database?log=name, or file:/path"


def open_audit(url: str, catalog: Catalog | None = None, *, timeout_s: float = 10.0) -> AuditStore:
    """The audit log at a URL. Nothing is connected, and no file made, yet.

    ::

        catalog:                                          in the catalog, beside the topology
        postgresql://user:password@host/database?log=name `default` if no log is named
        file:/path                                        lines of JSON

    Args:
        url: a password in it may be a reference, as in a DSN.
        catalog: for `catalog:`; whoever hands it in closes it.
        timeout_s: longest time for an entry.

    Raises:
        InvalidArgument: not such a URL, or no catalog was given. The message never holds a password.
    """
    if url == "catalog:":
        if catalog is None:
            raise InvalidArgument("audit", url, "a log in the catalog needs the catalog's URL")
        return CatalogAudit(catalog, timeout_s=timeout_s)
    if url.startswith(("postgresql://", "postgres://")):
        return PostgresAudit(url, timeout_s=timeout_s)
    if url.startswith("file:"):
        path = Path(unquote(url.removeprefix("file://").removeprefix("file:")))
        if not path.is_absolute() or not path.name or "\0" in str(path):
            raise InvalidArgument("audit", url, "file:/path, the whole path of a file")
        return FileAudit(path, timeout_s=timeout_s)
    scheme = url.split(":", 1)[0]
    raise InvalidArgument("audit", f"{scheme}:..." if scheme.isalnum() and scheme != url else "***", _FORMS)
