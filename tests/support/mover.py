"""Moves ranges and renews gates under load, as a resharder would: the smallest right one, for the fault tests."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg

from shardlib.catalog import Catalog
from shardlib.fence import close_gate, list_gates, open_gate
from shardlib.ring import TokenRange
from shardlib.token import hash_of
from shardlib.topology import Topology
from shardlib.topology.change import renew_gates
from tests.support.gates import give_gate, move_ranges

TABLES = {"bag": ("key", "uid"), "counter": ("key", "v"), "register": ("key", "v")}


@dataclass(frozen=True)
class _Move:
    """A move whose gate is closed: it has to be finished before anything else."""

    source: str
    target: str
    keys: list[str]
    ranges: tuple[TokenRange, ...]


class Mover:
    """Changes where keys live. One at a time; the caller owns the catalog.

    `counts` tells what was done: gates closed, ranges moved, closings that gave way. A step that failed since a
    server was down is taken up again by the next one.
    """

    def __init__(self, catalog: Catalog, keys: Sequence[str], rng: random.Random, budget_s: float = 5.0) -> None:
        self.catalog, self.keys, self.rng, self.budget_s = catalog, keys, rng, budget_s
        self._unfinished: _Move | None = None
        self.topology: Topology = catalog.load()
        self.counts = {"closed": 0, "moved": 0, "gave way": 0}
        self._connections: dict[str, psycopg.Connection[Any]] = {}

    def connection(self, shard_id: str) -> psycopg.Connection[Any]:
        conn = self._connections.get(shard_id)
        if conn is None or conn.closed:
            dsn = self.topology.shard(shard_id).primary
            conn = self._connections[shard_id] = psycopg.connect(dsn.conninfo(connect_timeout=3), autocommit=True)
        return conn

    def close(self) -> None:
        for conn in self._connections.values():
            conn.close()

    def step(self) -> None:
        """One change at random; retried by the caller when a server it needs is down."""
        self.finish()
        self.topology = self.catalog.load(self.topology)
        self.sweep()
        shard_id = self.rng.choice([shard.id for shard in self.topology.owners()])
        if self.rng.random() < 0.4:
            self.change(lambda t: renew_gates(t, shard_id, nonce=uuid4().hex))
        else:
            self.move()

    def change(self, make: Callable[[Topology], Topology]) -> None:
        """Make before break: open the new gates, publish, close the old ones."""
        before, after = self.topology, make(self.topology)
        old = {(gate.shard_id, gate.number) for gate in before.gates}
        for gate in after.gates:
            if (gate.shard_id, gate.number) not in old:
                open_gate(self.connection(gate.shard_id), gate.number)
        self.catalog.publish(after, expected=before.version)
        self.topology = after
        self.sweep()

    def sweep(self) -> None:
        """Close every gate that the topology does not name, and replace one that it names and that is closed."""
        for shard in self.topology.shards:
            named = set(self.topology.gates_of(shard.id))
            present = set(list_gates(self.connection(shard.id)))
            if not named <= present:
                after = renew_gates(self.topology, shard.id, nonce=uuid4().hex)
                for number in after.gates_of(shard.id):
                    open_gate(self.connection(shard.id), number)
                self.publish(after)
                named = set(after.gates_of(shard.id))
            for number in present - named:
                self.shut(shard.id, number)

    def shut(self, shard_id: str, number: int) -> bool:
        closing = close_gate(self.connection(shard_id), number, budget_s=self.budget_s)
        self.counts["closed" if closing.closed else "gave way"] += 1
        return closing.closed

    def move(self) -> None:
        """Some keys of one shard move to another: their own gate, close, copy, publish."""
        topology = self.topology
        token = hash_of(topology.hash_function)
        by_shard: dict[str, list[str]] = {}
        for key in self.keys:
            by_shard.setdefault(topology.place(token(key.encode())).shard.id, []).append(key)
        source = self.rng.choice(sorted(by_shard))
        target = self.rng.choice([shard.id for shard in topology.shards if shard.id != source])
        keys = self.rng.sample(by_shard[source], k=min(len(by_shard[source]), self.rng.randint(1, 4)))
        points = sorted(token(key.encode()) for key in keys)
        ranges = tuple(TokenRange(point, point) for point in points)
        self.change(lambda t: give_gate(t, source, ranges, nonce=uuid4().hex))
        own = next(gate.number for gate in self.topology.gates if gate.shard_id == source and gate.ranges)
        if set(list_gates(self.connection(source))) - set(self.topology.gates_of(source)):
            return  # an old gate, which covers these keys too, is still held: nothing has moved
        if not self.shut(source, own):
            return  # its gate is open and named: everything goes on as before
        self._unfinished = _Move(source, target, keys, ranges)
        self.finish()

    def finish(self) -> None:
        """Carry a move to its end whose gate is closed; after an error it is still to be finished."""
        move = self._unfinished
        if move is None:
            return
        self._copy(move.source, move.target, move.keys)
        self.publish(move_ranges(self.topology, move.ranges, move.target, nonce=uuid4().hex))
        self._unfinished = None
        self.counts["moved"] += 1

    def publish(self, after: Topology) -> None:
        """The swap after the point of no return: tried until it is certain."""
        deadline = time.monotonic() + 30
        while True:
            try:
                self.catalog.publish(after, expected=after.version - 1)
            except Exception:
                if time.monotonic() > deadline:
                    raise
                if self._published(after):
                    break
                time.sleep(0.05)
            else:
                break
        self.topology = after

    def _published(self, after: Topology) -> bool:
        try:
            return self.catalog.load(self.topology).nonce == after.nonce
        except Exception:  # noqa: BLE001 - asked again by the caller, within its limit
            return False

    def _copy(self, source: str, target: str, keys: list[str]) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                self._copy_once(source, target, keys)
            except psycopg.OperationalError:  # a killed server: it comes back
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _copy_once(self, source: str, target: str, keys: list[str]) -> None:
        there, here = self.connection(target), self.connection(source)
        found = {
            name: here.execute(f"SELECT {', '.join(columns)} FROM {name} WHERE key = ANY(%s)", (keys,)).fetchall()
            for name, columns in TABLES.items()
        }
        if not found["counter"]:
            return  # deleted here already, by an attempt whose answer was lost
        with there.transaction(), there.cursor() as cursor:
            for name, columns in TABLES.items():
                cursor.execute(f"DELETE FROM {name} WHERE key = ANY(%s)", (keys,))
                cursor.executemany(f"INSERT INTO {name} ({', '.join(columns)}) VALUES (%s, %s)", found[name])
        with here.transaction():
            for name in TABLES:
                here.execute(f"DELETE FROM {name} WHERE key = ANY(%s)", (keys,))
