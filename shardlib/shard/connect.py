"""Opening one physical connection, and saying in our own words why it did not open."""

from __future__ import annotations

from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardlib.dsn import Dsn, hopeless, said_once, scrub
from shardlib.errors import ShardUnavailable
from shardlib.fence.verdict import lost_connection
from shardlib.secrets.command import CommandFailed
from shardlib.shard.options import PoolOptions
from shardlib.waits import Waits

__all__ = ["conninfo_in", "conninfo_of", "explain", "hopeless", "jittered_lifetime_s", "lost"]

# What a server says while it starts, stops or recovers (57P03); libpq gives the text of a failed login, not
# its code.
_NOT_YET: Final = (
    "starting up",
    "shutting down",
    "recovery",
    "not accepting connections",
    "not yet accepting",
)


def conninfo_of(dsn: Dsn, options: PoolOptions) -> str:
    """Libpq's connection string: the options, and the DSN's own parameters, which go before them.

    Reads the secret anew where the DSN holds a reference to it.

    Raises:
        InvalidArgument: the reference leads nowhere.
    """
    own = conninfo_to_dict(dsn.conninfo())
    params: dict[str, Any] = {
        "connect_timeout": options.connect_timeout_s,
        "keepalives": 1,
        "keepalives_idle": options.keepalive_idle_s,
        "keepalives_interval": options.keepalive_interval_s,
        "keepalives_count": options.keepalive_count,
        "tcp_user_timeout": options.tcp_user_timeout_ms,
        "application_name": options.application_name,
        **own,
    }
    if not options.pgbouncer and options.idle_in_transaction_timeout_s > 0:
        ours = f"-c idle_in_transaction_session_timeout={round(options.idle_in_transaction_timeout_s * 1000)}"
        params["options"] = f"{ours} {own.get('options') or ''}".rstrip()
    return make_conninfo("", **params)


def conninfo_in(waits: Waits, dsn: Dsn, options: PoolOptions, name: str) -> str:
    """`conninfo_of` without blocking an event loop.

    Args:
        waits: of the engine.
        dsn: the endpoint.
        options: of its pool.
        name: what errors call the shard.

    Raises:
        InvalidArgument: as `conninfo_of`.
        ShardUnavailable: a program that prints the password failed, and may not the next time.
    """
    try:
        return waits.call(conninfo_of, dsn, options) if dsn.slow else conninfo_of(dsn, options)
    except CommandFailed as error:
        reason = f"no password for {dsn.safe()}: {error.value}: {error.allowed}"
    raise ShardUnavailable(name, reason)


def explain(error: BaseException, dsn: Dsn, conninfo: str = "") -> tuple[str, bool]:
    """Why a connection failed, without secrets, and whether the endpoint did not answer at all.

    An endpoint that refuses a login or has no free slot is there: that opens no breaker.
    """
    text = scrub(said_once(str(error)), dsn.reveal(), conninfo)
    answered = "FATAL:" in text and not any(part in text for part in _NOT_YET)
    if isinstance(error, psycopg.ProgrammingError | psycopg.InterfaceError):
        answered = True  # a wrong connection parameter: nothing was even sent
    if answered:
        return f"{dsn.safe()} refused the connection: {text}", False
    return f"{dsn.safe()} did not answer: {text}", True


def lost(error: BaseException) -> bool:
    """Whether an error means that the connection broke under a statement (also as SQLAlchemy wraps it)."""
    return lost_connection(getattr(error, "orig", None) or error)


def jittered_lifetime_s(max_lifetime_s: float, jitter: float) -> float:
    """The life of one connection: up to a tenth shorter than the limit. `jitter` is in 0.5..1."""
    return max_lifetime_s * (0.8 + 0.2 * jitter)
