"""Where local servers keep what outlives them, and whether their account can get at it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shardlib_ops.local.process import Account

__all__ = ["blocked_at", "cache", "locked", "make"]

_VARIABLE: Final = "SHARDLIB_CACHE"


def cache() -> Path:
    """The folder of cached templates and of the register of running clusters, created if it is missing.

    ``SHARDLIB_CACHE`` if set; ``/var/cache/shardlib`` for root, whose servers run as another account that
    cannot look into root's home; else ``shardlib`` in the user's cache folder, or in the temporary folder if
    there is none.
    """
    if (chosen := os.environ.get(_VARIABLE)) is not None:
        return _made(Path(chosen).absolute())
    if os.geteuid() == 0:
        return _made(Path("/var/cache/shardlib"))
    try:
        return _made(_user_cache() / "shardlib")
    except OSError:
        # An account without a home, such as `nobody`. Somebody else's folder of that name is never used.
        place = _made(Path(tempfile.gettempdir()) / f"shardlib-cache-{os.geteuid()}", 0o700)
        if place.stat().st_uid != os.geteuid():
            raise
        return place


def _user_cache() -> Path:
    if (chosen := os.environ.get("XDG_CACHE_HOME")) is not None:
        return Path(chosen)
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def _made(place: Path, mode: int = 0o755) -> Path:
    make(place, mode)
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"the cache folder {place} cannot be written")
    return place


def make(folder: Path, mode: int, *, fresh: bool = False) -> None:
    """Make a folder with exactly that mode, whatever the umask; one that exists is left as it is.

    Raises:
        FileExistsError: it exists and should be `fresh`, or is no folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if fresh or not folder.is_dir():
            raise
        return
    folder.chmod(mode)


def blocked_at(path: Path, owner: Account | None) -> Path | None:
    """The folder on the way to `path` that an account may not pass, None if it gets there."""
    if owner is None:
        return None
    for folder in [*reversed(path.parents), path]:
        try:
            status = folder.stat()
        except OSError:
            return folder
        if status.st_uid == owner.uid:
            allowed = status.st_mode & stat.S_IXUSR
        elif status.st_gid == owner.gid:
            allowed = status.st_mode & stat.S_IXGRP
        else:
            allowed = status.st_mode & stat.S_IXOTH
        if not allowed:
            return folder
    return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, against other processes and other threads of this one."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
