"""The topology a client routes by: one attribute, replaced by a watch, asked anew when a shard refuses a gate."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shardlib.catalog.base import POLL_S, Catalog, Watch
from shardlib.catalog.disk import read_file, write_file
from shardlib.catalog.store import Deadline
from shardlib.checks import check, seconds
from shardlib.errors import CatalogUnavailable, InvalidTopology, ShardlibError
from shardlib.topology import Topology

__all__ = ["TopologyCache"]

_log = logging.getLogger("shardlib.catalog")
_CLOSE_S: Final = 1.0
_PAUSE_FIRST_S: Final = 0.05
_PAUSE_MAX_S: Final = 1.0
_RULES: Final = {"poll_s": seconds()}


class TopologyCache:
    """Holds the newest topology that this process has seen, and never goes back.

    `current` is a plain attribute: reading it takes no lock and no network. A watch replaces it; a slow poll
    does too, since nothing may depend on a watch alone. A lower version, the same version with other content,
    another cluster or another hash function are refused and logged: a catalog restored from a backup must not undo
    what this process has seen (the shards' gates would refuse it anyway).

    Args:
        catalog: owned by the caller, who closes it after the cache.
        file: where the last topology is saved (mode 0600), and read from if the catalog is away at the start.
        poll_s: seconds between two full reads that do not rely on the watch.
    """

    current: Topology
    """Set by `start`."""

    def __init__(self, catalog: Catalog, *, file: Path | None = None, poll_s: float = POLL_S) -> None:
        check(_RULES, {"poll_s": poll_s})
        self._catalog, self._file, self._poll_s = catalog, file, poll_s
        self._listeners: list[Callable[[Topology], None]] = []
        self._started = False
        self._reset()

    def _reset(self) -> None:
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        # Apart from those who wait for a topology: a change wakes the cache's own thread only if it has work.
        self._work = threading.Condition(lock)
        self._accepting = threading.Lock()
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._dirty = False
        self._asked = self._answered = 0
        self._failed: tuple[int, ShardlibError] | None = None
        self._complaints: dict[str, str] = {}
        """What is wrong now, by kind: said when it begins and when it changes."""
        self._proved_at: float | None = None

    def start(self, timeout_s: float = 3.0) -> Topology:
        """Load the first topology, from the catalog or else from the file, and begin to watch.

        Args:
            timeout_s: how long to try the catalog. With a usable file one failed try is enough.

        Raises:
            CatalogUnavailable: the catalog did not answer, and there is no usable file.
            InvalidTopology: the catalog is empty or damaged, or the file is of another cluster.
        """
        if self._started:
            return self.current
        saved, problem = self._read_saved()
        deadline, wait_s = Deadline(timeout_s), _PAUSE_FIRST_S
        while True:
            try:
                loaded = self._catalog.load()
                break
            except CatalogUnavailable as error:
                if saved is not None:
                    _log.warning("%s; starting from version %d in %s", error, saved.version, self._file)
                    self.current = saved
                    return self._begin(loaded=False)
                if error.final or deadline.left() <= wait_s:
                    if problem is not None:
                        error.add_note(f"{self._file} was of no use: {problem}")
                    raise
                time.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                wait_s = min(_PAUSE_MAX_S, wait_s * 2)
        if problem is not None:
            _log.warning("%s was of no use: %s", self._file, problem)
        if saved is not None and saved.cluster_id != loaded.cluster_id:
            raise InvalidTopology(
                f"{self._file} is of cluster {saved.cluster_id!r}, the catalog {self._catalog.safe_url} of "
                f"{loaded.cluster_id!r}",
                "delete the file, or correct the URL",
            )
        self.current = saved if saved is not None and saved.version > loaded.version else loaded
        self._accept(loaded, self.current)
        return self._begin(loaded=True)

    def _read_saved(self) -> tuple[Topology | None, Exception | None]:
        if self._file is None:
            return None, None
        try:
            return read_file(self._file), None
        except (InvalidTopology, OSError) as error:
            return None, error

    def _begin(self, *, loaded: bool) -> Topology:
        now = time.monotonic()
        self._proved_at = now if loaded else None
        self._dirty = loaded and self._file is not None
        self._started = True
        self._thread = threading.Thread(target=self._tend, name="shardlib-topology", daemon=True)
        self._thread.start()
        self._watch = self._catalog.watch(self._on_change, self._on_alive)
        return self.current

    def refresh(self, *, newer_than: int | None = None, timeout_s: float = 3.0) -> Topology:
        """The topology after asking the catalog, or as soon as the cached version is above `newer_than`.

        Calls share a read of the catalog, but only one that began after they were made: what it returns is at least
        as new as the call.

        Raises:
            CatalogUnavailable: no answer within `timeout_s`.
            InvalidTopology: the catalog's content is gone, damaged, or may not follow the cached topology.
        """
        deadline = Deadline(timeout_s)
        with self._changed:
            self._check_running()
            if newer_than is not None and self.current.version > newer_than:
                return self.current
            self._asked += 1
            mine = self._asked
            self._work.notify_all()
            while True:
                if newer_than is not None and self.current.version > newer_than:
                    return self.current
                if self._answered >= mine:
                    return self.current
                if self._failed is not None and self._failed[0] >= mine:
                    raise self._failed[1]
                if deadline.passed() or self._closed:
                    raise CatalogUnavailable(
                        self._catalog.safe_url, f"no answer within {timeout_s:g} s, {self._last_sign()}"
                    )
                self._changed.wait(deadline.left())

    def newest(self) -> Topology:
        """The stored topology, read now, for whoever is about to change it. The cached one stays as it is.

        Raises:
            CatalogUnavailable: no answer in time.
            InvalidTopology: the catalog's content is gone, damaged, or may not follow the cached topology.
        """
        seen = self.current
        topology = self._catalog.load(seen)
        if (problem := _refusal(seen, topology)) is not None:
            raise self._refused(problem)
        return topology

    def _refused(self, problem: str) -> InvalidTopology:
        return InvalidTopology(
            f"{self._catalog.safe_url}: {problem}",
            "correct the catalog, or its URL and start this process anew",
        )

    def ask(self) -> None:
        """Have the catalog read soon, and wait for nothing: listeners are told of a newer topology."""
        with self._changed:
            if self._started and not self._closed:
                self._asked += 1
                self._work.notify_all()

    def listen(self, callback: Callable[[Topology], None]) -> None:
        """Have `callback` called with each new topology, in order, from a thread of the cache."""
        with self._accepting:
            self._listeners.append(callback)

    def staleness(self) -> float:
        """Seconds since the catalog was last proved to be heard; infinite if it never was."""
        proved_at = self._proved_at
        return float("inf") if proved_at is None else time.monotonic() - proved_at

    def _last_sign(self) -> str:
        seconds = self.staleness()
        return "nor ever before" if seconds == float("inf") else f"the last one {seconds:.1f} s ago"

    def after_fork(self) -> None:
        """In a forked child: keep the topology, and watch anew with connections and threads of its own."""
        self._catalog.after_fork()
        running, proved_at = self._started and not self._closed, self._proved_at
        self._reset()
        if running:
            self._begin(loaded=False)
            self._proved_at = proved_at

    def close(self) -> None:
        """Stop watching, and save the last topology if that is still to be done; idempotent."""
        with self._changed:
            self._closed = True
            self._listeners = []  # a thread that still waits for the catalog must not keep whoever listened
            self._changed.notify_all()
            self._work.notify_all()
        if self._watch is not None:
            self._watch.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_S)

    def _check_running(self) -> None:
        if not self._started or self._closed:
            raise CatalogUnavailable(self._catalog.safe_url, "the topology cache is not running")

    def _tend(self) -> None:
        """The cache's own thread: reads the catalog when asked and now and then, and saves the file."""
        next_poll = Deadline(self._poll_s * random.uniform(0.7, 1.0))  # noqa: S311 - jitter
        while True:
            with self._changed:
                while not (self._closed or self._pending() or self._dirty or next_poll.passed()):
                    self._work.wait(next_poll.left())
                asked, pending, closed = self._asked, self._pending(), self._closed
                poll, dirty = next_poll.passed(), self._dirty
            if not closed and (pending or poll):
                self._read(asked)
                next_poll = Deadline(self._poll_s * random.uniform(0.7, 1.0))  # noqa: S311 - jitter
            elif dirty:
                self._save()
            if closed:
                return

    def _pending(self) -> bool:
        failed = self._failed[0] if self._failed is not None else 0
        return self._asked > max(self._answered, failed)

    def _read(self, asked: int) -> None:
        failed: ShardlibError | None = None
        seen = self.current
        try:
            topology = self._catalog.load(seen)
        except ShardlibError as error:
            failed = error
        except Exception as error:  # noqa: BLE001 - logged, and told to those who wait
            _log.exception("reading the catalog %s failed", self._catalog.safe_url)
            failed = CatalogUnavailable(self._catalog.safe_url, type(error).__name__)
        else:
            self._proved_at = time.monotonic()
            if (problem := self._accept(topology, seen)) is not None:
                failed = self._refused(problem)
        with self._changed:
            if failed is None:
                self._answered = asked
            else:
                self._failed = asked, failed
            self._changed.notify_all()

    def _save(self) -> None:
        with self._changed:
            self._dirty = False
        if self._file is None:
            return
        try:
            write_file(self._file, self.current)
        except (OSError, ShardlibError) as error:
            self._complain("file", f"the topology cannot be saved in {self._file}: {error}")
        else:
            self._complaints.pop("file", None)

    def _on_alive(self, alive: bool) -> None:
        if alive:
            self._proved_at = time.monotonic()

    def _on_change(self, version: int) -> None:
        seen = self.current
        if self._closed or version == seen.version:
            return
        if version < seen.version:
            self.ask()  # told late, or the catalog went back: a read that begins now tells which
            return
        try:
            self._accept(self._catalog.load(seen), seen)
        except ShardlibError as error:
            _log.warning("version %d was announced and could not be read yet: %s", version, error)
            self.ask()  # the cache's own thread tries again, with nobody waiting for it

    def _accept(self, new: Topology, seen: Topology) -> str | None:
        """Make `new` the current topology if it is newer, and tell the listeners.

        Args:
            new: what the catalog holds.
            seen: the current topology before it was read.

        Returns:
            why it is refused, None if it is not.
        """
        with self._accepting:
            old = self.current
            # What another thread has read meanwhile may be newer, which is no fault of this one.
            problem = _refusal(seen if new.version < old.version else old, new)
            if problem is not None:
                self._complain("refused", f"{self._catalog.safe_url}: {problem}")
                return problem
            self._complaints.pop("refused", None)
            if new.version <= old.version:
                return None
            self.current = new
            with self._changed:
                self._changed.notify_all()
                if self._file is not None:
                    self._dirty = True
                    self._work.notify_all()
            for listener in self._listeners:
                try:
                    listener(new)
                except Exception:  # noqa: BLE001 - logged: a fault of other code must not end the thread
                    _log.exception("a listener of the topology failed")
            return None

    def _complain(self, kind: str, message: str) -> None:
        if self._complaints.get(kind) != message:
            self._complaints[kind] = message
            _log.error("%s", message)


def _refusal(old: Topology, new: Topology) -> str | None:
    """Why `new` may not follow `old`, None if it may."""
    if new.cluster_id != old.cluster_id:
        return f"it now holds cluster {new.cluster_id!r}; this process goes on with {old.cluster_id!r}"
    if new.hash_function != old.hash_function:
        return f"the hash function became {new.hash_function!r}; this process goes on with {old.hash_function!r}"
    if new.version < old.version:
        return f"version {new.version} after {old.version}: refused (was the catalog restored from a backup?)"
    if new.version == old.version and new.nonce != old.nonce:
        return f"version {new.version} came with other content than was seen: refused"
    return None
