"""A PostgreSQL shard as a job and clients meet it: rows, gates, row locks, WAL, slots, guard, bookkeeping.

What is modelled is what the fence leans on: a gate is held from its lock to the end of the transaction; who closes it
holds newcomers up and gives way; a commit is in the WAL before it is visible, and locks are let go after that; a slot's
snapshot waits for the transactions in flight; a guard refuses statements, not transactions that wrote before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardlib_ops.reshard.world import Superseded

__all__ = ["TABLES", "Change", "Closed", "FakeShard", "Guarded", "Record", "Rows", "Slot", "Transaction"]

TABLES = ("register", "bag")
Rows = dict[str, dict[str, Any]]
"""table -> key -> (value, counter) or a tuple of unique ids."""


class Closed(Exception):  # noqa: N818 - an answer of the shard
    """The gate, or a key table, is not there: the client's topology is old."""


class Guarded(Exception):  # noqa: N818 - an answer of the shard
    """The guard refuses to write this row here."""


@dataclass(frozen=True, slots=True)
class Change:
    """One row change. `what`: the new (value, counter), or a tuple of ids more; None deletes."""

    table: str
    key: str
    what: tuple[Any, ...] | None


@dataclass(frozen=True, slots=True)
class Record:
    """A commit in the WAL, or a message."""

    lsn: int
    changes: tuple[Change, ...] = ()
    message: str | None = None


@dataclass(slots=True)
class Slot:
    """A replication slot. `point`: changes up to there are not sent; `confirmed`: what its reader has for certain."""

    point: int
    confirmed: int
    lost: bool = False


@dataclass(eq=False, slots=True)
class Transaction:
    """In flight. `gates` None: of a program that knows of none."""

    name: str
    began: float
    gates: list[int] | None
    changes: list[Change] = field(default_factory=list)
    locked: list[str] = field(default_factory=list)
    guarded: bool = False
    """As it learned with its first write: what it writes later under the same lock does not look for news."""
    over: bool = False


def _empty() -> Rows:
    return {table: {} for table in TABLES}


def apply_changes(rows: Rows, changes: tuple[Change, ...] | list[Change]) -> None:
    """Do to rows what a transaction did. Appending is not idempotent: what is applied twice shows."""
    for change in changes:
        table = rows[change.table]
        if change.what is None:
            table.pop(change.key, None)
        elif change.table == "bag":
            table[change.key] = (*table.get(change.key, ()), *change.what)
        else:
            table[change.key] = change.what


