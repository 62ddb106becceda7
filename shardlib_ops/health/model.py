"""What is told of a shard's health: in the catalog, by commands and by the API. No value holds a password."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec

__all__ = ["Health", "Maintenance", "ServerHealth", "ShardHealth", "vital"]


class Health(StrEnum):
    """How a shard is, the best first."""

    HEALTHY = "healthy"
    """Its primary and all its replicas are up, and no replica is far behind."""
    DEGRADED = "degraded"
    """Its primary is up; a replica is down, is far behind, or is none."""
    UNHEALTHY = "unhealthy"
    """It has no primary that takes writes."""


class ServerHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One server of a shard, as it was seen last. What is not known is None, never zero.

    Attributes:
        endpoint: without its password.
        role: `primary` or `replica`, as the catalog has it.
        up: whether it answered, and is what the catalog says.
        problem: what is wrong with it; None if nothing is.
        note: what its operator should know besides.
        lag_bytes: replica: WAL of its primary that it has not replayed.
        lag_s: replica: for how many seconds, at least, what it has not replayed was written; 0 if it has all of it,
            also of a primary that writes nothing.
        latency_s: seconds that the question took, without connecting.
        timeline: of its WAL.
        xid_age: age of the oldest transaction id of its database, in transactions.
        slot_lag_bytes: WAL that it keeps for the slot that is behind most.
        disk_free: part of its disk that is free, 0 to 1, where that can be told.
    """

    endpoint: str
    role: str
    up: bool
    problem: str | None = None
    note: str | None = None
    lag_bytes: int | None = None
    lag_s: float | None = None
    latency_s: float | None = None
    timeline: int | None = None
    xid_age: int | None = None
    slot_lag_bytes: int | None = None
    disk_free: float | None = None


class ShardHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A shard, as its controller saw it last.

    Attributes:
        shard: its id.
        name: its name.
        status: how it is; only what lasts for some turns changes it.
        sentence: what the controller saw in its last turn, what it did, and why.
        maintenance: a person has said that nothing is to be done.
        servers: its primary, then its replicas.
        controller: who looks.
        at: UTC in ISO 8601, by the controller's clock: for people, nothing is decided by it.
    """

    shard: str
    name: str
    status: Health
    sentence: str
    maintenance: bool
    servers: tuple[ServerHealth, ...]
    controller: str = ""
    at: str = ""

    @property
    def primary_up(self) -> bool:
        """Whether there is a primary that takes writes."""
        return any(one.up for one in self.servers if one.role == "primary")

    @property
    def replicas_up(self) -> int:
        """How many replicas are up."""
        return sum(one.up for one in self.servers if one.role == "replica")


class Maintenance(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a shard is under maintenance, and who has said so last.

    Attributes:
        on: looks go on, and nothing is done.
        by: who has said so.
        reason: in their words.
        at: UTC in ISO 8601, for people.
    """

    on: bool
    by: str
    reason: str = ""
    at: str = ""


def vital(facts: Mapping[str, float], name: str) -> int | None:
    """A fact as a whole number; None if it is not known."""
    value = facts.get(name)
    return None if value is None else int(value)
