"""The options of the connection pools, checked once, with their units in their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from shardlib.errors import InvalidArgument

__all__ = ["ROLES", "PoolOptions", "Role"]

Role = Literal["primary", "replica"]
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
        self._at_least("pool_size", 0)
        self._at_least("max_overflow", 0)
        if self.pool_size + self.max_overflow < 1:
            raise InvalidArgument("pool_size", self.pool_size, "pool_size + max_overflow is at least 1")
        for name in ("max_connections", "connects_max", "breaker_failures", "keepalive_count"):
            self._at_least(name, 1)
        self._at_least("connect_timeout_s", 2)
        for name in ("keepalive_idle_s", "keepalive_interval_s"):
            self._at_least(name, 1)
        self._at_least("tcp_user_timeout_ms", 0)
        for name in (
            "pool_timeout_s",
            "idle_s",
            "max_lifetime_s",
            "breaker_wait_s_first",
            "breaker_wait_s_max",
        ):
            self._seconds(name, zero=False)
        self._seconds("idle_in_transaction_timeout_s", zero=True)
        if self.pre_ping_idle_s is not None:
            self._seconds("pre_ping_idle_s", zero=True)
        if self.breaker_wait_s_max < self.breaker_wait_s_first:
            raise InvalidArgument("breaker_wait_s_max", self.breaker_wait_s_max, "not below breaker_wait_s_first")
        if self.prepare_threshold is not None:
            self._at_least("prepare_threshold", 0)
        if not isinstance(self.application_name, str) or not self.application_name.isprintable():
            raise InvalidArgument("application_name", self.application_name, "printable text")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidArgument(name, value, f"a whole number, at least {least}")

    def _seconds(self, name: str, *, zero: bool) -> None:
        value = getattr(self, name)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 10**8
        if not fits or (value == 0 and not zero):
            raise InvalidArgument(name, value, f"seconds, {'0 or more' if zero else 'more than 0'}")

    @property
    def per_endpoint_max(self) -> int:
        """Connections to one endpoint, at most."""
        return self.pool_size + self.max_overflow
