"""Operators' side of shardlib: shards and jobs are made and steered, rows are moved; servers for tests and trials.

Names are loaded at their first use: a command's `--help`, or a test run without servers, pays for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardlib_ops.health.controller import HealthController
    from shardlib_ops.local import LocalCluster
    from shardlib_ops.manager.bootstrap import NewShard, create_cluster
    from shardlib_ops.manager.manager import Manager
    from shardlib_ops.reshard.resharder import Resharder

__all__ = ["HealthController", "LocalCluster", "Manager", "NewShard", "Resharder", "create_cluster"]


def __getattr__(name: str) -> object:
    if name == "HealthController":
        from shardlib_ops.health.controller import HealthController

        return HealthController
    if name == "LocalCluster":
        from shardlib_ops.local import LocalCluster

        return LocalCluster
    if name == "Manager":
        from shardlib_ops.manager.manager import Manager

        return Manager
    if name in ("NewShard", "create_cluster"):
        from shardlib_ops.manager import bootstrap

        return getattr(bootstrap, name)
    if name == "Resharder":
        from shardlib_ops.reshard.resharder import Resharder

        return Resharder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
