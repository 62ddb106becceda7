"""`ShardedSession`: a SQLAlchemy session whose statements run on the shards that own their keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Connection, Engine, event, inspect, util
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, SessionTransaction

from shardlib.errors import InvalidArgument, ShardKeyMismatch, ShardKeyRequired
from shardlib.key import encode_key
from shardlib.route.consistency import Consistency
from shardlib.route.extract import needs_of
from shardlib.session.ahead import ahead_of_flush, quick_leg
from shardlib.session.core import Ahead, Core, Needed
from shardlib.session.instances import InstanceKeys, changes_rows
from shardlib.session.rows import RowByRow
from shardlib.session.statements import check_core, route_statement
from shardlib.session.twophase import TwoPhase
from shardlib.session.unit import Leg, Unit
from shardlib.shard import ShardConnection
from shardlib.topology import Topology

if TYPE_CHECKING:
    from shardlib.engine.engine import ShardedEngine

__all__ = ["ShardedSession"]

_UNPINNED: Final = object()
_turn = count()


class ShardedSession(Session):
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
    shard_key: object = None
    two_phase: TwoPhase | None = None
    commits = 0
    """How many transactions of this session are committed."""
    observed = False
    """Whether it is inside of a call that is counted as a request."""
    _pin: bytes | None = None
    _unit: Unit | None = None
    _bulk: tuple[Leg, bool] | None = None
    _options: Mapping[str, Any] | None = None
    _ahead: Ahead | None = None
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
        if engine is None or bind is not None or kw.pop("binds", None):
            raise InvalidArgument(
                "bind", bind, "a ShardedSession takes its connections from a ShardedEngine: use engine.session()"
            )
        super().__init__(**kw)
        self.engine = engine
        self._core: Core = engine._core  # noqa: SLF001 - the engine's inside is shared with its sessions
        self.consistency = engine.consistency if consistency is None else Consistency.of(consistency)
        if shard_key is not _UNPINNED:
            self.shard_key = shard_key
            self._pin = encode_key(shard_key)
        if twophase:
            self.two_phase = TwoPhase(self._core)
            engine._help_to_settle()  # noqa: SLF001 - the same

    # -- the transaction ------------------------------------------------------------------------------------------

    @property
    def _now(self) -> Unit:
        """The unit of the transaction under way, or a new one that starts with its first connection."""
        unit = self._unit
        if unit is not None and unit.transaction is not None and unit.transaction is self.get_transaction():
            return unit
        if unit is not None and unit.opening:
            return unit  # of another thread or task, which `hold` tells
        unit = self._unit = Unit(self._core, self.two_phase.prepare if self.two_phase is not None else None)
        return unit

    def _adopt(self, conn: ShardConnection) -> None:
        self._connection_for_bind(cast("Engine", _Begun(conn)))  # what Session.connection() comes to
        if self._core.tracing:
            conn.route = "statement" if self._pin is None else "pinned"
            conn.topology_version = 0 if self._unit is None else self._unit.topology.version
        if self._unit is not None and self._unit.transaction is None:
            self._unit.transaction = self.get_transaction()

    def _hold(self, wants: Callable[[Topology], Needed], *, write: bool = False) -> list[Leg]:
        unit = self._now
        if self._core.metrics is not None:
            self._core.metrics.routed()
        if self._ahead is not None:
            self._ahead.close()  # before another connection is asked for: there may be only one
        legs = unit.hold(wants, self._adopt, self._begin_options)
        if write:
            unit.will_write(legs, twophase=self.two_phase is not None, within=self._nested_transaction)
        return legs

    def _hold_key(self, key: bytes, *, write: bool = False) -> Leg:
        unit = self._now
        if self._core.metrics is not None:
            self._core.metrics.routed()
        leg = unit.hold_key(key, self._adopt, self._begin_options, self._ahead)
        if write:
            unit.will_write((leg,), twophase=self.two_phase is not None, within=self._nested_transaction)
        return leg

    @property
    def _begin_options(self) -> Mapping[str, Any]:
        return {**self.execution_options, **self._options} if self._options else self.execution_options

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

    def _enlist(self, leg: Leg) -> Connection:
        """The leg's connection, inside the innermost savepoint: SQLAlchemy sets it when it first asks for it there."""
        if self.in_nested_transaction():
            return super().connection(bind_arguments={"bind": leg.connection.engine})
        return leg.connection

    def _any_shard(self, topology: Topology) -> Needed:
        """Reference tables are the same everywhere: a shard this transaction is on already, or any."""
        unit = self._unit  # of the `_hold` that asks
        for shard_id, leg in unit.legs.items() if unit is not None else ():
            return {shard_id: (min(leg.at_begin),)}
        owners = topology.owners()
        shard = owners[next(_turn) % len(owners)]
        return {shard.id: (topology.default_gate(shard.id),)}

    def _check_pin(self, keys: Iterable[bytes], where: str) -> None:
        pin = self._pin
        for key in keys:
            if key != pin:
                raise ShardKeyMismatch(self.shard_key, key.decode(errors="replace"), where)

    # -- what SQLAlchemy asks -------------------------------------------------------------------------------------

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
    def _instance_keys(self) -> InstanceKeys:
        return self.engine._instance_keys  # noqa: SLF001 - shared by the engine's sessions

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

    # -- bulk operations ------------------------------------------------------------------------------------------

    @property
    def _bulk_leg(self) -> Leg | None:
        """Where rows without objects are written. An autoflush in the midst of it sends objects to their own shards."""
        if self._bulk is None or self._flushing is not self._bulk[1]:
            return None
        return self._bulk[0]

    @contextmanager
    def _in_bulk(self, leg: Leg, *, flushing: bool) -> Iterator[None]:
        """While rows without objects are written: they all go to this leg.

        `flushing` tells whether SQLAlchemy takes the operation itself for a flush.
        """
        before, self._bulk = self._bulk, (leg, flushing)
        try:
            yield
        finally:
            self._bulk = before

    def _by_leg(self, rows: Mapping[bytes, list[int]]) -> list[tuple[Leg, list[int]]]:
        """Positions of rows, given by key, grouped by the leg that they are written to."""
        if self._pin is not None:
            self._check_pin(rows, "a row")
        self._hold(lambda topology: self._core.places(topology, tuple(rows)), write=True)
        unit = self._now
        groups: dict[str, list[int]] = {}
        for key, positions in rows.items():
            (shard_id,) = self._core.places(unit.topology, (key,))
            groups.setdefault(shard_id, []).extend(positions)
        return [(unit.legs[shard_id], sorted(set(positions))) for shard_id, positions in groups.items()]

    @contextmanager
    def _whole(self, parts: Sized) -> Iterator[None]:
        """Around a write that runs shard by shard: one that fails after a part of it undoes the transaction.

        As a failed flush does: nothing runs before the session (or its savepoint) is rolled back, so that no commit
        keeps a part.

        Args:
            parts: grows with every shard that is done.
        """
        try:
            yield
        except BaseException:
            transaction = self._transaction
            if len(parts) and transaction is not None and transaction.is_active:
                with util.safe_reraise():
                    transaction._begin().rollback(_capture_exception=True)  # noqa: SLF001 - as Session.flush does
            raise

    def _rows_by_leg(self, keys: Iterable[bytes]) -> list[tuple[Leg, list[int]]]:
        rows: dict[bytes, list[int]] = {}
        for position, key in enumerate(keys):
            rows.setdefault(key, []).append(position)
        return self._by_leg(rows) if rows else []

    def bulk_save_objects(
        self, objects: Iterable[object], return_defaults: bool = False, update_changed_only: bool = True,
        preserve_order: bool = True,
    ) -> None:  # fmt: skip
        """As SQLAlchemy's, grouped by shard."""
        rows = list(objects)
        keys = [self._instance_keys.writable_key_of(row) for row in rows]
        done: list[Leg] = []
        with self._whole(done):
            for leg, positions in self._rows_by_leg(keys):
                with self._in_bulk(leg, flushing=True):
                    super().bulk_save_objects(
                        [rows[i] for i in positions], return_defaults, update_changed_only, preserve_order
                    )
                done.append(leg)

    def bulk_insert_mappings(
        self, mapper: Any, mappings: Iterable[dict[str, Any]], return_defaults: bool = False,
        render_nulls: bool = False,
    ) -> None:  # fmt: skip
        """As SQLAlchemy's, grouped by shard."""
        of = inspect(mapper)
        rows = [self._instance_keys.with_defaults(of, row, in_place=return_defaults) for row in mappings]
        keys = [self._instance_keys.mapping_key(of, row) for row in rows]
        done: list[Leg] = []
        with self._whole(done):
            for leg, positions in self._rows_by_leg(keys):
                with self._in_bulk(leg, flushing=True):
                    super().bulk_insert_mappings(mapper, [rows[i] for i in positions], return_defaults, render_nulls)
                done.append(leg)

    def bulk_update_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]]) -> None:
        """As SQLAlchemy's, grouped by shard."""
        rows = list(mappings)
        keys = [self._instance_keys.mapping_key(inspect(mapper), row) for row in rows]
        done: list[Leg] = []
        with self._whole(done):
            for leg, positions in self._rows_by_leg(keys):
                with self._in_bulk(leg, flushing=True):
                    super().bulk_update_mappings(mapper, [rows[i] for i in positions])
                done.append(leg)


