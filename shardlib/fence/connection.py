"""The gate, taken inside the first round trip of a transaction; and a COMMIT that tells the truth.

psycopg starts a transaction with a generator that its blocking and its asyncio connection share, so one mixin
serves both. Where psycopg would send ``BEGIN``, a fenced connection sends
``BEGIN; LOCK TABLE shardlib.gate_17 IN ACCESS SHARE MODE`` as one message: no round trip more. `LOCK TABLE` takes
no snapshot and looks the name up anew after every wait, so a gate that closes meanwhile refuses the transaction at
every isolation level.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, cast

import psycopg
from psycopg import errors as pg
from psycopg import generators, pq
from psycopg.abc import PQGen
from sqlalchemy.util import await_only

from shardlib.errors import InvalidTopology, UnsupportedOperation
from shardlib.fence.cursor import AsyncFencedCursor, AsyncFencedServerCursor, FencedCursor, FencedServerCursor
from shardlib.fence.looped import LoopedConnection
from shardlib.fence.verdict import GateClosed, commit_outcome_unknown, is_closed_gate

__all__ = [
    "AsyncFencedConnection",
    "FencedConnection",
    "UnknownCommit",
    "begins_without_gate",
    "drive",
    "lock_gates",
    "start",
]

T = TypeVar("T")

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_IDLE: Final = pq.TransactionStatus.IDLE
_INERROR: Final = pq.TransactionStatus.INERROR
_FATAL: Final = pq.ExecStatus.FATAL_ERROR
_IN_TRANSACTION: Final = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)
_COMMIT_AFTER_CANCEL_S: Final = 30.0


class UnknownCommit(psycopg.OperationalError):
    """COMMIT was sent and its outcome is unknown; the engine shows it as `CommitOutcomeUnknown`.

    A driver error here, so that SQLAlchemy sees a lost connection as one and lets go of it.
    """


if TYPE_CHECKING:
    _Base = psycopg.Connection[Any]
else:
    _Base = object


@lru_cache(maxsize=1024)
def lock_sql(gates: tuple[int, ...]) -> bytes:
    """The statement that takes these gates; -7 is the key table of job 7. Integers, so nothing needs quoting."""
    names = [b"shardlib.gate_%d" % number if number >= 0 else b"shardlib.job_%d_keys" % -number for number in gates]
    return b"LOCK TABLE %s IN ACCESS SHARE MODE" % b", ".join(names)


class _Fenced(_Base):
    """What the two connection classes share: no transaction without a gate, no commit that claims too much."""

    is_async: ClassVar[bool] = False
    shard_name: str = "?"
    sealed: bool = False
    """Once set, a transaction starts only with the gates of `arm`. Unset while the driver sets a connection up."""
    _gates: tuple[int, ...] = ()
    _sent: tuple[int, ...] = ()
    """The gates of a start that was sent and whose answer nobody has read yet."""
    _unreplicated: bool = False
    savepoint_undone: bool = False
    """Whether a savepoint was rolled back since this was looked at last: gates taken after it are not held any more."""
    only_read: bool = False
    """Set while a COMMIT is sent that has nothing to keep: one without an answer is a lost connection and no more."""
    guarded: bool = False
    """Set while a cursor begins that looks at what it is given."""
    rolling_back: bool = False
    """Whether a ROLLBACK was sent whose answer nobody has read yet."""

    def arm(self, gates: tuple[int, ...]) -> None:
        """The gates that the next transaction takes. They are used up by its start."""
        self.sealed = True
        self._gates = gates

    def send_begin(self, gates: tuple[int, ...]) -> None:
        """`arm`, and send the start of the transaction now; `begin` must be what is called next, and reads the answer.

        Where that cannot be done without waiting or fails, nothing is sent, and `begin` does all of it.
        """
        self.arm(gates)
        pgconn = self.pgconn
        if self.rolling_back or self._autocommit or self._pipeline or pgconn.transaction_status != _IDLE:
            return
        self._gates, self._sent = (), gates
        try:
            pgconn.send_query(self._start_command() + b"; " + lock_sql(gates))
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

    def roll_back_unheard(self) -> bool:
        """Send ROLLBACK without waiting for its answer; False if this transaction needs the usual way.

        The answer carries nothing: the server lets go of locks and gates as it reads the message, and a connection
        that is lost now is found so by whoever uses it next. What comes next on the connection reads it first.
        """
        if self.rolling_back:
            return True  # nothing was sent since: SQLAlchemy rolls back a second time as it gives a connection back
        pgconn = self.pgconn
        if not self.sealed or self._pipeline or self._tpc or self._num_transactions:
            return False
        if pgconn.transaction_status not in _IN_TRANSACTION:
            return False
        # psycopg lets go of what it has prepared in a transaction that is rolled back; so does this.
        forget = b"; DEALLOCATE ALL" if self._prepared.clear() else b""
        self._prepared._to_flush.clear()  # noqa: SLF001 - it goes along in the same message
        pgconn.send_query(b"ROLLBACK" + forget)
        pgconn.flush()
        self.rolling_back = True
        return True

    def hear_rollback(self) -> None:
        """Read the answer of a ROLLBACK as far as it has arrived, without waiting.

        Raises:
            psycopg.OperationalError: the connection was lost.
        """
        pgconn = self.pgconn
        pgconn.consume_input()
        while not pgconn.is_busy():
            if pgconn.get_result() is None:
                self.rolling_back = False
                return

    def _rolled_back(self) -> PQGen[None]:
        """Read the answer of a ROLLBACK to its end."""
        results = yield from generators.fetch_many(self.pgconn)
        self.rolling_back = False
        for result in results:
            if result.status == _FATAL:
                raise self._error(result)

    def _rollback_gen(self) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        if self._sent:
            yield from self._begin_unwanted()
        yield from super()._rollback_gen()

    def _check_intrans_gen(self, attribute: str) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        yield from super()._check_intrans_gen(attribute)

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
        if self.pgconn.transaction_status in _IN_TRANSACTION:
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
        if self.rolling_back or self.pgconn.transaction_status == _IDLE:
            yield from self._start_gated()

    def _start_gated(self) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        if self.pgconn.transaction_status != _IDLE:
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
        self.pgconn.send_query(self._start_command() + b"; " + lock_sql(gates))
        yield from self._gates_answer(gates, began=True)

    def lock_more(self, gates: tuple[int, ...]) -> PQGen[None]:
        """Take more gates inside the running transaction."""
        yield from self._ready()
        self.pgconn.send_query(lock_sql(gates))
        # A refusal leaves the transaction failed: rolled back here, a later COMMIT would keep nothing and say nothing.
        yield from self._gates_answer(gates, began=False)

    def message(self, command: bytes) -> PQGen[bytes]:
        """Send one simple-query message, of any number of statements, whose rows do not matter.

        Returns:
            The command tag of the last one.

        Raises:
            psycopg.Error: the first error that the server answers.
        """
        yield from self._ready()
        self.pgconn.send_query(command)
        tag = b""
        for result in (yield from generators.execute(self.pgconn)):
            if result.status == _FATAL:
                raise self._error(result)
            tag = result.command_status or b""
        return tag

    def prepare_transaction(self, command: bytes) -> PQGen[None]:
        """Send a PREPARE TRANSACTION, and believe it only if the server says that it did so.

        Raises:
            psycopg.errors.InFailedSqlTransaction: the transaction had failed or ended. PostgreSQL answers ROLLBACK
                then, and no error: nothing would be kept, and the other shards committed.
            psycopg.OperationalError: a synchronous replica may not have it.
            psycopg.Error: any other error that the server answers.
        """
        self._unreplicated = False
        tag = yield from self.message(command)
        if tag != b"PREPARE TRANSACTION":
            raise pg.InFailedSqlTransaction(
                f"the transaction on shard {self.shard_name!r} has failed or ended and cannot be prepared; "
                "roll it back and run it again"
            )
        if self._unreplicated:
            raise psycopg.OperationalError("the wait for a synchronous replica was cancelled while preparing")

    def _ready(self) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        self._check_connection_ok()

    def one_row(self, query: bytes) -> Generator[Any, Any, tuple[str, ...] | None]:
        """The first row of a query as text, or None if there is none, or no such table or schema."""
        yield from self._ready()
        self.pgconn.send_query(query)
        results = yield from generators.execute(self.pgconn)
        answer = results[-1]
        if answer.status == _FATAL:
            error = self._error(answer)
            if isinstance(error, pg.UndefinedTable | pg.InvalidSchemaName):
                return None
            raise error
        if answer.ntuples == 0:
            return None
        return tuple((answer.get_value(0, column) or b"").decode() for column in range(answer.nfields))

    def _gates_answer(self, gates: tuple[int, ...], *, began: bool) -> PQGen[None]:
        results = yield from generators.execute(self.pgconn)
        last = results[-1]
        if last.status != _FATAL:
            return
        error = self._error(last)
        if began and self.pgconn.transaction_status == _INERROR:
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

    def _error(self, result: pq.abc.PGresult) -> psycopg.Error:
        return pg.error_from_result(result, encoding=self.info.encoding)

    def _commit_gen(self) -> PQGen[None]:
        if self.rolling_back:
            yield from self._rolled_back()
        status = self.pgconn.transaction_status
        if status == _IDLE:
            return
        self._check_connection_ok()  # lost before COMMIT was sent: certainly not committed
        if status == _INERROR:
            # PostgreSQL would answer COMMIT with ROLLBACK and no error: nothing would be kept, and nobody told.
            raise pg.InFailedSqlTransaction(
                "the transaction has failed and cannot be committed; roll it back and run it again"
            )
        self._unreplicated = False
        try:
            yield from super()._commit_gen()
        except psycopg.Error as error:
            if commit_outcome_unknown(error) and not self.only_read:
                raise UnknownCommit(str(error).strip() or type(error).__name__) from error
            raise
        if self._unreplicated and not self.only_read:
            raise UnknownCommit("the wait for a synchronous replica was cancelled; the primary alone has it")

    def _see_notice(self, diagnostic: pg.Diagnostic) -> None:
        if diagnostic.sqlstate == "01000" and diagnostic.source_function == "SyncRepWaitForLSN":
            self._unreplicated = True


def begins_without_gate() -> UnsupportedOperation:
    """The refusal of the ways to begin a transaction that belong to the driver."""
    return UnsupportedOperation(
        "psycopg's transaction() and tpc_begin(), and SQLAlchemy's begin_twophase(), begin a transaction that holds "
        "no gate",
        "let the session or connection that routed it begin: engine.session(key), engine.connect(key), "
        "session(twophase=True); inside its transaction, begin_nested() makes a savepoint",
    )


class FencedConnection(_Fenced, psycopg.Connection[Any]):
    """A blocking psycopg connection behind the fence."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.cursor_factory = FencedCursor
        self.server_cursor_factory = FencedServerCursor
        self.add_notice_handler(self._see_notice)

    def rollback(self) -> None:
        """Roll back; see `roll_back_unheard`."""
        if not self.roll_back_unheard():
            super().rollback()


