"""One transaction of a session: the topology it routes by, and a fenced connection for each shard it touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

from psycopg import pq
from sqlalchemy import Connection, event
from sqlalchemy.orm import SessionTransaction

from shardlib.errors import CommitOutcomeUnknown, CrossShardTransaction, StaleTopology, UnsupportedOperation
from shardlib.fence.connection import lock_gates
from shardlib.fence.ending import has_ended
from shardlib.fence.verdict import GateClosed
from shardlib.session.core import Ahead, Core, Needed, as_sqlalchemy, is_read_only
from shardlib.session.leg import Leg
from shardlib.shard import ShardConnection
from shardlib.topology import Shard, Status, Topology

__all__ = ["Leg", "Unit"]

_Refusal = tuple[str, GateClosed]
"""The name of a shard, and the gates that it refused."""
_INTRANS: Final = pq.TransactionStatus.INTRANS


class Unit:
    """State of one root transaction of a session. It routes by the topology it began with, to its end."""

    __slots__ = ("_heard", "_stage", "core", "legs", "opening", "prepare", "topology", "transaction", "writes")

    def __init__(self, core: Core, prepare: Callable[[Unit], None] | None = None) -> None:
        self.core = core
        self.prepare = prepare
        """First phase of a commit of several shards."""
        self._stage: Literal["open", "running", "ready", "failed"] = "open"
        self._heard: set[ShardConnection] = set()
        self.topology: Topology = core.cache.current
        self.legs: dict[str, Leg] = {}
        self.writes: dict[str, SessionTransaction | None] = {}
        """The shards written to, each with the savepoint that its first write is inside of."""
        self.transaction: SessionTransaction | None = None
        self.opening = False
        """Whether a thread or task is opening connections for it at this moment."""

    def hold(
        self,
        wants: Callable[[Topology], Needed],
        adopt: Callable[[ShardConnection], None],
        options: Mapping[str, Any] | None = None,
    ) -> list[Leg]:
        """A leg for each shard that `wants` names, holding the gates it names.

        Before the first leg is there, nothing of the transaction has run: a closed gate then means to take a newer
        topology and ask `wants` again, for up to `reroute_timeout_s`. Later it is an error.

        Args:
            wants: the shards and gates needed, by a topology.
            adopt: makes a begun connection part of the session's transaction.
            options: execution options for new connections, set before their transaction begins.

        Raises:
            StaleTopology: a gate is closed and the transaction had begun, or no topology with an open one came.
            ShardUnavailable: a shard is not reachable.
            PoolTimeout: no connection became free in time.
        """
        return self._hold(wants, adopt, options, None)

    def hold_key(
        self,
        key: bytes,
        adopt: Callable[[ShardConnection], None],
        options: Mapping[str, Any] | None = None,
        ahead: Ahead | None = None,
    ) -> Leg:
        """The leg of the shard that owns one key, as `hold` gives it: what nearly every statement needs.

        `ahead` may be what it begins with.
        """
        shard, gate = self.topology.place(self.core.token(key))
        leg = self.legs.get(shard.id)
        if leg is not None and (gate in leg.at_begin or gate in leg.gates):
            return leg
        refusal: _Refusal | None = None
        if not self.legs and not self.opening:
            self.opening = True
            try:
                return self._first(shard, (gate,), adopt, options, ahead)
            except GateClosed as closed:
                refusal = shard.name, GateClosed(closed.gates)
            finally:
                self.opening = False
        return self._hold(lambda topology: self.core.places(topology, (key,)), adopt, options, refusal)[0]

    def _hold(
        self,
        wants: Callable[[Topology], Needed],
        adopt: Callable[[ShardConnection], None],
        options: Mapping[str, Any] | None,
        refusal: _Refusal | None,
    ) -> list[Leg]:
        """See `hold`; `refusal` is how the first attempt has ended already."""
        deadline, attempt = 0.0, 0
        while True:
            if refusal is not None:
                shard_name, closed = refusal
                if self.legs:
                    raise StaleTopology(shard_name, closed.gates[0], self.topology.version)
                if not deadline:
                    deadline = time.monotonic() + self.core.reroute_timeout_s
                self.topology = self.core.newer(self.topology, closed, shard_name, deadline, attempt)
                attempt += 1
            needed = wants(self.topology)
            if len(needed) == 1:  # nearly always: one dictionary hit
                ((shard_id, gates),) = needed.items()
                leg = self.legs.get(shard_id)
                if leg is not None and leg.gates.issuperset(gates):
                    return [leg]
            try:
                return self._take_alone(needed, adopt, options)
            except _Refused as refused:
                # Without the traceback, which would keep the connection.
                refusal = refused.shard, GateClosed(refused.closed.gates)

    def _take_alone(
        self, needed: Needed, adopt: Callable[[ShardConnection], None], options: Mapping[str, Any] | None
    ) -> list[Leg]:
        """`_take`, unless another thread or task is in it: both would open what only one may use."""
        if self.opening:
            raise UnsupportedOperation(
                "two threads or tasks use one session at the same time", "give each a session of its own"
            )
        self.opening = True
        try:
            return self._take(needed, adopt, options)
        finally:
            self.opening = False

    def _take(
        self, needed: Needed, adopt: Callable[[ShardConnection], None], options: Mapping[str, Any] | None
    ) -> list[Leg]:
        if len(needed) == 1 and not self.legs:
            ((shard_id, gates),) = needed.items()
            shard = self.topology.shard_by_id(shard_id)
            try:
                return [self._first(shard, gates, adopt, options)]
            except GateClosed as closed:
                raise _Refused(shard.name, closed) from None
        fresh: list[tuple[Shard, tuple[int, ...]]] = []
        for shard_id, gates in needed.items():
            leg = self.legs.get(shard_id)
            if leg is None:
                fresh.append((self.topology.shard_by_id(shard_id), gates))
            elif missing := tuple(gate for gate in gates if gate not in leg.gates):
                try:
                    with as_sqlalchemy(leg.connection):
                        lock_gates(leg.connection.driver, missing)
                except GateClosed as closed:
                    raise _Refused(leg.shard.name, closed) from None
                leg.took(missing)
        if fresh:
            self._open(fresh, adopt, options)
        return [self.legs[shard_id] for shard_id in needed]

    def _first(
        self,
        shard: Shard,
        gates: tuple[int, ...],
        adopt: Callable[[ShardConnection], None],
        options: Mapping[str, Any] | None,
        ahead: Ahead | None = None,
    ) -> Leg:
        """Begin the transaction on its first shard."""
        conn = self.core.connect(shard, gates, options, ahead)
        if self.topology.moves:
            conn.hidden = self.topology.hidden_on(shard.id)
        try:
            adopt(conn)
        except BaseException:
            if self._is_part(conn):
                self.legs[shard.id] = Leg(shard, conn, gates)
            else:
                conn.close()
            raise
        self.legs[shard.id] = leg = Leg(shard, conn, gates)
        return leg

    def _is_part(self, conn: ShardConnection) -> bool:
        """Whether the transaction will commit this connection, as it may though it could not be adopted.

        A listener of `after_begin` has failed, or the savepoint could not be set that the transaction is inside of. If
        the connection was lost by that, the commit meets it, and is refused.
        """
        root = self.transaction
        return root is not None and conn in root._connections  # noqa: SLF001 - no public way in all of 2.0

    def _open(
        self,
        fresh: list[tuple[Shard, tuple[int, ...]]],
        adopt: Callable[[ShardConnection], None],
        options: Mapping[str, Any] | None,
    ) -> None:
        """Begin on the new shards side by side; adopt none of them unless all have begun.

        If `adopt` fails, those that are part of the transaction by then stay so, and end with it; the others are given
        back.
        """
        begun: dict[str, ShardConnection] = {}
        refusals: list[Exception] = []

        def begin(shard: Shard, gates: tuple[int, ...]) -> None:
            # Errors are kept, not raised: what the others opened meanwhile must be given back first.
            try:
                begun[shard.id] = conn = self.core.connect(shard, gates, options)
                if self.topology.moves:
                    conn.hidden = self.topology.hidden_on(shard.id)
            except GateClosed as closed:
                refusals.append(_Refused(shard.name, closed))
            except Exception as error:  # noqa: BLE001 - raised below
                refusals.append(error)

        try:
            if len(fresh) == 1:
                begin(*fresh[0])
            else:
                self.core.waits.run_all([partial(begin, shard, gates) for shard, gates in fresh])
            if refusals:
                # An error that no newer topology mends goes first.
                raise next((e for e in refusals if not isinstance(e, _Refused)), refusals[0])
            for shard, gates in fresh:
                try:
                    adopt(begun[shard.id])
                finally:
                    if self._is_part(begun[shard.id]):
                        self.legs[shard.id] = Leg(shard, begun.pop(shard.id), gates)
        finally:
            self._commit_in_order()
            for conn in begun.values():
                conn.close()

    def _commit_in_order(self) -> None:
        """SQLAlchemy commits several connections in any order: what must come first, comes before the first of them."""
        if len(self.legs) < 2:
            return
        root = self.transaction
        listened = root is not None and bool(root.session.dispatch.after_begin)
        for leg in self.legs.values():
            if leg.connection not in self._heard:
                self._heard.add(leg.connection)
                leg.listened = listened
                event.listen(leg.connection, "commit", self._committing)

    def _committing(self, conn: Connection) -> None:
        """Commit the shards that were only read, then prepare; what is left is one COMMIT that decides.

        An error of theirs then means that nothing was kept. Shards with row locks are let go of after that COMMIT, as
        one server does it: whoever waits for a lock sees what was written under it.
        """
        del conn
        if self._stage in ("running", "ready"):
            return
        if self._stage == "failed":
            raise UnsupportedOperation("the commit of this transaction has failed", "roll it back and run it again")
        self._stage = "running"
        try:
            failed = [leg for leg in self.legs.values() if leg.connection.driver.pgconn.transaction_status != _INTRANS]
            for leg in failed:
                leg.connection._commit_impl()  # noqa: SLF001 - keeps SQLAlchemy's errors
            if failed:
                raise has_ended(failed[0].shard.name)
            locking = self._end_reads()
            if self.prepare is not None:
                try:
                    self.prepare(self)
                except BaseException as error:
                    if self.core.metrics is not None:
                        self.core.metrics.failed(error)
                    raise
            if locking:
                decider = self.decider.connection
                decider._commit_impl()  # noqa: SLF001 - as above
                decider.ended = True
        except BaseException:
            self._stage = "failed"
            raise
        self._stage = "ready"
        lost = [leg.shard.name for leg in locking if not leg.let_go()]
        if lost:
            raise CommitOutcomeUnknown(
                lost[0],
                "it was lost after the other shards had committed, and the application had the connection: it may have "
                "written there",
            )

    @property
    def decider(self) -> Leg:
        """Whose COMMIT decides: the last, by id, of the shards written to."""
        return self.legs[max(self.writes)]

    def _end_reads(self) -> list[Leg]:
        """Commit the shards that were only read, but for those whose row locks outlast the writes: these are left."""
        locking: list[Leg] = []
        for shard_id, leg in self.legs.items():
            if shard_id in self.writes:
                continue
            if self.prepare is not None and leg.may_have_written():
                self.writes[shard_id] = None
                continue
            if self.writes and leg.locks_to_the_end:
                leg.send(b"SELECT 1")  # its locks are there still
                locking.append(leg)
            else:
                leg.end_read()
        return locking

    def savepoint_kept(self, savepoint: SessionTransaction) -> None:
        """A savepoint was released: what was written inside of it belongs to the one around it."""
        outer = savepoint._previous_nested_transaction  # noqa: SLF001 - no public way
        for shard_id, within in self.writes.items():
            if within is savepoint:
                self.writes[shard_id] = outer

    def savepoint_undone(self, savepoint: SessionTransaction) -> None:
        """A savepoint was rolled back: shards that were written to inside of it alone are not written to.

        Those whose connection the application has may have been written to outside of it.
        """
        for shard_id, within in list(self.writes.items()):
            if within is savepoint and not self.legs[shard_id].connection.handed_out:
                del self.writes[shard_id]

    def will_write(self, legs: Sequence[Leg], *, twophase: bool, within: SessionTransaction | None = None) -> None:
        """Note that the transaction writes on these shards, inside of the savepoint `within` if there is one.

        Raises:
            CrossShardTransaction: it would write on several without two-phase commit.
            UnsupportedOperation: a shard is read-only.
        """
        if len(legs) == 1 and legs[0].shard.id in self.writes:
            return  # seen before, by the same topology
        for leg in legs:
            if leg.shard.status is Status.READONLY:
                raise is_read_only(leg.shard)
        ids = self.writes.keys() | {leg.shard.id for leg in legs}
        if not twophase and len(ids) > 1:
            raise CrossShardTransaction([self.legs[i].shard.name for i in sorted(ids)])
        for shard_id in ids:
            self.writes.setdefault(shard_id, within)


class _Refused(Exception):  # noqa: N818 - see GateClosed
    def __init__(self, shard: str, closed: GateClosed) -> None:
        super().__init__(shard, closed)
        self.shard, self.closed = shard, closed
