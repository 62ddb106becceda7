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

    An ERROR of the server means that the transaction was rolled back. A FATAL or a PANIC ends the session, and may come
    after the commit record was written: of a terminated backend that stopped to wait for a synchronous replica, of one
    that could not flush the WAL and whose server finds the record there as it recovers.
    """
    if not isinstance(error, psycopg.Error):
        return False
    state = error.sqlstate
    if state is None or lost_connection(error):
        return True
    return error.diag.severity_nonlocalized in _ENDS_SESSION and state not in _BEFORE_COMMIT


# admin_shutdown, crash_shutdown, cannot_connect_now, database_dropped, idle_session_timeout
_SHUTDOWN = frozenset({"57P01", "57P02", "57P03", "57P04", "57P05"})
_ENDS_SESSION = frozenset({"FATAL", "PANIC"})
# idle_in_transaction_session_timeout: raised before the server looks at the next command, which it then never does
_BEFORE_COMMIT = frozenset({"25P03"})
