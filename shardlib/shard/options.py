"""The options of the connection pools, checked once, with their units in their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from shardlib.checks import FLAG, PRINTABLE, check_fields, either, seconds, whole
from shardlib.errors import InvalidArgument

__all__ = ["ROLES", "Echo", "PoolOptions", "Role"]

Role = Literal["primary", "replica"]
Echo = bool | Literal["debug"]
"""As SQLAlchemy's `create_engine` takes it."""
ROLES: Final[tuple[Role, ...]] = ("primary", "replica")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How connections are kept, for every shard of one engine.

    Raises:
        InvalidArgument: a value out of its bounds.
    """

    pool_size: int = 5
    """Idle connections kept to one endpoint, at most."""
    max_overflow: int = 10
    """Connections to one endpoint beyond `pool_size` while they are in use."""
    max_connections: int = 100
    """Connections of this engine in this process, to all endpoints together."""
    pool_timeout_s: float = 30.0
    """Wait for a connection, at most."""
    idle_s: float = 300.0
    """An idle connection is closed after so long."""
    max_lifetime_s: float = 3600.0
    """A connection is closed, when not in use, after so long (and up to 10 % less, so that not all go at
    once)."""
    pre_ping_idle_s: float | None = None
    """Ask the server (a round trip) before a connection that was idle for longer is used. None: never; a
    connection that the server has closed is noticed without."""
    connect_timeout_s: int = 5
    """For each address of the endpoint. libpq's own unit is whole seconds, and 2 its least."""
    connects_max: int = 4
    """Connection attempts to one endpoint at the same time."""
    breaker_failures: int = 3
    """So many failed attempts in a row, and requests for the endpoint fail at once for a while."""
    breaker_wait_s_first: float = 0.2
    """Until the first new attempt; doubled by each one that fails."""
    breaker_wait_s_max: float = 10.0
    keepalive_idle_s: int = 30
    keepalive_interval_s: int = 10
    keepalive_count: int = 3
    tcp_user_timeout_ms: int = 30_000
    """Sent data unacknowledged for so long ends the connection. 0: the system's own limit."""
    idle_in_transaction_timeout_s: float = 60.0
    """The server ends a transaction in which nothing happens for so long. 0: never. Not sent through
    PgBouncer."""
    application_name: str = "shardlib"
    pgbouncer: bool = False
    """The endpoints are PgBouncer in transaction mode: no startup options, no server-side prepared
    statements."""
    prepare_threshold: int | None = 5
    """psycopg prepares a statement on the server once it ran so often on one connection. None: never."""

    def __post_init__(self) -> None:
        check_fields(_RULES, self)
        if self.pool_size + self.max_overflow < 1:
            raise InvalidArgument("pool_size", self.pool_size, "pool_size + max_overflow is at least 1")
        if self.breaker_wait_s_max < self.breaker_wait_s_first:
            raise InvalidArgument("breaker_wait_s_max", self.breaker_wait_s_max, "not below breaker_wait_s_first")

    @property
    def per_endpoint_max(self) -> int:
        """Connections to one endpoint, at most."""
        return self.pool_size + self.max_overflow


_RULES: Final = {
    **dict.fromkeys(("pool_size", "max_overflow", "tcp_user_timeout_ms"), whole(0)),
    **dict.fromkeys(("max_connections", "connects_max", "breaker_failures"), whole(1)),
    **dict.fromkeys(("keepalive_idle_s", "keepalive_interval_s", "keepalive_count"), whole(1)),
    "connect_timeout_s": whole(2),
    **dict.fromkeys(("pool_timeout_s", "idle_s", "max_lifetime_s"), seconds()),
    **dict.fromkeys(("breaker_wait_s_first", "breaker_wait_s_max"), seconds()),
    "idle_in_transaction_timeout_s": seconds(zero=True),
    "pre_ping_idle_s": either(seconds(zero=True), None),
    "application_name": PRINTABLE,
    "pgbouncer": FLAG,
    "prepare_threshold": either(whole(0), None),
}
