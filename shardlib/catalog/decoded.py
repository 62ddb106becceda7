"""Topologies that live in this process, by the bytes of the head that they were read from.

A head holds the digest of every chunk, so equal heads mean equal topologies, whichever catalog they came from. Two
engines of a process, one of them asynchronous perhaps, read each version once and hold it once.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakValueDictionary

from shardlib.topology import Topology
from shardlib.topology.codec import Head

__all__ = ["Decoded", "find", "share"]


class Decoded:
    """A head as it is stored, as it reads, and the topology that it stands for."""

    __slots__ = ("__weakref__", "data", "head", "topology")

    def __init__(self, data: bytes, head: Head, topology: Topology) -> None:
        self.data, self.head, self.topology = data, head, topology


_live: Final[WeakValueDictionary[bytes, Decoded]] = WeakValueDictionary()


def find(data: bytes) -> Decoded | None:
    """What another catalog of this process has read from the same bytes and still holds."""
    return _live.get(data)


def share(decoded: Decoded) -> None:
    """Let other catalogs of this process find it; only for what was read and checked, not for what was published."""
    _live[decoded.data] = decoded
