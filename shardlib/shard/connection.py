"""The connection of one shard that SQLAlchemy's Session and Core work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy.engine import Connection, CursorResult, Engine, NestedTransaction
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import PoolProxiedConnection

from shardlib.dsn import Dsn
from shardlib.errors import UnsupportedOperation
from shardlib.topology import Shard

if TYPE_CHECKING:
    from shardlib.fence.connection import FencedConnection

__all__ = ["FAN_OUT", "OWNED_ONLY", "ShardConnection"]

FAN_OUT: Final = "shardlib_fan_out"
"""The execution option that marks the statement which several connections are asked."""
OWNED_ONLY: Final = "shardlib_owned_only"
"""The execution option that marks a statement which must not see rows that the shard holds but does not own."""


def _no_detach() -> None:
    raise UnsupportedOperation(
        "a connection of a shard cannot be detached from its pool, which counts it and routes its transactions",
        "open a connection of your own to shard.primary",
    )


class _Answers(Protocol):
    def answer(self, conn: ShardConnection, statement: Any, parameters: Any, options: Any) -> CursorResult[Any]:
        """The answer of this connection to a statement that several are asked."""
        ...


class ShardConnection(Connection):
    """A `sqlalchemy.Connection` that knows its shard."""

    shard: Shard | None = None
    """Where its transaction runs."""
    fan_out: _Answers | None = None
    """Set while one statement runs on several connections side by side."""

    pinned: bool = False
    """Whether each of its transactions is routed as it begins (`engine.connect`)."""
    hidden: tuple[int, ...] = ()
    """The jobs whose rows are on the shard and not its own, by the topology that the transaction began with."""

    handed_out: bool = False
    """Whether the application has it (`session.connection()`), and may have written by text that nobody has read."""
    locks: bool = False
    """Whether a SELECT asked for row locks (`with_for_update`) in this transaction."""
    ended: bool = False
    """Set once its transaction was ended out of turn: what SQLAlchemy commits later finds nothing to do."""

    given_up: bool = False
    """Set once its transaction, which had nothing to keep, was lost after the one that decides was committed."""

    route: str = "pinned"
    """How its shard was chosen, for spans: `pinned`, or by each `statement`."""
    topology_version: int = 0
    """The topology that its transaction was routed by, for spans; 0 while nobody asks."""

    @property
    def shard_id(self) -> str:
        """The id of the shard whose pool it came from, `s1`."""
        shard_id: str = getattr(self.engine, "shard_id")  # noqa: B009 - of ShardEngine, which is made of this class
        return shard_id

    @property
    def driver(self) -> FencedConnection:
        """The psycopg connection underneath (its asyncio kind has the same fence)."""
        fairy: Any = self._dbapi_connection or self.connection
        record = fairy._connection_record  # noqa: SLF001 - `driver_connection` without its three calls
        return record.fenced if record is not None else fairy.driver_connection  # type: ignore[no-any-return]

    def outdated(self, endpoint: Dsn) -> bool:
        """Whether it leads elsewhere than to this endpoint, or its pool has let go of all that was open then."""
        fairy: Any = self._dbapi_connection or self.connection
        entry = fairy._connection_record  # noqa: SLF001 - as for `driver`
        return bool(entry.dsn != endpoint or entry.epoch != entry.home.member.epoch)

    def execute(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> CursorResult[Any]:
        """As `Connection.execute`."""
        fan_out = self.fan_out
        if fan_out is not None and execution_options and execution_options.get(FAN_OUT) is fan_out:
            return fan_out.answer(self, statement, parameters, execution_options)
        self._begin_first()
        return self.execute_here(statement, parameters, execution_options)

    def scalar(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        """As `Connection.scalar`."""
        self._begin_first()
        if self.hidden:
            with self._marked(execution_options):
                return super().scalar(statement, parameters, execution_options=execution_options)
        return super().scalar(statement, parameters, execution_options=execution_options)

    def exec_driver_sql(
        self, statement: str, parameters: Any = None, execution_options: Any = None
    ) -> CursorResult[Any]:
        """As `Connection.exec_driver_sql`."""
        self._begin_first()
        return super().exec_driver_sql(statement, parameters, execution_options)

    def _begin_first(self) -> None:
        # SQLAlchemy would begin after it has taken hold of the driver's connection, which routing may replace.
        if self.pinned and not self.in_transaction():
            self.begin()

    def execute_here(self, statement: Any, parameters: Any, execution_options: Any) -> CursorResult[Any]:
        """Execute on this connection alone, also while a statement runs on several."""
        if getattr(statement, "_for_update_arg", None) is not None:
            self.locks = True
        if self.hidden:
            with self._marked(execution_options):
                return super().execute(statement, parameters, execution_options=execution_options)
        return super().execute(statement, parameters, execution_options=execution_options)

    def owned_only(self) -> None:
        """The statement that is being executed must not see rows of `hidden`: for listeners of `before_execute`."""
        if self.hidden:
            self.dialect = self.engine.dialect.without_rows_of(self.hidden)  # type: ignore[attr-defined]

    @contextmanager
    def _marked(self, options: Any) -> Iterator[None]:
        """While a statement is executed that is marked `OWNED_ONLY`, or that a listener finds to be so.

        A listener of the one may execute another in between: each has its own dialect.
        """
        before, self.dialect = self.dialect, self.engine.dialect
        try:
            if options and options.get(OWNED_ONLY):
                self.owned_only()
            yield
        finally:
            self.dialect = before

    def execution_options(self, **options: Any) -> Any:
        """As `Connection.execution_options`; repeating the isolation level of a begun transaction is no change."""
        level = options.get("isolation_level")
        if level is not None and self.in_transaction() and level == self.get_execution_options().get("isolation_level"):
            del options["isolation_level"]
        return super().execution_options(**options)

    @property
    def connection(self) -> PoolProxiedConnection:
        """As `Connection.connection`; what it gives cannot be detached either."""
        fairy: Any = self._dbapi_connection
        if fairy is None:
            fairy = super().connection
        fairy.detach = _no_detach
        return fairy  # type: ignore[no-any-return]

    def detach(self) -> None:
        """Refused: see the error.

        Raises:
            UnsupportedOperation: always.
        """
        _no_detach()

    def begin_nested(self) -> NestedTransaction:
        """As `Connection.begin_nested`."""
        self._begin_first()
        return super().begin_nested()

    def _commit_impl(self) -> None:
        if self.ended:
            return
        try:
            super()._commit_impl()
        except SQLAlchemyError:
            if not self.given_up:  # else by a listener of this very commit: there is nothing left to commit
                raise

    def move_to(self, engine: Engine) -> None:
        """Go on with a connection of another engine (or a fresh one of the same). Nothing may have run on this one.

        If none can be had, this one is left `invalidated`: without a connection, to be moved again.
        """
        self.invalidate()
        self.engine, self.dialect = engine, engine.dialect
        self._dbapi_connection = engine.raw_connection()
