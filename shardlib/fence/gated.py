"""The start of a transaction, with its gates in the same message; nothing else may start one.

Where psycopg would send ``BEGIN``, this sends ``BEGIN; LOCK TABLE shardlib.gate_17 IN ACCESS SHARE MODE`` as one
message: no round trip more. `LOCK TABLE` takes no snapshot and looks the name up anew after every wait, so a gate that
closes meanwhile refuses the transaction at every isolation level.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import generators, pq
from psycopg.abc import PQGen

from shardlib.errors import InvalidTopology, UnsupportedOperation
from shardlib.fence.talking import FATAL, IDLE, IN_TRANSACTION, INERROR, Talking
from shardlib.fence.verdict import GateClosed, is_closed_gate

__all__ = ["Gated", "Tally", "begins_without_gate", "lock_sql"]

_ACTIVE: Final = pq.TransactionStatus.ACTIVE


@lru_cache(maxsize=1024)
def lock_sql(gates: tuple[int, ...]) -> bytes:
    """The statement that takes these gates; -7 is the key table of job 7. Integers, so nothing needs quoting."""
    names = [b"shardlib.gate_%d" % number if number >= 0 else b"shardlib.job_%d_keys" % -number for number in gates]
    return b"LOCK TABLE %s IN ACCESS SHARE MODE" % b", ".join(names)


class Tally:
    """Counts the COMMITs of some transactions that are kept, or may be."""

    kept: int = 0


class Gated(Talking):
    """No transaction without a gate."""

    _gates: tuple[int, ...] = ()
    _sent: tuple[int, ...] = ()
    """The gates of a start that was sent and whose answer nobody has read yet."""
    savepoint_undone: bool = False
    """Whether a savepoint was rolled back since this was looked at last: gates taken after it are not held any more."""
    guarded: bool = False
    """Set while a cursor begins that looks at what it is given."""
    uncommitted: bool = False
    """Whether a transaction was asked for that is not committed, nor prepared: it is open, or has ended otherwise."""
    tally: Tally | None = None
    """Who wants to know whether this transaction is committed."""

    def arm(self, gates: tuple[int, ...]) -> None:
        """The gates that the next transaction takes. They are used up by its start."""
        self.sealed = self.uncommitted = True
        self._gates, self.tally = gates, None

    def send_begin(self, gates: tuple[int, ...]) -> None:
        """`arm`, and send the start of the transaction now; `begin` must be what is called next, and reads the answer.

        Where that cannot be done without waiting or fails, nothing is sent, and `begin` does all of it.
        """
        self.arm(gates)
        pgconn = self.pgconn
        if self.rolling_back or self._autocommit or self._pipeline or pgconn.transaction_status != IDLE:
            return
        self._gates, self._sent = (), gates
        try:
            pgconn.send_query(self._start_message(gates))
        except psycopg.Error:
            self._gates, self._sent = gates, ()

    def _begin_unwanted(self) -> PQGen[None]:
        """Read the answer to `send_begin` that nobody waits for any more."""
        gates, self._sent = self._sent, ()
        if self.pgconn.transaction_status == _ACTIVE:
            try:
                yield from self._gates_answer(gates, began=True)
            except GateClosed:
                return  # and no transaction is open

    def _rollback_gen(self) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        if self._sent:
            yield from self._begin_unwanted()
        yield from super()._rollback_gen()

    def begin(self) -> PQGen[None]:
        """Start the transaction now, with the gates of `arm`.

        One that is open already was begun by a call that was interrupted: it holds other gates, and ends first.
        """
        if self._sent:
            gates, self._sent = self._sent, ()
            yield from self._gates_answer(gates, began=True)
            return
        if self.rolling_back:
            yield from self._rolled_back()
        if self.pgconn.transaction_status in IN_TRANSACTION:
            yield from self._exec_command(b"ROLLBACK")
        yield from self._start_gated()

    def _exec_command(self, command: Any, *args: Any, **kwargs: Any) -> PQGen[Any]:
        # psycopg's own savepoints come this way.
        text = command if isinstance(command, bytes) else command.as_bytes(self)
        if text.startswith(b"ROLLBACK TO"):
            self.savepoint_undone = True
        return super()._exec_command(command, *args, **kwargs)

    def _start_command(self) -> bytes:
        return super()._get_tx_start_command()

    def _start_message(self, gates: tuple[int, ...]) -> bytes:
        message = self._start_command() + b"; " + lock_sql(gates)
        # SHOW takes no snapshot and comes before any query: SET TRANSACTION is free to follow.
        return message + b"; SHOW in_hot_standby" if self.pooled else message

    def _get_tx_start_command(self) -> bytes:
        # psycopg asks for it where it begins a transaction by itself, past `_start_query` and so without a gate.
        if self.sealed:
            raise begins_without_gate()
        return super()._get_tx_start_command()

    def _tpc_begin_gen(self, xid: Any) -> PQGen[None]:
        if self.sealed:
            raise begins_without_gate()  # before psycopg notes that a two-phase transaction is under way
        yield from super()._tpc_begin_gen(xid)

    def _start_query(self) -> PQGen[None]:
        if not self.sealed:
            yield from super()._start_query()
            return
        if not self.guarded:
            raise UnsupportedOperation(
                "a cursor of another class than connection.cursor() gives could end the transaction unseen",
                "use connection.cursor(), which takes a row_factory",
            )
        if self.rolling_back or self.pgconn.transaction_status == IDLE:
            yield from self._start_gated()

    def _start_gated(self) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        if self.pgconn.transaction_status != IDLE:
            return
        if self._autocommit:
            raise UnsupportedOperation(
                "a statement in AUTOCOMMIT mode runs outside any transaction, where no gate can be held",
                "use a transaction (engine.run, session.commit), or your own connection to shard.primary for "
                "statements that PostgreSQL refuses inside one",
            )
        if self._pipeline:
            raise UnsupportedOperation(
                "a transaction cannot start inside psycopg's pipeline mode", "execute a statement before the pipeline"
            )
        if not self._gates:
            raise UnsupportedOperation(
                "a statement would run on a shard's connection outside of a routed transaction",
                "begin a new transaction through the session or connection that routed it",
            )
        gates, self._gates = self._gates, ()
        self._check_connection_ok()
        self.pgconn.send_query(self._start_message(gates))
        yield from self._gates_answer(gates, began=True)

    def lock_more(self, gates: tuple[int, ...]) -> PQGen[None]:
        """Take more gates inside the running transaction."""
        yield from self._ready()
        self.pgconn.send_query(lock_sql(gates))
        # A refusal leaves the transaction failed: rolled back here, a later COMMIT would keep nothing and say nothing.
        yield from self._gates_answer(gates, began=False)

    def _gates_answer(self, gates: tuple[int, ...], *, began: bool) -> PQGen[None]:
        results = yield from generators.execute(self.pgconn)
        last = results[-1]
        if last.status != FATAL:
            if self.primary_only and self._on_standby(last, began):
                # It has the gates of its primary, but not all of what was written behind them.
                if began:
                    yield from self._exec_command(b"ROLLBACK")
                raise GateClosed(gates)
            return
        error = self._error(last)
        if began and self.pgconn.transaction_status == INERROR:
            yield from self._exec_command(b"ROLLBACK")
        if is_closed_gate(error):
            raise GateClosed(gates)
        if isinstance(error, pg.InvalidSchemaName):
            raise InvalidTopology(
                f"the database of shard {self.shard_name!r} has no schema shardlib",
                "it was dropped, or the DSN leads elsewhere; engine.create_all installs it again",
            ) from error
        if isinstance(error, pg.InsufficientPrivilege):
            raise InvalidTopology(
                f"role {self.info.user!r} may not take the gates of shard {self.shard_name!r}",
                f"grant it: engine.create_all(metadata, app_roles=[{self.info.user!r}])",
            ) from error
        raise error

    def _on_standby(self, last: pq.abc.PGresult, began: bool) -> bool:
        if not self.pooled:
            return self.pgconn.parameter_status(b"in_hot_standby") == b"on"
        return began and last.get_value(0, 0) == b"on"  # what it holds afterwards, it holds on the same server


def begins_without_gate() -> UnsupportedOperation:
    """The refusal of the ways to begin a transaction that belong to the driver."""
    return UnsupportedOperation(
        "psycopg's transaction() and tpc_begin(), and SQLAlchemy's begin_twophase(), begin a transaction that holds "
        "no gate",
        "let the session or connection that routed it begin: engine.session(key), engine.connect(key), "
        "session(twophase=True); inside its transaction, begin_nested() makes a savepoint",
    )
