"""The last topology on disk, for an application that starts while the catalog is away."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from shardlib.topology import Topology
from shardlib.topology.codec import dump, parse

__all__ = ["read_file", "write_file"]


def write_file(path: Path, topology: Topology) -> None:
    """Replace the file by one with this topology, as a whole or not at all, also when the machine stops.

    Only its owner may read it: it holds the DSNs with their passwords.

    Raises:
        OSError: the file cannot be written.
    """
    data = dump(topology)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_file(path: Path) -> Topology | None:
    """The saved topology, None if there is no such file.

    Raises:
        InvalidTopology: the file is damaged or not of shardlib.
        OSError: the file cannot be read.
    """
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
