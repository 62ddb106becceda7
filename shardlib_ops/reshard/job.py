"""A job: what is to move, how far it is, and which steps may follow. Pure.

::

    pending ─► precopy ─► deltasync ⇄ cutover ─► validation ─► cleanup ─► completed
       │          │           │          │            │           └─────► cancelled, rolled_back, failed
       └──────────┴─ cancel ──┴──────────┘            └─ rollback ─► cleanup
       └──────────┴── fail ───┴──────────┘

`cleanup` removes what is not wanted any more, whichever way the job went; `outcome` says what it will be after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

import msgspec

from shardlib.errors import InvalidTopology
from shardlib.ring import TokenRange
from shardlib.topology.model import Move

__all__ = [
    "WAY_BACK_LOST",
    "Job",
    "Kind",
    "Leg",
    "Status",
    "Wish",
    "decode_job",
    "encode_job",
    "legs_of",
]


WAY_BACK_LOST: Final = "the stream back to the old side is lost: `rollback` is not possible, `complete` is"


class Kind(StrEnum):
    """What was asked for. All of them are the same mechanism: moves of token ranges."""

    SPLIT = "split"
    MERGE = "merge"
    REBALANCE = "rebalance"
    DRAIN = "drain"
    MOVE_KEYS = "move_keys"


class Status(StrEnum):
    """How far a job is."""

    PENDING = "pending"
    PRECOPY = "precopy"
    DELTASYNC = "deltasync"
    CUTOVER = "cutover"
    VALIDATION = "validation"
    CLEANUP = "cleanup"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ROLLED_BACK = "rolled_back"

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more."""
        return self in _OVER


_OVER: Final = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.ROLLED_BACK})
_NEXT: Final[Mapping[Status, frozenset[Status]]] = {
    Status.PENDING: frozenset({Status.PRECOPY, Status.CLEANUP}),
    Status.PRECOPY: frozenset({Status.DELTASYNC, Status.CLEANUP}),
    # Back to the copy, when a slot or a server's data was lost.
    Status.DELTASYNC: frozenset({Status.CUTOVER, Status.PRECOPY, Status.CLEANUP}),
    Status.CUTOVER: frozenset({Status.DELTASYNC, Status.PRECOPY, Status.VALIDATION, Status.CLEANUP}),
    Status.VALIDATION: frozenset({Status.CLEANUP}),
    Status.CLEANUP: _OVER,
}


class Wish(StrEnum):
    """What an operator asked of a job. Its runner sees it within a second."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"
    ROLLBACK = "rollback"
    COMPLETE = "complete"


class Leg(msgspec.Struct, frozen=True):
    """Ranges on their way from one shard to another. `number` counts the legs of a job from 1."""

    number: int
    source: str
    target: str
    ranges: tuple[TokenRange, ...]


class Job(msgspec.Struct, frozen=True):
    """The durable record of a job. Its runner alone writes it, under the job's lease; see `replace`.

    Attributes:
        id: counts from 1, never used twice.
        kind: what was asked for.
        legs: what moves; a shard is source or target, never both.
        status: how far it is.
        outcome: what it will be when `cleanup` is done.
        created_at: UTC, ISO 8601; a label for people, no decision looks at it.
        started_at: when a runner first took it.
        completed_at: when it was over.
        error: what made it fail, or what it is waiting for.
        retention_s: seconds that both sides stay in step after the switch before the job completes by itself;
            None: until `complete` is called.
        switched_at: when the switch was seen to be done; the retention counts from it.
        attempts: attempts of cutover so far.
        compared: leg number -> LSN on the source up to which both sides were compared and found equal.
        purging: whether deleting of old copies may have begun: from then on there is no way back.
        servers: shard id -> the server that all of the above was done with, see `Side.identity`. Another one stands in
            for it after a failover, and need not hold the same.
    """

    id: int
    kind: Kind
    legs: tuple[Leg, ...]
    status: Status = Status.PENDING
    outcome: Status | None = None
    created_at: str = ""
    started_at: str | None = None
    completed_at: str | None = None
    error: str | None = None
    retention_s: float | None = None
    switched_at: str | None = None
    attempts: int = 0
    compared: dict[int, str] = {}
    purging: bool = False
    paused: bool = False
    servers: dict[str, str] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        """Ids of the shards that rows leave, each once."""
        return tuple(dict.fromkeys(leg.source for leg in self.legs))

    @property
    def targets(self) -> tuple[str, ...]:
        """Ids of the shards that rows arrive at, each once."""
        return tuple(dict.fromkeys(leg.target for leg in self.legs))

    @property
    def shards(self) -> tuple[str, ...]:
        """Sources, then targets."""
        return (*self.sources, *self.targets)

    @property
    def moves(self) -> tuple[Move, ...]:
        """The legs as the topology holds them, still copying."""
        return tuple(Move(self.id, leg.ranges, leg.source, leg.target) for leg in self.legs)

    @property
    def lease_name(self) -> str:
        """The lease that its runner holds."""
        return f"job-{self.id}"

    def to(self, status: Status, **changes: Any) -> Job:
        """The job in its next state.

        Raises:
            InvalidTopology: that state does not follow this one.
        """
        if status is not self.status and status not in _NEXT.get(self.status, frozenset()):
            raise InvalidTopology(
                f"job {self.id} is {self.status.value!r} and cannot become {status.value!r}", "load it again"
            )
        return self.changed(status=status, **{"paused": False, **changes})

    def changed(self, **changes: Any) -> Job:
        """The job with these fields replaced."""
        return msgspec.structs.replace(self, **changes)

    def checked(self) -> Job:
        """This job, if its legs make sense.

        Raises:
            InvalidTopology: no legs, a leg without ranges or from a shard to itself, or a shard that is source and
                target.
        """
        if not self.legs:
            raise InvalidTopology(f"job {self.id} moves nothing", "the plan is empty: everything is where it should be")
        if both := set(self.sources) & set(self.targets):
            raise InvalidTopology(f"shard {min(both)!r} would give rows and get rows in one job", "make two jobs of it")
        for leg in self.legs:
            if not leg.ranges:
                raise InvalidTopology(f"leg {leg.number} of job {self.id} has no ranges", "leave it out")
        return self


def legs_of(moves: Sequence[tuple[str, str, Sequence[TokenRange]]]) -> tuple[Leg, ...]:
    """(source, target, ranges) as numbered legs."""
    return tuple(Leg(number, source, target, tuple(parts)) for number, (source, target, parts) in enumerate(moves, 1))


def encode_job(job: Job) -> bytes:
    """JSON, which a person can read in the catalog. It holds no DSN."""
    return msgspec.json.encode(job)


def decode_job(data: bytes) -> Job:
    """A job from the bytes of `encode_job`.

    Raises:
        InvalidTopology: damaged, or of a later version.
    """
    try:
        return msgspec.json.decode(data, type=Job)
    except msgspec.DecodeError as error:
        raise InvalidTopology(
            f"a job's record cannot be read: {error}", "upgrade shardlib, or restore the catalog"
        ) from error
