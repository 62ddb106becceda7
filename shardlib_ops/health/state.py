"""How a shard is, judged from what its servers said. Pure: no clock, no server, no catalog."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardlib.dsn import Dsn
from shardlib_ops.failover.sighting import Sighting
from shardlib_ops.health.model import Health, ServerHealth, vital

__all__ = ["Lag", "Limits", "Positions", "Settled", "assess", "settle", "shared_servers"]

_ORDER: Final = tuple(Health)
_SAMPLES_MAX: Final = 4096
_RECEIVER_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on a replica is late, and how long something has to last.

    Attributes:
        lag_bytes: WAL that a replica may be behind.
        lag_s: seconds that it may be behind.
        worse_after: turns in a row after which a shard is called worse.
        better_after: turns in a row after which it is called better.
    """

    lag_bytes: int = 64 * 2**20
    lag_s: float = 10.0
    worse_after: int = 3
    better_after: int = 6


@dataclass(frozen=True, slots=True)
class Settled:
    """A status that does not follow each turn.

    Attributes:
        shown: the status.
        run: turns in a row that spoke for another one, all worse or all better.
        nearest: of those, the one that is the least far from `shown`.
    """

    shown: Health
    run: int = 0
    nearest: Health | None = None


def settle(before: Settled | None, seen: Health, limits: Limits) -> Settled:
    """The status after one more turn: it changes when enough turns in a row were all worse, or all better.

    It becomes what is the nearest among those turns: all of them were at least so bad, or so good.
    """
    if before is None:
        return Settled(seen)
    rank, shown = _ORDER.index(seen), _ORDER.index(before.shown)
    if rank == shown:
        return Settled(before.shown)
    worse = rank > shown
    run, nearest = 1, seen
    if before.nearest is not None and (_ORDER.index(before.nearest) > shown) == worse:
        run = before.run + 1
        nearest = min(seen, before.nearest, key=lambda one: abs(_ORDER.index(one) - shown))
    if run >= (limits.worse_after if worse else limits.better_after):
        return Settled(nearest)
    return Settled(before.shown, run, nearest)


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a replica is behind. None: it is not known."""

    bytes: int | None = None
    seconds: float | None = None


class Positions:
    """When a primary had written how much, by the monotonic clock of who asks.

    The age of what a replica lacks is told from these: no clock of a server takes part, and a primary that writes
    nothing makes no replica late.
    """

    def __init__(self) -> None:
        self._origin: tuple[str, int | None] | None = None
        self._at: list[float] = []
        self._written: list[int] = []

    def add(self, primary: Sighting) -> None:
        """What a primary said; positions of another server or another timeline are forgotten."""
        if primary.written is None:
            return
        origin = (primary.system, primary.timeline)
        if origin != self._origin or (self._written and primary.written < self._written[-1]):
            self._origin, self._at, self._written = origin, [], []
        if self._written and self._written[-1] == primary.written:
            return
        self._at.append(primary.at)
        self._written.append(primary.written)
        if len(self._at) > _SAMPLES_MAX:
            # Every other one of the older half: what is long ago need not be known to the half second.
            half = _SAMPLES_MAX // 2
            self._at[:half], self._written[:half] = self._at[1:half:2], self._written[1:half:2]

    def lag(self, replica: Sighting) -> Lag:
        """How far a replica was behind when it was asked; of the seconds, those that are certain."""
        if not self._written or replica.replayed is None or self._origin is None:
            return Lag()
        if replica.system != self._origin[0] or replica.timeline != self._origin[1]:
            return Lag()  # positions of two timelines cannot be compared
        behind = max(0, self._written[-1] - replica.replayed)
        if behind == 0:
            return Lag(0, 0.0)
        first = bisect_right(self._written, replica.replayed)
        return Lag(behind, max(0.0, replica.at - self._at[first]))


def assess(
    primary: Sighting,
    replicas: Sequence[Sighting],
    lags: Mapping[Dsn, Lag],
    limits: Limits,
    *,
    shared: str | None = None,
    late_before: frozenset[str] = frozenset(),
) -> tuple[Health, tuple[ServerHealth, ...]]:
    """How a shard looks in one turn.

    Args:
        primary: what the primary of the catalog said.
        replicas: the same of its replicas.
        lags: how far each replica is behind, if that is known.
        limits: see there.
        shared: that a server is named by another shard too; None if none is.
        late_before: endpoints that were late a turn ago: they have to come within half of the limits.
    """
    found = [_primary(primary, shared)]
    for replica in replicas:
        lag = lags.get(replica.endpoint, Lag())
        was = replica.endpoint.safe() in late_before
        found.append(_replica(primary, replica, lag, limits, was_late=was))
    if not found[0].up:
        return Health.UNHEALTHY, tuple(found)
    bad = any(one.problem is not None for one in found)
    return (Health.DEGRADED if bad else Health.HEALTHY), tuple(found)


def _primary(seen: Sighting, shared: str | None) -> ServerHealth:
    problem = None
    if not seen.answered:
        problem = f"does not answer: {seen.fault}"
    elif seen.standby:
        problem = "is a replica: it takes no writes"
    up = problem is None
    return _server(seen, "primary", up=up, problem=problem or shared, lag=Lag())


def _replica(primary: Sighting, seen: Sighting, lag: Lag, limits: Limits, *, was_late: bool) -> ServerHealth:
    problem, up = None, False
    if not seen.answered:
        problem = f"does not answer: {seen.fault}"
    elif primary.answered and seen.system != primary.system:
        problem = f"is no copy of the primary: its system identifier is {seen.system}, not {primary.system}"
    elif not seen.standby:
        problem = "takes writes, though it is a replica by the catalog"
    else:
        up = True
        if seen.receiver is None:
            problem = "streams from nobody"
        elif seen.paused:
            problem = "has its replay paused"
        elif _late(lag, limits, was_late=was_late):
            problem = "is late"
        elif primary.answered and not primary.standby and lag.bytes is None:
            problem = "is an unknown number of bytes behind"
    note = None
    if seen.answered and (timeout_s := seen.facts.get("wal_receiver_timeout_s")) is not None:
        if timeout_s == 0:
            note = "wal_receiver_timeout is off: whether its primary hangs cannot be told by it; set it to 3s"
        elif timeout_s > _RECEIVER_TIMEOUT_S:
            note = f"wal_receiver_timeout is {timeout_s:g} s: it tells of a primary that hangs no sooner; set it to 3s"
    return _server(seen, "replica", up=up, problem=problem, note=note, lag=lag if up else Lag())


def _late(lag: Lag, limits: Limits, *, was_late: bool) -> bool:
    part = 0.5 if was_late else 1.0
    too_far = lag.bytes is not None and lag.bytes > limits.lag_bytes * part
    return too_far or (lag.seconds is not None and lag.seconds > limits.lag_s * part)


def _server(
    seen: Sighting, role: str, *, up: bool, problem: str | None, lag: Lag, note: str | None = None
) -> ServerHealth:
    facts = seen.facts
    free, size = facts.get("disk_free_bytes"), facts.get("disk_bytes")
    return ServerHealth(
        endpoint=seen.endpoint.safe(),
        role=role,
        up=up,
        problem=problem,
        note=note,
        lag_bytes=lag.bytes,
        lag_s=lag.seconds,
        latency_s=facts.get("query_s"),
        timeline=seen.timeline,
        xid_age=vital(facts, "xid_age"),
        slot_lag_bytes=vital(facts, "slot_lag_bytes"),
        disk_free=free / size if free is not None and size else None,
    )


def shared_servers(seen: Mapping[str, Sequence[Sighting]]) -> dict[str, str]:
    """Which shards name servers of one and the same PostgreSQL cluster, and with whom: a failover would move both.

    Args:
        seen: shard -> what its servers said.

    Returns:
        shard -> what is wrong; without the shards that share nothing.
    """
    owners: dict[str, set[str]] = {}
    for shard, sightings in seen.items():
        for one in sightings:
            for mark in (one.system, f"{one.endpoint.host}:{one.endpoint.port}"):
                if mark:
                    owners.setdefault(mark, set()).add(shard)
    found: dict[str, set[str]] = {}
    for shards in owners.values():
        for shard in shards if len(shards) > 1 else ():
            found.setdefault(shard, set()).update(shards - {shard})
    return {
        shard: f"shares a server with {', '.join(sorted(others))}: correct the DSNs; nothing is promoted"
        for shard, others in found.items()
    }
