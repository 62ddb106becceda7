"""What an answer of the server means for the fence and for a commit. Pure."""

from __future__ import annotations

import psycopg
from psycopg import errors as pg

__all__ = ["GateClosed", "Silent", "commit_outcome_unknown", "is_closed_gate", "lost_connection"]


class GateClosed(Exception):  # noqa: N818 - an answer to act on, not a fault that reaches the user
    """The server no longer has one of these gates.

    In answer to the start of a transaction: nothing of it ran, and it has been rolled back. In answer to `lock_more`,
    what ran before is still there: the transaction has failed, and whoever owns it rolls it back.
    """

    def __init__(self, gates: tuple[int, ...]) -> None:
        super().__init__(gates)
        self.gates = gates


class Silent(psycopg.OperationalError):
    """The server gave no answer in time. The connection is closed: what it would answer yet, nobody hears."""


def is_closed_gate(error: BaseException) -> bool:
    """Whether the error of a `LOCK TABLE shardlib.gate_n` says that the gate is gone (SQLSTATE 42P01)."""
    return isinstance(error, pg.UndefinedTable)


def lost_connection(error: BaseException) -> bool:
    """Whether the session with the server is gone: nothing more can be learned from this connection."""
    if not isinstance(error, psycopg.Error):
        return False
    state = error.sqlstate
    return (state is None and isinstance(error, psycopg.OperationalError)) or (
        state is not None and (state.startswith("08") or state in _SHUTDOWN)
    )


def commit_outcome_unknown(error: BaseException) -> bool:
    """Whether this error in answer to COMMIT leaves open if the transaction is durable.

    An error message of the server with any other SQLSTATE than a lost or ended session means that the transaction
    was rolled back. A terminated backend may have written its commit record before it stopped to wait for a
    synchronous replica.
    """
    return lost_connection(error) or (isinstance(error, psycopg.Error) and error.sqlstate is None)


# admin_shutdown, crash_shutdown, cannot_connect_now, database_dropped, idle_session_timeout
_SHUTDOWN = frozenset({"57P01", "57P02", "57P03", "57P04", "57P05"})
