"""Breaks servers, wires and clients at random while a workload runs, mends each fault, and counts what it did."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from shardlib_ops import LocalCluster
from tests.support.faults import Proxy
from tests.support.hammer import Hammer


class Nemesis:
    """One fault after the other from a thread of its own, each mended before the next; use as a context manager.

    Args:
        cluster: whose servers are struck.
        proxies: on the way from some of the clients to the shards.
        hammer: whose clients are frozen.
        rng: chooses.
        pause_s: least and greatest time between two faults, in seconds.
        down_s: least and greatest length of a fault, in seconds.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        proxies: Sequence[Proxy],
        hammer: Hammer,
        rng: random.Random,
        *,
        pause_s: tuple[float, float] = (0.3, 1.2),
        down_s: tuple[float, float] = (0.2, 1.5),
    ) -> None:
        self.cluster, self.proxies, self.hammer, self.rng = cluster, list(proxies), hammer, rng
        self.pause_s, self.down_s = pause_s, down_s
        self.struck: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nemesis", daemon=True)
        self._faults: dict[str, Callable[[], None]] = {
            "client frozen": self._freeze,
            "postgres killed": self._kill_postgres,
            "postgres paused": self._pause_postgres,
            "etcd killed": self._kill_etcd,
            "etcd paused": self._pause_etcd,
            "connections cut": self._cut,
            "half open": self._stall,
            "commit reply lost": lambda: self._lose(forwarded=True),
            "commit not sent": lambda: self._lose(forwarded=False),
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "a fault does not end"
        if self.failure is not None and error is None:
            raise self.failure

    def _run(self) -> None:
        round_: list[str] = []
        try:
            while not self._stop.wait(self.rng.uniform(*self.pause_s)):
                if not round_:  # every kind once, in another order each time, so that none is left out by chance
                    round_ = self.rng.sample(sorted(self._faults), len(self._faults))
                name = round_.pop()
                self._faults[name]()
                self.struck[name] += 1
        except BaseException as error:  # noqa: BLE001 - raised at the end, in the test's thread
            self.failure = error

    def _wait(self) -> None:
        self._stop.wait(self.rng.uniform(*self.down_s))

    def _freeze(self) -> None:
        with self.hammer.one_frozen():
            self._wait()

    def _kill_postgres(self) -> None:
        server = self.rng.choice(self.cluster.servers)
        server.kill()
        try:
            self._wait()
        finally:
            server.start()

    def _pause_postgres(self) -> None:
        server = self.rng.choice(self.cluster.servers)
        server.pause()
        try:
            self._wait()
        finally:
            server.resume()

    def _kill_etcd(self) -> None:
        member = self.rng.choice(self.cluster.etcd)
        member.kill()
        try:
            self._wait()
        finally:
            member.start()

    def _pause_etcd(self) -> None:
        member = self.rng.choice(self.cluster.etcd)
        member.pause()
        try:
            self._wait()
        finally:
            member.resume()

    def _cut(self) -> None:
        self.rng.choice(self.proxies).cut()

    def _stall(self) -> None:
        proxy = self.rng.choice(self.proxies)
        with ExitStack() as mend:
            mend.callback(proxy.heal)
            proxy.stall()
            self._wait()

    def _lose(self, *, forwarded: bool) -> None:
        self.rng.choice(self.proxies).cut_at("COMMIT", forwarded=forwarded, times=self.rng.randint(1, 5))
