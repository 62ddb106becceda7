"""The register of running clusters: what a killed owner leaves is found by it and cleaned away.

Needs nothing but the standard library, since the watchdog starts with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from shardlib_ops.local import places
from shardlib_ops.local.process import free_shared_memory, kill_all, running_in, started_at

__all__ = ["Entry", "OccupiedError", "clean", "clean_abandoned", "enter", "entry_of", "owner_of"]

_log: Final = logging.getLogger("shardlib.local")


@dataclass(frozen=True, slots=True)
class Entry:
    """One cluster and the process that owns it.

    Attributes:
        directory: folder of the cluster.
        sockets: folder of its Unix sockets, below `directory` or elsewhere when that path is too long.
        temporary: whether the folders go with the cluster.
        owner: process number of the owner.
        started: when the owner started, so that a later process of that number is not taken for it.
        scope: the process namespace the number belongs to.
    """

    directory: str
    sockets: str
    temporary: bool
    owner: int
    started: str
    scope: str


def _scope() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _folder() -> Path:
    folder = places.cache() / "clusters"
    places.make(folder, 0o755)
    return folder


class OccupiedError(Exception):
    """A living process runs a cluster in that folder."""

    def __init__(self, owner: int) -> None:
        super().__init__(owner)
        self.owner = owner

    def __str__(self) -> str:
        return f"process {self.owner} runs the cluster in it"


def enter(directory: Path, sockets: Path, *, temporary: bool) -> Path:
    """Register a cluster that this process owns, before anything of it exists; the path of its entry.

    Raises:
        OccupiedError: there is one in that folder already.
        RuntimeError: the process table does not show this very process.
    """
    owner = os.getpid()
    if (started := started_at(owner)) is None:
        raise RuntimeError(f"process {owner} cannot see itself in the process table")
    entry = Entry(str(directory), str(sockets), temporary, owner, started, _scope())
    path = _folder() / f"{owner}-{directory.name}.json"
    with places.locked(path.parent / "lock"):
        if (other := owner_of(directory)) is not None:
            raise OccupiedError(other)
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(asdict(entry)))
        unfinished.replace(path)
    return path


def read(path: Path) -> Entry | None:
    """An entry, or None if it is gone."""
    try:
        return Entry(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def owner_of(directory: Path) -> int | None:
    """The living process that runs a cluster in a folder, None if there is none."""
    entry = entry_of(directory)
    return None if entry is None else entry.owner


def entry_of(directory: Path) -> Entry | None:
    """The entry of the cluster that a living process runs in a folder, None if there is none."""
    for path in _folder().glob("*.json"):
        entry = read(path)
        if entry is not None and entry.directory == str(directory) and started_at(entry.owner) == entry.started:
            return entry
    return None


def clean(path: Path) -> bool:
    """End every process of a cluster, remove its folders if they are temporary, then its entry.

    Returns False, with the entry left for a later try, if a process could not be ended.
    """
    with places.locked(path.parent / "lock"):
        entry = read(path)
        if entry is None:
            return True
        directory = Path(entry.directory)
        if not kill_all(running_in(directory)):
            _log.error("some processes of the cluster in %s did not end after SIGKILL", directory)
            return False
        for data in directory.glob("*/data"):
            free_shared_memory(data)
        folders = [directory] if entry.temporary else []
        for folder in {*folders, Path(entry.sockets)}:
            if folder.exists():
                shutil.rmtree(folder)
        path.unlink()
        return True


def clean_abandoned() -> int:
    """Clean every cluster whose owner has ended; how many there were."""
    count = 0
    for path in _folder().glob("*.json"):
        entry = read(path)
        if entry is None:
            continue
        if entry.scope != _scope():
            # Another container shares the cache: its processes cannot be seen from here.
            if not Path(entry.directory).exists():
                path.unlink(missing_ok=True)
            continue
        if started_at(entry.owner) != entry.started:
            _log.warning("cleaning the cluster in %s, whose owner (process %d) ended", entry.directory, entry.owner)
            count += clean(path)
    return count