class AsyncFencedConnection(_Fenced, LoopedConnection):  # type: ignore[misc]
    """An asyncio psycopg connection behind the fence."""

    is_async = True

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.cursor_factory: Any = AsyncFencedCursor
        self.server_cursor_factory: Any = AsyncFencedServerCursor
        self.add_notice_handler(self._see_notice)

    async def rollback(self) -> None:  # type: ignore[override]
        """Roll back; see `roll_back_unheard`. Nothing is awaited, so a cancellation cannot leave it half done."""
        if not self.roll_back_unheard():
            await cast("Awaitable[None]", super().rollback())

    async def commit(self) -> None:  # type: ignore[override]
        """Commit; a cancellation that arrives meanwhile is kept back until the outcome is known.

        Passing it on would cancel the statement in the server, which ends the wait for a synchronous replica while
        the row stays: acknowledged to nobody, visible to all.
        """
        running = asyncio.ensure_future(cast("Awaitable[None]", super().commit()))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await _outcome(running)
            raise


async def _outcome(running: asyncio.Future[None]) -> None:
    """Wait for a COMMIT whose caller was cancelled, within a limit; raises its error, if it has one."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _COMMIT_AFTER_CANCEL_S
    while not running.done() and (remaining := deadline - loop.time()) > 0:
        try:
            await asyncio.wait([running], timeout=remaining)
        except asyncio.CancelledError:
            continue  # cancelled once more: the outcome still matters more
    if not running.done():
        running.cancel()
        raise UnknownCommit(f"cancelled, and no answer came within {_COMMIT_AFTER_CANCEL_S:g} s after that")
    running.result()


def drive(driver: FencedConnection | AsyncFencedConnection, generator: Generator[Any, Any, T]) -> T:
    """Run a generator of the connection to its end: blocking, or inside SQLAlchemy's greenlet for asyncio."""
    answer: Any = driver.wait(generator)
    return await_only(answer) if driver.is_async else answer  # type: ignore[no-any-return]


def start(driver: FencedConnection | AsyncFencedConnection, gates: tuple[int, ...]) -> None:
    """Begin a transaction that holds these gates, in one round trip.

    Raises:
        GateClosed: one of them is gone; nothing ran, and the connection is idle again.
        InvalidTopology: the schema is missing or the role may not take the gate.
        psycopg.Error: the connection was lost, or the server refused for another reason.
    """
    driver.arm(gates)
    drive(driver, driver.begin())


def lock_gates(driver: FencedConnection | AsyncFencedConnection, gates: tuple[int, ...]) -> None:
    """Take more gates inside the running transaction, in one round trip.

    Raises:
        GateClosed: one of them is gone; the transaction has failed and can only be rolled back.
    """
    drive(driver, driver.lock_more(gates))
