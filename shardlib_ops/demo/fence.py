"""A shard's gate is changed under clients at work, and a client that never hears of it is refused.

This is what happens at the heart of every move of rows. Here the rows stay, but their old way in is closed.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psycopg
from sqlalchemy import update

from shardlib import ShardedEngine
from shardlib.catalog import Catalog
from shardlib.fence.gate import Closing, close_gate, open_gate
from shardlib.topology.change import renew_gates
from shardlib_ops.demo.models import Plane
from shardlib_ops.local.process import wait_until

__all__ = ["AtWork", "cut_off", "inspect", "renew_gate"]

_JOIN_S: Final = 60.0
_NOBODY: Final = "etcd://127.0.0.1:1/nobody-listens-here"


def renew_gate(server: psycopg.Connection[Any], catalog: Catalog, shard_id: str) -> Closing:
    """Give a shard another gate while clients use it.

    Args:
        server: an autocommit connection to the shard's primary.
        catalog: the cluster's catalog.
        shard_id: id of the shard.

    Returns:
        how the old gate closed, or which transactions kept it open for longer than the budget.
    """
    topology = catalog.load()
    renewed = renew_gates(topology, shard_id, nonce=uuid.uuid4().hex)
    old, new = topology.default_gate(shard_id), renewed.default_gate(shard_id)

    open_gate(server, new)  # there is a new way in,
    catalog.publish(renewed, expected=topology.version)  # clients hear of it,
    return close_gate(server, old, budget_s=10)  # and the old one ends


def inspect(engine: ShardedEngine, tailnum: str) -> None:
    """Write something small: one more inspection of a plane."""
    with engine.session(tailnum) as session:
        plane = update(Plane).where(Plane.tailnum == tailnum)
        session.execute(plane.values(inspections=Plane.inspections + 1))
        session.commit()


class AtWork:
    """Clients that write all the time: one thread a plane, each with a session that it opened before.

    Use as a context manager; when it ends they have stopped.

    Attributes:
        committed: number of transactions that were acknowledged.
        errors: what they met. None of them is retried here.
    """

    def __init__(self, engine: ShardedEngine, tailnums: Sequence[str]) -> None:
        self._engine = engine
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(each,), daemon=True) for each in tailnums]
        self.committed = 0
        self.errors: list[Exception] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def wait_for_more(self, transactions: int, timeout_s: float = 10.0) -> bool:
        """Wait until that many more were acknowledged; False if that took too long."""
        wanted = self.committed + transactions
        return wait_until(lambda: self.committed >= wanted, timeout_s)

    def _work(self, tailnum: str) -> None:
        plane = update(Plane).where(Plane.tailnum == tailnum)
        more = plane.values(inspections=Plane.inspections + 1).execution_options(synchronize_session=False)
        with self._engine.session(tailnum) as session:
            while not self._stop.is_set():
                try:
                    session.execute(more)
                    session.commit()
                except Exception as error:  # noqa: BLE001 - counted, and shown at the end
                    session.rollback()
                    with self._lock:
                        self.errors.append(error)
                else:
                    with self._lock:
                        self.committed += 1


@contextmanager
def cut_off(url: str, file: Path) -> Iterator[ShardedEngine]:
    """A client that knows the cluster by the map that it once saved, and never hears of another.

    Args:
        url: the catalog, from which the map is saved.
        file: where to save it.
    """
    with ShardedEngine(url, topology_file=file):
        pass  # it saves the map as it ends, at the latest
    with ShardedEngine(_NOBODY, topology_file=file, catalog_timeout_s=0.3, reroute_timeout_s=1.0) as engine:
        yield engine
