"""What a session's transaction holds: the shards it is on, with their gates, and who takes one more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import count
from typing import Any, Final, cast

from sqlalchemy import Connection, Engine, util
from sqlalchemy.orm import Session

from shardlib.errors import ShardKeyMismatch
from shardlib.fence.gated import Tally
from shardlib.key.composite import shown_key
from shardlib.session.core import Ahead, Core, Needed
from shardlib.session.twophase import TwoPhase
from shardlib.session.unit import Leg, Unit
from shardlib.shard import ShardConnection
from shardlib.topology import Topology

__all__ = ["HoldsShards"]

_turn: Final = count()


class HoldsShards(Session):
    """The part of a `ShardedSession` that knows its transaction: its unit, and a leg of it for each shard."""

    # What most sessions never change lies in the class: a session is made for every transaction.
    shard_key: object = None
    two_phase: TwoPhase | None = None
    _core: Core
    _pin: bytes | None = None
    _unit: Unit | None = None
    _options: Mapping[str, Any] | None = None
    _ahead: Ahead | None = None
    _tally: Tally | None = None
    """Counts what is committed on its connections, by whomever, for `engine.run`."""

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
        if self._tally is not None:
            conn.driver.tally = self._tally
        try:
            self._connection_for_bind(cast("Engine", _Begun(conn)))  # what Session.connection() comes to
        finally:
            if self._unit is not None and self._unit.transaction is None:
                self._unit.transaction = self.get_transaction()
        if self._core.tracing:
            conn.route = "statement" if self._pin is None else "pinned"
            conn.topology_version = 0 if self._unit is None else self._unit.topology.version

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
                raise ShardKeyMismatch(self.shard_key, shown_key(key), where)

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

    def _rows_by_leg(self, keys: Iterable[bytes]) -> list[tuple[Leg, list[int]]]:
        rows: dict[bytes, list[int]] = {}
        for position, key in enumerate(keys):
            rows.setdefault(key, []).append(position)
        return self._by_leg(rows) if rows else []

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


class _Begun:
    """Stands where SQLAlchemy expects an engine, and hands over a connection whose transaction has begun."""

    __slots__ = ("conn",)

    def __init__(self, conn: ShardConnection) -> None:
        self.conn = conn

    def connect(self) -> ShardConnection:
        return self.conn
