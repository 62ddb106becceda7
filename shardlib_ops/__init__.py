"""Operators' side of shardlib: real servers on this machine for tests and trials.

Names are loaded at their first use: a command's `--help`, or a test run without servers, pays for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardlib_ops.local import LocalCluster

__all__ = ["LocalCluster"]


def __getattr__(name: str) -> object:
    if name == "LocalCluster":
        from shardlib_ops.local import LocalCluster

        return LocalCluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
