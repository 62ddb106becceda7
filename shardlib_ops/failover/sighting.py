"""What one server of a shard said when it was asked once. Decisions about health and failover start from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardlib.dsn import Dsn

__all__ = ["Sender", "Sighting"]


@dataclass(frozen=True, slots=True)
class Sender:
    """A replica as its primary sees it (`pg_stat_replication`).

    Attributes:
        name: its `application_name`, by which `synchronous_standby_names` means it.
        flushed: byte position up to which it has told that its WAL is on disk; None before it told.
        synchronous: whether the primary counts it for commits now (`sync` or `quorum`).
    """

    name: str
    flushed: int | None
    synchronous: bool


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a server said, or why it said nothing.

    Times are seconds of the asking process's monotonic clock; no wall clock takes part. Positions are bytes of WAL
    since its beginning (`lsn - '0/0'`), comparable on one timeline only.

    Attributes:
        endpoint: who was asked.
        at: when the asking began.
        took_s: seconds until the answer, or until it was given up.
        fault: why it said nothing, without secrets; None if it answered.
        refused: nothing listens at its address: the machine answers, the server does not run.
        system: system identifier; "" if unknown, as every value below then is.
        standby: whether it is in recovery.
        timeline: of its WAL.
        written: primary: position that is flushed.
        received: replica: position that is received and flushed.
        replayed: replica: position that is replayed.
        receiver: replica: `host:port` it streams from at this moment; None without a stream.
        heard: replica: a mark that differs when something was heard from its sender since; only compared.
        name: replica: the name under which it stands in `synchronous_standby_names` of its primary.
        paused: replica: its replay is paused.
        late: replica: it replays late on purpose.
        synchronous_standby_names: as set there.
        senders: primary: its replicas.
        facts: what health shows and no decision needs: `disk_free_bytes`, `xid_age`, `slot_lag_bytes`, ... by name.
    """

    endpoint: Dsn
    at: float
    took_s: float = 0.0
    fault: str | None = None
    refused: bool = False
    system: str = ""
    standby: bool | None = None
    timeline: int | None = None
    written: int | None = None
    received: int | None = None
    replayed: int | None = None
    receiver: str | None = None
    heard: str | None = None
    name: str = ""
    paused: bool = False
    late: bool = False
    synchronous_standby_names: str = ""
    senders: tuple[Sender, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """Whether it said anything."""
        return self.fault is None
