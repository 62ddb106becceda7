"""Connections of a job's runner to the servers of its shards: pinned settings, a deadline, a name to be found by."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection
from psycopg import errors as pg

from shardlib.dsn import Dsn, scrub
from shardlib.errors import ShardUnavailable
from shardlib.secrets.command import CommandFailed

__all__ = ["SETTINGS", "Runner", "connect", "connect_blocking", "is_lost", "is_passing", "is_superseded"]

SETTINGS: Final = {
    # A value has one text on every server of a cluster: rows travel and are compared as text.
    "datestyle": "ISO, YMD",
    "timezone": "UTC",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    "quote_all_identifiers": "off",
    "search_path": "",
    # A copy takes as long as it takes; what waits for a lock says how long itself.
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
"""What each connection of a job sets, whatever the role's or the database's own settings are."""

_SUPERSEDED: Final = "SL001"
_ROUND_BITS: Final = 20
_TRANSACTION_TIMEOUT_SINCE: Final = 17_00_00


class Runner:
    """Who is at work: the job and a fencing token. Names the connections.

    Attributes:
        job: id of the job.
        token: a later holder of the job has a higher one, and so has the same holder in a later round.
    """

    __slots__ = ("job", "token")

    def __init__(self, job: int, token: int) -> None:
        self.job, self.token = job, token

    @classmethod
    def of_lease(cls, job: int, lease_token: int) -> Runner:
        """The runner that holds a lease, in its first round."""
        return cls(job, lease_token << _ROUND_BITS)

    def next_round(self) -> bool:
        """Have a higher token from now on: what was sent with the one before is refused after the next claim.

        Returns:
            False after a million rounds: the token would be one of the next lease's.
        """
        if (self.token + 1) >> _ROUND_BITS != self.token >> _ROUND_BITS:
            return False
        self.token += 1
        return True

    def application(self, what: str) -> str:
        """`application_name` of a connection."""
        return f"shardlib job {self.job} {self.token} {what}"


async def connect(
    dsn: Dsn, *, shard: str, application: str, replication: bool = False, timeout_s: int = 5, **more: Any
) -> AsyncConnection[Any]:
    """An autocommit connection with the settings of `SETTINGS`; the caller closes it.

    Args:
        dsn: where to.
        shard: the shard's name, for messages.
        application: `application_name`, see `Runner.application`.
        replication: for the replication protocol of this database.
        timeout_s: whole seconds for connecting.
        more: further parameters of libpq.

    Raises:
        ShardUnavailable: no answer in time, or the server refused; the message holds no password.
    """
    if replication:
        more["replication"] = "database"
    try:
        conninfo = (
            await asyncio.to_thread(_conninfo, dsn, application, timeout_s, more)
            if dsn.slow
            else (_conninfo(dsn, application, timeout_s, more))
        )
        connection = await AsyncConnection.connect(conninfo, autocommit=True)
    except CommandFailed as error:
        raise ShardUnavailable(shard, f"no password for {dsn.safe()}: {error.value}: {error.allowed}") from None
    except psycopg.Error as error:
        raise ShardUnavailable(shard, scrub(str(error).strip(), dsn.reveal())) from None
    try:
        if not replication and connection.info.server_version >= _TRANSACTION_TIMEOUT_SINCE:
            await connection.execute("SET transaction_timeout = 0")
    except BaseException:
        await connection.close()
        raise
    return connection


def connect_blocking(
    dsn: Dsn, *, shard: str, application: str, timeout_s: int = 5, **more: Any
) -> psycopg.Connection[Any]:
    """As `connect`, for what runs in a thread.

    Raises:
        ShardUnavailable: as `connect`.
    """
    try:
        connection = psycopg.connect(_conninfo(dsn, application, timeout_s, more), autocommit=True)
    except CommandFailed as error:
        raise ShardUnavailable(shard, f"no password for {dsn.safe()}: {error.value}: {error.allowed}") from None
    except psycopg.Error as error:
        raise ShardUnavailable(shard, scrub(str(error).strip(), dsn.reveal())) from None
    if connection.info.server_version >= _TRANSACTION_TIMEOUT_SINCE:
        connection.execute("SET transaction_timeout = 0")
    return connection


def _conninfo(dsn: Dsn, application: str, timeout_s: int, more: Mapping[str, object]) -> str:
    options = [f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in SETTINGS.items()]
    return dsn.conninfo(
        connect_timeout=timeout_s,
        application_name=application,
        options=" ".join(options),
        keepalives_idle=10,
        keepalives_interval=5,
        keepalives_count=3,
        tcp_user_timeout=20_000,
        **more,
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a server went away or is not there, so that the same may be tried again later."""
    if isinstance(error, ShardUnavailable):
        return True
    if not isinstance(error, psycopg.Error):
        return False
    state = error.sqlstate
    if state is None:
        return isinstance(error, psycopg.OperationalError)
    # A server that is read-only is a standby, or was fenced off: the primary is another one, or will be.
    return state.startswith(("08", "57P", "53")) or isinstance(error, pg.QueryCanceled | pg.ReadOnlySqlTransaction)


def is_passing(error: BaseException) -> bool:
    """Whether a statement failed since another session was in its way, so that it may succeed when that has ended."""
    # Not the class 55 as a whole: what a server is not set up for (55000) does not pass.
    return isinstance(error, pg.LockNotAvailable | pg.DeadlockDetected | pg.SerializationFailure | pg.ObjectInUse)


def is_superseded(error: BaseException) -> bool:
    """Whether a shard refused since another runner has taken the job."""
    return isinstance(error, psycopg.Error) and error.sqlstate == _SUPERSEDED