class FakeShard:
    """One primary. Methods that are no coroutines happen at once, at the server.

    Attributes:
        seen: what a snapshot taken now sees.
        logged: what the WAL says: commits that are not visible yet included.
        token: who holds the job here, or held it last; None if nobody ever did.
        keys: the job's key table, key -> LSN on the other side; None while there is none.
        guard: None: not installed; else whether it refuses.
        may_commit: told of each client's commit: shard, key; violations are found there.
    """

    def __init__(self, shard_id: str, gates: tuple[int, ...], wait: Callable[[float], Any]) -> None:
        self.id, self._wait = shard_id, wait
        self.open = set(gates)
        self.ever_open, self.ever_closed = set(gates), set[int]()
        self._gates_at: list[tuple[int, frozenset[int]]] = [(0, frozenset(gates))]
        self._replays_until: int | None = None
        self.seen, self.logged = _empty(), _empty()
        self.wal: list[Record] = []
        self.flights: list[Transaction] = []
        self.closing: dict[int, int] = {}
        self.slots: dict[str, Slot] = {}
        self.token: int | None = None
        self.position: dict[tuple[int, str], int] = {}
        self.copied: dict[tuple[int, str], int] = {}
        self.keys: dict[str, int] | None = None
        self.guard: bool | None = None
        self.moving: Callable[[str], bool] = lambda key: False
        self.may_commit: Callable[[FakeShard, str, Transaction], None] = lambda shard, key, flight: None
        self.violations: list[str] = []
        self.refusals = {"gate": 0, "guard": 0}
        self._row_locks: dict[str, Transaction] = {}
        self._changed: list[asyncio.Future[None]] = []

    @property
    def end(self) -> int:
        """LSN just after the last record."""
        return len(self.wal)

    def changes(self) -> asyncio.Future[None]:
        """Done when anything here changes next."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed.append(future)
        return future

    def tell(self) -> None:
        """Wake whoever waits for a change."""
        waiting, self._changed = self._changed, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def claimed(self, token: int) -> None:
        """The first statement of whatever a runner changes here.

        Raises:
            Superseded: another runner holds the job.
        """
        if self.token != token:
            raise Superseded(f"{self.id} is held by {self.token}, not by {token}")

    def claim(self, token: int) -> None:
        """Take the job over here."""
        if self.token is None or self.token < token:
            self.token = token
        self.claimed(token)

    # Transactions of clients

    def begin(self, name: str, *, foreign: bool = False) -> Transaction:
        """A transaction; one that is `foreign` holds no gate."""
        flight = Transaction(name, asyncio.get_running_loop().time(), None if foreign else [])
        self.flights.append(flight)
        return flight

    async def enter(self, flight: Transaction, gate: int) -> None:
        """Lock a gate; its name is looked up again after each wait.

        Raises:
            Closed: it is not there.
        """
        assert flight.gates is not None
        if gate in flight.gates:
            return
        while gate in self.closing:
            await self.changes()
        if gate not in self.open:
            self.refusals["gate"] += 1
            raise Closed(f"gate {gate} of {self.id}")
        flight.gates.append(gate)

    def holders(self, gate: int) -> list[Transaction]:
        """The transactions that hold a gate."""
        return [flight for flight in self.flights if flight.gates and gate in flight.gates]

    async def lock(self, flight: Transaction, key: str) -> None:
        """Lock a row, which a writer holds until its commit is visible."""
        while self._row_locks.get(key, flight) is not flight:
            await self.changes()
        self._row_locks[key] = flight

    def free(self, key: str) -> bool:
        """Whether nobody has locked a row."""
        return key not in self._row_locks

    def write(self, flight: Transaction, key: str, value: int | None, uid: str) -> None:
        """Raise the register (None: leave it), add one to the counter, put `uid` into the bag. The row is locked.

        Raises:
            Guarded: it is refused.
        """
        if not flight.locked:
            flight.guarded = bool(self.guard)
        if flight.guarded and self.moving(key):
            self.refusals["guard"] += 1
            raise Guarded(f"{key} at {self.id}")
        flight.locked.append(key)
        mine = (change.what for change in reversed(flight.changes) if (change.table, change.key) == ("register", key))
        old, count = next(mine, None) or self.seen["register"].get(key, (0, 0))
        flight.changes.append(Change("register", key, (old if value is None else value, count + 1)))
        flight.changes.append(Change("bag", key, (uid,)))

    async def commit(self, flight: Transaction) -> None:
        """Into the WAL, then visible, then the locks are free."""
        if flight.changes:
            for key in flight.locked:
                self.may_commit(self, key, flight)
            self._log(tuple(flight.changes))
            await self._wait(0.002)
            apply_changes(self.seen, flight.changes)
        self.end_flight(flight)

    def end_flight(self, flight: Transaction) -> None:
        """Let go of everything; idempotent. Without a commit before, it is a rollback."""
        if flight.over:
            return
        flight.over = True
        self.flights.remove(flight)
        for key in [key for key, holder in self._row_locks.items() if holder is flight]:
            del self._row_locks[key]
        self.tell()

    def _log(self, changes: tuple[Change, ...], message: str | None = None) -> int:
        record = Record(len(self.wal) + 1, changes, message)
        self.wal.append(record)
        apply_changes(self.logged, changes)
        self.tell()
        return record.lsn

    # What a runner changes

    def write_now(self, changes: list[Change]) -> None:
        """A runner's own transaction: logged and visible at once, past the guard."""
        if changes:
            self._log(tuple(changes))
            apply_changes(self.seen, changes)

    def message(self, text: str) -> None:
        """A message into the WAL, after everything that has committed."""
        self._log((), text)

    def open_gate(self, number: int) -> None:
        """Make a gate; idempotent."""
        if number not in self.open and number in self.ever_closed:
            self.reopened(number)
        if number not in self.open:
            self.open.add(number)
            self.ever_open.add(number)
            self._log_gates()

    def reopened(self, number: int) -> None:
        """Told of each gate that was closed once and is opened again."""

    def drop_gate(self, number: int) -> bool:
        """Close a gate if nobody holds it; whether it is closed."""
        if self.holders(number):
            return False
        if number in self.open:
            self.open.remove(number)
            self.ever_closed.add(number)
            self._log_gates()
        return True

    def _log_gates(self) -> None:
        self._gates_at.append((self._log(()), frozenset(self.open)))

    # The replica

    def replay_until(self, lsn: int | None) -> None:
        """Have the replica replay no further; None: it follows at once."""
        self._replays_until = lsn
        self.tell()

    def replayed(self, lsn: int) -> bool:
        """Whether the replica has replayed up to there."""
        return self._replays_until is None or self._replays_until >= lsn

    def replica_gates(self) -> tuple[int, ...]:
        """The gates that are open at the replica."""
        return tuple(sorted(next(gates for lsn, gates in reversed(self._gates_at) if self.replayed(lsn))))

    def unfinished(self) -> list[Transaction]:
        """Transactions that have written: a new slot waits for their ends, and so does a guard."""
        return [flight for flight in self.flights if flight.locked]

    def snapshot(self) -> tuple[int, Rows]:
        """A consistent point: an LSN, and exactly what was committed up to there."""
        return self.end, {table: dict(rows) for table, rows in self.logged.items()}

    def make_slot(self, name: str) -> None:
        """Make a slot that starts now; idempotent. One that is lost is made anew."""
        found = self.slots.get(name)
        if found is None or found.lost:
            self.slots[name] = Slot(self.end, self.end)

    def usable(self, name: str) -> bool:
        """Whether a slot is there and not lost."""
        return name in self.slots and not self.slots[name].lost

    def retire(self, names: list[str]) -> None:
        """Everything of the job is gone."""
        for name in names:
            self.slots.pop(name, None)
        self.keys = self.guard = None
        self.position.clear()
        self.copied.clear()
        if self.token is not None:
            self.token += 1  # what this runner has sent is refused, and so is a runner from before it
        self.tell()

    def leftovers(self) -> list[str]:
        """What a job has left here."""
        found = [f"slot {name}" for name in self.slots]
        found += ["key table"] if self.keys is not None else []
        found += ["guard"] if self.guard is not None else []
        found += [f"position {at}" for at in self.position] + [f"copied {at}" for at in self.copied]
        return [f"left over at {self.id}: {what}" for what in found]
