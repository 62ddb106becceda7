"""`ShardedSession`: a SQLAlchemy session whose statements run on the shards that own their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Connection, event
from sqlalchemy.orm import Mapper, ORMExecuteState, SessionTransaction

from shardlib.errors import InvalidArgument, ShardKeyRequired
from shardlib.key import encode_key
from shardlib.route.consistency import Consistency
from shardlib.route.extract import needs_of
from shardlib.session.ahead import ahead_of_flush, quick_leg
from shardlib.session.bulk import WritesInBulk
from shardlib.session.core import Core, core_of
from shardlib.session.events import listen
from shardlib.session.instances import changes_rows
from shardlib.session.rows import RowByRow
from shardlib.session.statements import check_core, route_statement
from shardlib.session.twophase import TwoPhase
from shardlib.session.unit import Leg
from shardlib.shard import ShardConnection

if TYPE_CHECKING:
    from shardlib.engine.engine import ShardedEngine

__all__ = ["ShardedSession"]

_UNPINNED: Final = object()


class ShardedSession(WritesInBulk):
    """A SQLAlchemy `Session` over a `ShardedEngine`.

    With a shard key it is *pinned*: every statement runs on the shard that owns the key, in one native transaction.
    Without one, each statement and each row goes to the shard that owns its key; a transaction may read from several
    shards and write on one, or write on several with `twophase=True`.

    Made by `engine.session(...)` or by a `engine.sessionmaker(...)`. All arguments of SQLAlchemy's `Session` other
    than `bind`, `binds` and `twophase` work as they do there.

    Args:
        engine: the sharded engine.
        shard_key: pins the session to the shard of this key; a tuple for a composite key.
        twophase: allow writes on several shards, committed together by PostgreSQL's two-phase commit.
        consistency: how fresh reads must be; default is the engine's.

    Raises:
        InvalidShardKey: `shard_key` is None or of a type that cannot be a key.
        InvalidArgument: an unknown consistency word, or an engine that is not sharded.
    """

    # What most sessions never change lies in the class: a session is made for every transaction.
    engine: ShardedEngine
    observed = False
    """Whether it is inside of a call that is counted as a request."""
    _executing = 0
    _sent: list[tuple[object, bytes]] | None = None
    """The objects of a flush that listeners may change after they were routed, with the key they were routed by."""

    def __init__(
        self,
        bind: Any = None,
        *,
        engine: ShardedEngine | None = None,
        shard_key: object = _UNPINNED,
        twophase: bool = False,
        consistency: Consistency | str | None = None,
        **kw: Any,
    ) -> None:
        self._core: Core = core_of(engine, bind, kw.pop("binds", None))
        super().__init__(**kw)
        self.engine: ShardedEngine = engine  # type: ignore[assignment]
        self.consistency = self.engine.consistency if consistency is None else Consistency.of(consistency)
        if shard_key is not _UNPINNED:
            self.shard_key = shard_key
            self._pin = encode_key(shard_key)
        if twophase:
            if twophase is not True:
                raise InvalidArgument("twophase", twophase, "True or False")
            self.two_phase = TwoPhase(self._core)
            self.engine._help_to_settle()  # noqa: SLF001 - the same

    def _flush(self, objects: Any = None) -> None:
        """As SQLAlchemy's, with the transaction begun before it: the server answers while the rows are sorted."""
        if self._core.metrics is not None and not self.observed:
            with self._core.metrics.request("flush", self):
                self._flush(objects)
            return
        ahead = self._ahead = ahead_of_flush(self)
        try:
            super()._flush(objects)
        finally:
            self._ahead = self._sent = None
            if ahead is not None:
                ahead.close()

    def get_bind(self, mapper: Any = None, *, clause: Any = None, bind: Any = None, **kw: Any) -> Any:
        """The shard's engine for an operation that names no row: the pinned one, or the one being written to.

        Raises:
            ShardKeyRequired: the session is not pinned, and nothing tells which shard is meant.
        """
        if bind is not None:
            return bind
        bulk = self._bulk_leg
        if bulk is not None:
            return bulk.connection.engine
        if self._pin is not None:
            return self._hold_key(self._pin).connection.engine
        if self._flushing and mapper is not None and self._transaction is not None:
            return self._row_by_row(self._transaction)
        leg = self._only_leg()
        if leg is None:
            raise ShardKeyRequired(
                f"nothing tells which shard {_shown(mapper, clause)} is meant for",
                "open engine.session(key) for work on one shard",
            )
        return leg.connection.engine

    def _only_leg(self) -> Leg | None:
        """The one shard that is written to."""
        unit = self._now
        return unit.legs[next(iter(unit.writes))] if len(unit.writes) == 1 else None

    def _row_by_row(self, flush: SessionTransaction) -> RowByRow:
        """Where a flush sends rows that have no object, those of a many-to-many table.

        SQLAlchemy looks a connection up in the flush's own transaction first, which lasts as long as the flush, and
        neither commits nor closes what is noted there like this.
        """
        rows = RowByRow(self._write_rows)
        noted: dict[Any, Any] = cast("Any", flush._connections)  # noqa: SLF001
        noted[rows] = (rows, None, False, False)
        return rows

    def _write_rows(self, statement: Any, parameters: Any) -> int:
        """Execute a write of Core, each of its rows on the shard of its key; the number of rows it met."""
        sets = [parameters] if isinstance(parameters, Mapping) else list(parameters or ())
        needs = [needs_of(statement, one, self._core.described) for one in sets]
        if any(len(need.keys) != 1 for need in needs):
            raise ShardKeyRequired(
                f"a row of {statement.table.fullname} names no shard key", "hold the shard key in the association"
            )
        count = 0
        for leg, positions in self._rows_by_leg([need.keys[0] for need in needs]):
            count += self._enlist(leg).execute(statement, [sets[i] for i in positions]).rowcount
        return count

    def _execute_internal(self, statement: Any, params: Any = None, *, _add_event: Any = None, **kw: Any) -> Any:
        if self._core.metrics is not None and not self.observed:
            with self._core.metrics.request("execute", self):
                return self._execute_internal(statement, params, _add_event=_add_event, **kw)
        self._executing += 1
        try:
            if _add_event is None and not self.dispatch.do_orm_execute:
                leg = quick_leg(self, statement, params, **kw)
                if leg is not None:  # with nobody to tell, SQLAlchemy prepares the statement once and not twice
                    kw["bind_arguments"] = {**(kw.get("bind_arguments") or {}), "bind": leg.connection.engine}
                    return super()._execute_internal(statement, params, **kw)
            # Routing is the last listener of `do_orm_execute`: those of the application may change the statement.
            route = _route if _add_event is None else partial(_route, then=_add_event)
            return super()._execute_internal(statement, params, _add_event=route, **kw)
        finally:
            self._executing -= 1

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None) -> Connection:
        """The connection of the pinned shard, its transaction begun.

        `execution_options` (such as an isolation level) take effect if the transaction has not begun yet.

        Raises:
            ShardKeyRequired: the session is not pinned, and nothing tells which shard is meant.
        """
        if self._core.metrics is not None and not self.observed:
            with self._core.metrics.request("connection", self):
                return self.connection(bind_arguments, execution_options)
        if execution_options:
            self._options = dict(execution_options)
        try:
            conn = cast("ShardConnection", super().connection(bind_arguments=bind_arguments))
        finally:
            self._options = None
        if not conn.handed_out:
            conn.handed_out = True
            event.listen(conn, "before_execute", self._check_core)
        return conn

    def _check_core(self, conn: Connection, statement: Any, sets: Any, one: Any, options: Any) -> None:
        """Before the application executes on a connection of this session: does the statement belong there?"""
        if not self._flushing and not self._executing:
            rows_only = options.get("row_functions", ())
            check_core(self, conn, statement, sets or one or None, bool(options.get("all_shards")), rows_only)

    @property
    def connection_callable(self) -> Any:
        """SQLAlchemy's hook of a flush: the connection for each object. Off while rows are written in bulk."""
        return self._connection_for_object if self._bulk is None or self._bulk_leg is None else None

    @connection_callable.setter
    def connection_callable(self, value: object) -> None:
        pass  # SQLAlchemy's own class attribute is a default of None

    def _connection_for_object(self, mapper: Mapper[Any] | None, instance: object) -> Connection:
        key = self._instance_keys.writable_key_of(instance)
        if self._pin is not None and key != self._pin:
            self._check_pin((key,), f"this {type(instance).__name__}")
        if self._sent is not None or changes_rows(mapper):
            self._sent = self._sent or []
            self._sent.append((instance, key))
        return self._enlist(self._hold_key(key, write=True))

    def _check_sent(self) -> None:
        """Refuse a flush whose listeners have changed the key of a row that was sent by then."""
        for instance, key in self._sent or ():
            self._instance_keys.check_unchanged(instance, key)


def _shown(mapper: Any, clause: Any) -> str:
    if mapper is not None:
        return f"an operation on {getattr(mapper, 'class_', mapper)!r}"
    return "a statement" if clause is not None else "the connection"


def _route(state: ORMExecuteState, then: Callable[[ORMExecuteState], Any] | None = None) -> Any:
    result = route_statement(cast("ShardedSession", state.session), state)
    return then(state) if result is None and then is not None else result


listen(ShardedSession)
