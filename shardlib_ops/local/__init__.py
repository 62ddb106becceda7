"""Real PostgreSQL and etcd servers from wheels, started on this machine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shardlib_ops.local.cluster import LocalCluster
    from shardlib_ops.local.etcd import LocalEtcd
    from shardlib_ops.local.postgres import LocalServer

__all__ = ["LocalCluster", "LocalEtcd", "LocalServer"]

_HOMES: Final = {"LocalCluster": "cluster", "LocalEtcd": "etcd", "LocalServer": "postgres"}


def __getattr__(name: str) -> object:
    # At first use: the watchdog of a cluster lives in this package and must start in a moment.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
