"""The audit log in a file, one entry a line, in JSON.

For one machine, or a disk that several share and that keeps `flock` (NFS 4 does): a writer holds the lock while it
reads the last line, appends its own and has it on disk.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shardlib_ops.audit.base import PAGE, Page
from shardlib_ops.audit.entry import GENESIS, Damaged, Draft, Entry, Head, decode, encode, seal
from shardlib_ops.audit.errors import AuditUnavailable

__all__ = ["FileAudit"]

_log = logging.getLogger("shardlib.ops.audit")
_BLOCK: Final = 64 * 1024
_PAUSE_FIRST_S: Final = 0.001
_PAUSE_MAX_S: Final = 0.05


class FileAudit:
    """The log `file:/path`. The file is made by the first append, for its owner alone (mode 0600).

    Args:
        path: of the file. Its folder must be there, and nobody else may write in it.
        timeout_s: longest time to wait for the lock.
    """

    def __init__(self, path: Path, *, timeout_s: float = 10.0) -> None:
        self.safe_url = f"file:{path}"
        self._path, self._timeout_s = path, timeout_s
        self._lock = threading.Lock()  # flock is held by an open file, not by a thread
        self._end: tuple[tuple[int, int, int], Head] | None = None
        self._reading: tuple[int, int] | None = None

    def append(self, new: Draft) -> Entry:
        """See `AuditStore.append`. A line that could not be written whole, as on a full disk, is taken back."""
        with self._faults(), self._locked() as file:
            size = self._mended(file)
            head = self._head_of(file, size)
            entry = seal(new, head)
            line = encode(entry) + b"\n"
            try:
                _write(file, line)
                os.fsync(file)
            except OSError:
                self._end = None
                os.ftruncate(file, size)
                raise
            self._end = (_place(file), entry.head)
            return entry

    def head(self) -> Head:
        """See `AuditStore.head`."""
        with self._faults():
            try:
                file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return GENESIS
            try:
                return self._head_of(file, _whole(file))
            finally:
                os.close(file)

    def read(self, after: int = 0, limit: int = PAGE) -> Page:
        """See `AuditStore.read`. A place is the offset after a line; the file must be the one that was begun with."""
        with self._faults():
            try:
                opened = self._path.open("rb")
            except FileNotFoundError:
                return Page((), after, more=False)
            with opened as file:
                status = os.fstat(file.fileno())
                this = (status.st_dev, status.st_ino)
                if after and self._reading is not None and self._reading != this:
                    raise AuditUnavailable(self.safe_url, "the file was replaced while it was read; begin again")
                self._reading = this
                file.seek(after)
                items: list[Entry | Damaged] = []
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # somebody is writing it, or died at that: it is no entry yet
                    after += len(line)
                    items.append(decode(line[:-1], after))
                    if len(items) >= limit:
                        return Page(tuple(items), after, more=True)
                return Page(tuple(items), after, more=False)

    def last(self, limit: int) -> Page:
        """See `AuditStore.last`."""
        with self._faults():
            try:
                opened = self._path.open("rb")
            except FileNotFoundError:
                return Page((), 0, more=False)
            with opened as file:
                status = os.fstat(file.fileno())
                self._reading = (status.st_dev, status.st_ino)
                after = end = _whole(file.fileno())
                lines: list[Entry | Damaged] = []
                for line in _backwards(file.fileno(), end):
                    if len(lines) >= limit:
                        break
                    lines.append(decode(line, after))
                    after -= len(line) + 1
                return Page(tuple(reversed(lines)), end, more=False)

    def cut(self, through: int) -> int:
        """See `AuditStore.cut`. What stays is written to a new file, which takes the place of the old one."""
        count = 0
        with self._faults(), self._locked() as file:
            self._mended(file)
            temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
            try:
                with (
                    os.fdopen(os.dup(file), "rb") as old,
                    os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new,
                ):
                    old.seek(0)
                    for line in old:
                        entry = decode(line[:-1], 0)
                        if not new.tell() and isinstance(entry, Entry) and entry.seq <= through:
                            count += 1
                        else:
                            new.write(line)
                    new.flush()
                    os.fchmod(new.fileno(), os.fstat(file).st_mode & 0o777)
                    os.fsync(new.fileno())
                # Whoever waits for the lock of the old file sees that another has its name, and opens that.
                temporary.replace(self._path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            self._end = None
            _sync_folder(self._path)
        return count

    def close(self) -> None:
        """See `AuditStore.close`. Nothing stays open between two calls."""

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AuditUnavailable(self.safe_url, error.strerror or type(error).__name__) from error

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, open and held against everybody else."""
        until = time.monotonic() + self._timeout_s
        if not self._lock.acquire(timeout=self._timeout_s):
            raise AuditUnavailable(self.safe_url, f"other entries were waited for, {self._timeout_s:g} s")
        try:
            while True:
                file = self._open()
                try:
                    self._flock(file, until)
                    if self._current(file):
                        yield file
                        return
                finally:
                    os.close(file)  # gives the lock up
        finally:
            self._lock.release()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self._path, flags)
        except FileNotFoundError:
            file = os.open(self._path, flags | os.O_CREAT, 0o600)
            _sync_folder(self._path)
            return file

    def _flock(self, file: int, until: float) -> None:
        pause_s = _PAUSE_FIRST_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() + pause_s > until:
                    raise AuditUnavailable(
                        self.safe_url, f"another process held the file for {self._timeout_s:g} s"
                    ) from None
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause_s = min(_PAUSE_MAX_S, pause_s * 2)

    def _current(self, file: int) -> bool:
        """Whether the path still leads to the file that was opened."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(file))
        except FileNotFoundError:
            return False

    def _mended(self, file: int) -> int:
        """Its size, without a last line that was never written whole, and so never acknowledged."""
        size, whole = os.fstat(file).st_size, _whole(file)
        if size > whole:
            _log.warning("%s ended in %d bytes that are no whole line; they are gone", self.safe_url, size - whole)
            os.ftruncate(file, whole)
        return whole

    def _head_of(self, file: int, size: int) -> Head:
        if self._end is not None and self._end[0] == (*_place(file)[:2], size):
            return self._end[1]
        damaged: list[str] = []
        for line in _backwards(file, size):
            entry = decode(line, 0)
            if isinstance(entry, Entry):
                # Lines that are no entries count as one each: the log goes on after them.
                return Head(entry.seq + len(damaged), damaged[0] if damaged else entry.hash)
            damaged.append(entry.hash)
        return Head(len(damaged), damaged[0]) if damaged else GENESIS


def _place(file: int) -> tuple[int, int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino, status.st_size


def _whole(file: int) -> int:
    """The offset after the last whole line."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - _BLOCK)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _backwards(file: int, end: int) -> Iterator[bytes]:
    """The lines before an offset, at which one ends, the last first and without their ends."""
    rest, start = b"", max(0, end - 1)
    while start:
        begin = max(0, start - _BLOCK)
        rest, *lines = (os.pread(file, start - begin, begin) + rest).split(b"\n")
        start = begin
        yield from reversed(lines)
    if end:
        yield rest


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
