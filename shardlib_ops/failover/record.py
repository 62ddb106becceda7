"""What is written down of a failover before anything is done, and of a shard's synchronous replication while it lives.

`failovers/s1` and `synchrony/s1` in the catalog. Who writes holds the lease `promote-<shard id>`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, TypeVar

import msgspec

from shardlib.dsn import Dsn
from shardlib.errors import InvalidTopology

__all__ = ["FAILOVERS", "SYNCHRONY", "Failover", "Stage", "Synchrony", "decoded", "encoded"]

FAILOVERS: Final = "failovers/"
SYNCHRONY: Final = "synchrony/"


class Stage(StrEnum):
    """How far a failover is."""

    RECORDED = "recorded"
    CHOSEN = "chosen"
    SWITCHED = "switched"
    DONE = "done"
    UNDONE = "undone"

    @property
    def over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self in (Stage.DONE, Stage.UNDONE)


class Failover(msgspec.Struct, frozen=True, kw_only=True):
    """One failover of a shard; the last one stays in the catalog.

    Attributes:
        shard: id of the shard.
        name: its name.
        old: the primary that is replaced.
        replicas: the shard's replicas when it began.
        numbers: gate numbers that are kept for the new primary.
        names: `synchronous_standby_names` that was in force at the old primary; empty for none.
        wanted: the same as its operator had set it, before anything was lowered.
        members: replicas that the old primary had, by name; they count where `names` is `*`.
        written: last known position of the old primary; None if it is not known.
        system: system identifier of the shard's servers; "" if it is not known.
        asked: the replica that a person has named, or that an open promotion had asked already.
        allow_data_loss: a person has said that acknowledged commits may be lost.
        max_lag: bytes that the new primary may lack of `written`, where replication is asynchronous.
        strict: whether writes are to wait, for ever if need be, while no replica could acknowledge them.
        candidate: the replica that is promoted; None before it is chosen. It is not changed afterwards.
        timeline: of the candidate when it was chosen.
        received: its position then.
        lost_bytes: what is certain to be lost of `written`; None if it is not known.
        in_doubt: prepared transactions on the new primary, by gid, which wait for whoever coordinates them.
        stage: how far it is.
        began: UTC, ISO 8601, for people.
        ended: the same; None while it is open.
        left: what is left to do by hand, or why it came to nothing.
    """

    shard: str
    name: str
    old: Dsn
    replicas: tuple[Dsn, ...]
    numbers: tuple[int, ...] = ()
    names: str = ""
    wanted: str = ""
    members: tuple[str, ...] = ()
    written: int | None = None
    system: str = ""
    asked: Dsn | None = None
    allow_data_loss: bool = False
    max_lag: int = 16 * 2**20
    strict: bool = False
    candidate: Dsn | None = None
    timeline: int | None = None
    received: int | None = None
    lost_bytes: int | None = None
    in_doubt: tuple[str, ...] = ()
    stage: Stage = Stage.RECORDED
    began: str = ""
    ended: str | None = None
    left: str | None = None

    def changed(self, **changes: Any) -> Failover:
        """The record with these fields replaced."""
        return msgspec.structs.replace(self, **changes)


class Synchrony(msgspec.Struct, frozen=True, kw_only=True):
    """What a primary's commits wait for, as it was seen last. It never says more than was in force.

    Whoever lowers what is in force writes it here first; whoever raises it writes it here last.

    Attributes:
        shard: id of the shard.
        primary: `host:port` of the primary it was seen at.
        names: `synchronous_standby_names` in force; empty for none.
        wanted: the same, when nothing is lowered.
        members: replicas that the primary had, by name.
        lost: no replica acknowledges, though `wanted` asks for it: no failover by itself.
        reason: why it is lowered.
    """

    shard: str
    primary: str
    names: str = ""
    wanted: str = ""
    members: tuple[str, ...] = ()
    lost: bool = False
    reason: str = ""

    def changed(self, **changes: Any) -> Synchrony:
        """The record with these fields replaced."""
        return msgspec.structs.replace(self, **changes)


T = TypeVar("T", "Failover", "Synchrony")


def encoded(record: Failover | Synchrony) -> bytes:
    """As it is stored."""
    return msgspec.json.encode(record, enc_hook=_reveal)


def decoded(kind: type[T], data: bytes) -> T:
    """As it was stored.

    Raises:
        InvalidTopology: it is damaged, or of a later version.
    """
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=_dsn)
    except msgspec.DecodeError as error:
        raise InvalidTopology(
            f"the record of a failover cannot be read: {type(error).__name__}",
            "upgrade shardlib, or restore the catalog",
        ) from error


def _reveal(value: object) -> str:
    if isinstance(value, Dsn):
        return value.reveal()
    raise NotImplementedError(type(value))


def _dsn(kind: type, value: Any) -> Dsn:
    del kind  # the only one that msgspec does not know
    return Dsn(value)