class _Begun:
    """Stands where SQLAlchemy expects an engine, and hands over a connection whose transaction has begun."""

    __slots__ = ("conn",)

    def __init__(self, conn: ShardConnection) -> None:
        self.conn = conn

    def connect(self) -> ShardConnection:
        return self.conn


def _shown(mapper: Any, clause: Any) -> str:
    if mapper is not None:
        return f"an operation on {getattr(mapper, 'class_', mapper)!r}"
    return "a statement" if clause is not None else "the connection"


def _route(state: ORMExecuteState, then: Callable[[ORMExecuteState], Any] | None = None) -> Any:
    result = route_statement(cast("ShardedSession", state.session), state)
    return then(state) if result is None and then is not None else result


@event.listens_for(ShardedSession, "after_transaction_end", propagate=True)
def _ended(session: Session, transaction: SessionTransaction) -> None:
    sharded: Any = session
    if transaction.nested:
        unit = sharded._now  # noqa: SLF001 - our own class
        for leg in unit.legs.values():
            leg.savepoint_ended()
        unit.savepoint_undone(transaction)  # of one that was kept, nothing is left to undo
    elif sharded.two_phase is not None and transaction.parent is None:
        sharded.two_phase.resolve()  # closing a session, as its `with` block does after an error, tells no rollback


@event.listens_for(ShardedSession, "after_flush", propagate=True)
def _flushed(session: Session, context: Any) -> None:
    sharded: Any = session
    if sharded._sent is not None:  # noqa: SLF001 - our own class
        sharded._check_sent()  # noqa: SLF001 - a refusal here undoes the flush, as any failure of it


@event.listens_for(ShardedSession, "after_commit", propagate=True)
def _finish(session: Session) -> None:
    sharded: Any = session
    savepoint = session.get_nested_transaction()
    if savepoint is not None:
        if sharded._unit is not None:  # noqa: SLF001 - our own class
            sharded._unit.savepoint_kept(savepoint)  # noqa: SLF001
        return
    sharded.commits += 1
    if sharded.two_phase is not None:
        sharded.two_phase.finish()


@event.listens_for(ShardedSession, "after_rollback", propagate=True)
def _resolve(session: Session) -> None:
    sharded: Any = session
    if sharded.two_phase is not None:
        sharded.two_phase.resolve()
