"""One immutable snapshot of the cluster: what a client routes by until the next one replaces it."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology
from shardlib.ring import Ring, TokenRange

__all__ = ["Gate", "Move", "MoveState", "Place", "Shard", "Status", "Table", "Topology", "highest_number"]


class Status(StrEnum):
    """What a shard takes: `active` everything, `readonly` reads, `inactive` no statements at all.

    `migrating` is reserved, and like `active` today. No command sets a status: every shard is `active` unless a program
    has published a topology that says otherwise. Clients heed it from then on, and a shard that is `readonly` or
    `inactive` takes part in no job.
    """

    ACTIVE = "active"
    MIGRATING = "migrating"
    READONLY = "readonly"
    INACTIVE = "inactive"


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: its id (`s1`, never used twice), its name, and where its servers are."""

    id: str
    name: str
    primary: Dsn
    replicas: tuple[Dsn, ...] = ()
    status: Status = Status.ACTIVE
    vnode_count: int = 256


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate of a shard: the default one (no ranges), or one for ranges of its own."""

    number: int
    shard_id: str
    ranges: tuple[TokenRange, ...] = ()


class MoveState(StrEnum):
    """Where the rows of a move are: still arriving, or served by the target."""

    COPYING = "copying"
    SWITCHED = "switched"


@dataclass(frozen=True, slots=True)
class Move:
    """Token ranges on their way from one shard to another, as a job numbered `job` moves them."""

    job: int
    ranges: tuple[TokenRange, ...]
    source: str
    target: str
    state: MoveState = MoveState.COPYING

    @property
    def owner(self) -> str:
        """The shard that has the ranges now."""
        return self.source if self.state is MoveState.COPYING else self.target

    @property
    def next_owner(self) -> str:
        """The shard that the next switch would give the ranges to."""
        return self.target if self.state is MoveState.COPYING else self.source


@dataclass(frozen=True, slots=True)
class Table:
    """A table that the cluster knows: sharded by `key` columns, or a reference table (no key columns)."""

    name: str
    key: tuple[str, ...] = ()
    schema: str | None = None

    @property
    def reference(self) -> bool:
        """Whether every shard holds the same full copy."""
        return not self.key

    @property
    def fullname(self) -> str:
        """`schema.name`, or the name alone: the key under which SQLAlchemy's MetaData holds the table."""
        return f"{self.schema}.{self.name}" if self.schema else self.name


