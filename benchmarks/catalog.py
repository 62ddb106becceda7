"""How soon a change is seen by every client, and what a topology of 10,000 shards costs.

Clients are caches with connections of their own, spread over a few processes as they are in life: one process with
200 of them would measure its own lock.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import threading
import time
import uuid
from multiprocessing.connection import Connection
from typing import Final

from benchmarks.report import Row, at_most
from shardlib.catalog import Catalog, TopologyCache, open_catalog
from shardlib.topology import Topology
from shardlib_ops import LocalCluster
from tests.support.topologies import make_topology, one_range_moved, scattered_topology

__all__ = ["run"]


_PROCESSES: Final = 8
_CLIENTS: Final = 200
_LIMIT_S: Final = 60.0


class _Seen:
    """When each of some clients saw each version."""

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._at: dict[int, list[float]] = {}
        self._all = threading.Condition()

    def note(self, topology: Topology) -> None:
        """Called by each client, from a thread of its own."""
        now = time.monotonic()  # one clock for all processes of a machine
        with self._all:
            at = self._at.setdefault(topology.version, [])
            at.append(now)
            if len(at) == self._clients:  # else nobody is woken: the machine is the clients'
                self._all.notify_all()

    def times(self, version: int) -> list[float]:
        """The moments at which each client saw a version, once all did."""
        with self._all:
            if not self._all.wait_for(lambda: len(self._at.get(version, ())) == self._clients, _LIMIT_S):
                raise AssertionError(f"version {version} was not seen by every client in {_LIMIT_S:g} s")
            return self._at[version]


def _clients(url: str, count: int, pipe: Connection) -> None:
    """A process of clients: says when they are ready, then for each version in turn when each of them saw it."""
    catalogs = [open_catalog(url) for _ in range(count)]
    caches = [TopologyCache(catalog) for catalog in catalogs]
    seen = _Seen(count)
    for cache in caches:
        cache.start(timeout_s=_LIMIT_S)
        cache.listen(seen.note)
    pipe.send("ready")
    while (version := pipe.recv()) is not None:
        pipe.send(seen.times(version))
    for cache, catalog in zip(caches, catalogs, strict=True):
        cache.close()
        catalog.close()


def _seen_by_clients(url: str, clients: int, changes: int) -> list[float]:
    """Seconds from the moment a publish returned to each client having the new topology."""
    writer = open_catalog(url, timeout_s=10)
    topology = make_topology(4)
    writer.publish(topology, expected=None)
    context = multiprocessing.get_context("spawn")
    workers = []
    for _ in range(_PROCESSES):
        ours, theirs = context.Pipe()
        process = context.Process(target=_clients, args=(url, clients // _PROCESSES, theirs), daemon=True)
        process.start()
        workers.append((process, ours))
    try:
        for _, pipe in workers:
            if not pipe.poll(_LIMIT_S):
                raise AssertionError("the clients did not start")
            pipe.recv()
        took: list[float] = []
        for _ in range(changes):
            topology = one_range_moved(topology)
            writer.publish(topology, expected=topology.version - 1)
            committed_at = time.monotonic()
            for _, pipe in workers:
                pipe.send(topology.version)
            for _, pipe in workers:
                took += [max(0.0, at - committed_at) for at in pipe.recv()]
        return took
    finally:
        for process, pipe in workers:
            pipe.send(None)
            process.join(10)
            if process.is_alive():
                process.terminate()
        writer.close()


def _timed(work: object) -> float:
    began = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - began


def _large(url: str, shards: int) -> dict[str, float]:
    """Seconds and bytes of a large topology: publish, load, an update, and the update as a watcher sees it."""
    writer, reader = open_catalog(url, timeout_s=30), open_catalog(url, timeout_s=30)
    first = scattered_topology(random.Random(17), shards, 256)
    figures = {"publish": _timed(lambda: writer.publish(first, expected=None))}
    loaded: list[Topology] = []
    figures["load"] = _timed(lambda: loaded.append(reader.load()))
    cache = TopologyCache(reader)
    cache.start(timeout_s=30)
    seen = _Seen(1)
    cache.listen(seen.note)
    second = one_range_moved(first)
    figures["publish an update"] = _timed(lambda: writer.publish(second, expected=1))
    figures["watch update"] = _timed(lambda: seen.times(second.version))
    figures["bytes"] = float(_shipped(first, second))
    cache.close()
    for catalog in (writer, reader):
        catalog.close()
    return figures


def _shipped(first: Topology, second: Topology) -> int:
    """Bytes that a publish of `second` after `first` writes."""
    from shardlib.topology.codec import encode

    encoded = encode(second, encode(first).head)
    return len(encoded.data) + sum(map(len, encoded.chunks.values()))


def _decision_s(catalog: Catalog) -> float:
    """Seconds for one."""
    topology = catalog.load()
    rng = random.Random(5)
    tokens = [rng.getrandbits(64) for _ in range(200_000)]
    place = topology.place
    took = _timed(lambda: [place(token) for token in tokens])
    return took / len(tokens)


def run(scale: float) -> list[Row]:
    """Rows of the section `catalog`; `scale` 1 is the full size, less is a quick look."""
    shards = max(100, int(10_000 * scale))
    clients = max(_PROCESSES, int(_CLIENTS * scale) // _PROCESSES * _PROCESSES)
    with LocalCluster(shards=1, bootstrap=False) as cluster:
        base = f"etcd://127.0.0.1:{cluster.etcd[0].port}/bench-{uuid.uuid4().hex[:8]}"
        seen = sorted(_seen_by_clients(base, clients, max(10, int(50 * scale))))
        large = _large(f"{base}-large", shards)
        catalog = open_catalog(base)
        decision_s = _decision_s(catalog)
        catalog.close()
    p99 = seen[min(len(seen) - 1, int(len(seen) * 0.99))]
    size = f"{shards:,} shards x 256"
    return [
        _row(f"change committed to seen, {clients} clients, p50", statistics.median(seen) * 1e3, 50, "ms"),
        _row(f"change committed to seen, {clients} clients, p99", p99 * 1e3, 50, "ms"),
        _row("a routing decision", decision_s * 1e6, 1, "us"),
        *(_row(f"{size}: {what}", large[what], 2, "s") for what in ("publish", "load", "publish an update")),
        _row(f"{size}: watch update", large["watch update"], 2, "s"),
        _row(f"{size}: written by an update that moves one range", large["bytes"] / 1024, 128, "KiB"),
    ]


def _row(what: str, seen: float, limit: float, unit: str) -> Row:
    return at_most("catalog", what, seen, None, unit, limit)