class Place(NamedTuple):
    """Where a token lives: the shard that owns it and the gate that covers it there."""

    shard: Shard
    gate: int


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """An immutable snapshot: version, shards, ring, gates, moves under way, hash function, tables.

    Invariants, checked at construction: names and ids are unique, and no name is or may become the id of another shard
    (`s` and a number); every owner in the ring is a shard; every shard
    that owns tokens has one default gate; gates with ranges belong to the owner of those ranges and do not overlap;
    no gate number and no shard number (17 of `s17`) is at or past the next free one; no range moves twice, and what
    moves is owned by the side that serves it.

    Raises:
        InvalidTopology: an invariant does not hold.
    """

    version: int
    cluster_id: str
    hash_function: str
    shards: tuple[Shard, ...]
    ring: Ring
    gates: tuple[Gate, ...]
    tables: tuple[Table, ...] = ()
    moves: tuple[Move, ...] = ()
    next_shard: int = 1
    next_gate: int = 1
    nonce: str = ""
    """Told apart by its writer: a lost reply of the catalog is settled by reading this back."""
    _by_id: dict[str, Shard] = field(init=False, repr=False)
    _by_name: dict[str, Shard] = field(init=False, repr=False)
    _default: dict[str, int] = field(init=False, repr=False)
    _gates: dict[str, tuple[int, ...]] = field(init=False, repr=False)
    _owners: tuple[Place, ...] = field(init=False, repr=False)
    _first: array[int] = field(init=False, repr=False)
    _special: tuple[tuple[int, int], ...] = field(init=False, repr=False)
    _tables: dict[str, Table] = field(init=False, repr=False)
    _hidden: dict[str, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "_by_id", {shard.id: shard for shard in self.shards})
        put(self, "_by_name", {shard.name: shard for shard in self.shards})
        put(self, "_tables", {table.fullname: table for table in self.tables})
        put(self, "_default", {gate.shard_id: gate.number for gate in self.gates if not gate.ranges})
        by_shard: dict[str, list[int]] = {}
        for gate in self.gates:
            by_shard.setdefault(gate.shard_id, []).append(gate.number)
        put(self, "_gates", {shard_id: tuple(sorted(numbers)) for shard_id, numbers in by_shard.items()})
        hidden: dict[str, set[int]] = {}
        for move in self.moves:
            where = move.target if move.state is MoveState.COPYING else move.source
            hidden.setdefault(where, set()).add(move.job)
        put(self, "_hidden", {shard_id: tuple(sorted(jobs)) for shard_id, jobs in hidden.items()})
        self._check_names()
        special = sorted((part.first, part.last, gate) for gate in self.gates for part in gate.ranges)
        self._check_gates(special)
        self._check_moves()
        put(self, "_first", array("Q", (first for first, _, _ in special)))
        put(self, "_special", tuple((last, gate.number) for _, last, gate in special))
        put(self, "_owners", tuple(Place(self._by_id[i], self._default[i]) for i in self.ring.shard_ids))

    def _check_names(self) -> None:
        if len(self._by_id) != len(self.shards) or len(self._by_name) != len(self.shards):
            raise InvalidTopology(
                f"topology {self.version} names a shard twice", "shard names and ids are unique in a cluster"
            )
        for shard in self.shards:
            if shard.name != shard.id and shard.name[:1] == "s" and _decimal(shard.name[1:]):
                raise InvalidTopology(
                    f"topology {self.version}: shard {shard.id!r} is named {shard.name!r}, the id of another one",
                    "names like s1 are the ids that shards get by themselves: name it otherwise",
                )
        highest = highest_number(self.shards)
        if highest >= self.next_shard:
            raise InvalidTopology(
                f"topology {self.version}: shard 's{highest}' is not below the next free number {self.next_shard}",
                _RESTORE,
            )
        for owner in self.ring.shard_ids:
            if owner not in self._by_id:
                raise InvalidTopology(
                    f"topology {self.version}: the ring gives tokens to {owner!r}, which is no shard", _RESTORE
                )
            if owner not in self._default:
                raise InvalidTopology(
                    f"topology {self.version}: shard {owner!r} owns tokens but has no default gate", _RESTORE
                )

    def _check_gates(self, special: list[tuple[int, int, Gate]]) -> None:
        numbers = [gate.number for gate in self.gates]
        if len(set(numbers)) != len(numbers):
            raise InvalidTopology(f"topology {self.version}: a gate number is used twice", _RESTORE)
        if max(numbers, default=0) >= self.next_gate:
            raise InvalidTopology(
                f"topology {self.version}: gate {max(numbers)} is not below the next free number {self.next_gate}",
                _RESTORE,
            )
        defaults = sum(1 for gate in self.gates if not gate.ranges)
        if defaults != len(self._default):
            raise InvalidTopology(f"topology {self.version}: a shard has two default gates", _RESTORE)
        before = -1
        for first, last, gate in special:
            if first <= before or last < first:
                raise InvalidTopology(f"topology {self.version}: the ranges of gate {gate.number} overlap", _RESTORE)
            before = last
            if not self.ring.owns(gate.shard_id, TokenRange(first, last)):
                raise InvalidTopology(
                    f"topology {self.version}: gate {gate.number} covers ranges that {gate.shard_id!r} does not own",
                    _RESTORE,
                )

    def _check_moves(self) -> None:
        taken: list[tuple[TokenRange, Move]] = []
        for move in self.moves:
            for end in (move.source, move.target):
                if end not in self._by_id:
                    raise InvalidTopology(
                        f"topology {self.version}: job {move.job} moves rows of {end!r}, which is no shard", _RESTORE
                    )
            if move.source == move.target:
                raise InvalidTopology(f"job {move.job} moves rows of {move.source!r} onto itself", _RESTORE)
            owner = move.source if move.state is MoveState.COPYING else move.target
            for part in move.ranges:
                if not self.ring.owns(owner, part):
                    raise InvalidTopology(
                        f"topology {self.version}: job {move.job} moves ranges that {owner!r} does not own", _RESTORE
                    )
                taken.append((part, move))
        taken.sort(key=lambda pair: pair[0])
        for (before, _), (part, move) in pairwise(taken):
            if part.first <= before.last:
                raise InvalidTopology(f"a range of job {move.job} is moving twice", _RESTORE)

    def hidden_on(self, shard_id: str) -> tuple[int, ...]:
        """The jobs whose rows a scan of this shard must not see, rising.

        They are the copies that arrive at a target, and those that stay on a source after the switch.
        """
        return self._hidden.get(shard_id, ())

    def place(self, token: int) -> Place:
        """The shard that owns a token and the gate that covers it there.

        Args:
            token: unsigned, 0 <= token < 2**64.
        Cost: one ring lookup, and one bisection more while some ranges have a gate of their own.
        """
        owner = self._owners[self.ring.index_of(token)]
        if self._special:
            i = bisect_right(self._first, token) - 1
            if i >= 0 and token <= self._special[i][0]:
                return Place(owner.shard, self._special[i][1])
        return owner

    def shard_of(self, token: int) -> Shard:
        """The shard that owns a token: `place(token).shard`, without a look at gates."""
        return self._owners[self.ring.index_of(token)][0]

    def gates_of(self, shard_id: str) -> tuple[int, ...]:
        """The numbers of all gates of a shard, rising: what a statement that reads the whole shard must hold."""
        return self._gates.get(shard_id, ())

    def scan_gates(self, shard_id: str) -> tuple[int, ...]:
        """What a statement that reads the whole shard must hold: all gates, and the key tables of `hidden_on`.

        The table of job 7, `shardlib.job_7_keys`, is number -7. One that is gone is refused like a closed gate.
        """
        gates = self.gates_of(shard_id)
        return (*gates, *(-job for job in self.hidden_on(shard_id))) if self.moves else gates

    def default_gate(self, shard_id: str) -> int:
        """The number of a shard's default gate.

        Raises:
            InvalidTopology: the shard has none, which only a shard without tokens may.
        """
        try:
            return self._default[shard_id]
        except KeyError:
            raise InvalidTopology(f"shard {shard_id!r} has no default gate", "it owns no tokens yet") from None

    def shard(self, name_or_id: str) -> Shard:
        """A shard by its name or its id.

        Raises:
            InvalidTopology: there is none, or the argument is no string.
        """
        found = self._by_id.get(name_or_id) or self._by_name.get(name_or_id)
        if found is None:
            known = ", ".join(shard.name for shard in self.shards) or "none"
            raise InvalidTopology(f"there is no shard {name_or_id!r}", f"the shards are: {known}")
        return found

    def shard_by_id(self, shard_id: str) -> Shard:
        """A shard by the id that this topology itself gave; KeyError for another."""
        return self._by_id[shard_id]

    def owners(self) -> tuple[Shard, ...]:
        """The shards that own at least one token, in the order of `shards`: those a scan must ask."""
        owning = set(self.ring.shard_ids)
        return tuple(shard for shard in self.shards if shard.id in owning)

    def table(self, fullname: str) -> Table | None:
        """The recorded table of that name (`schema.name` or `name`), or None."""
        return self._tables.get(fullname)

    def evolve(self, **changes: object) -> Topology:
        """The next version with these fields replaced; `version` rises by one unless given."""
        changes.setdefault("version", self.version + 1)
        return replace(self, **changes)  # type: ignore[arg-type]


def highest_number(shards: Iterable[Shard]) -> int:
    """The highest number of a shard, 17 for `s17`; 0 if there is none. Ids of another form are left out."""
    return max((int(tail) for shard in shards if shard.id[:1] == "s" and _decimal(tail := shard.id[1:])), default=0)


def _decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal()


_RESTORE = "the catalog's content is damaged; restore it, or publish a right one with a higher version"
