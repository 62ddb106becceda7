"""The connection pool of one endpoint: SQLAlchemy's Pool, with our accounts and one logic for threads and asyncio."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any, Final, cast

import psycopg
from psycopg.pq import ConnStatus, TransactionStatus
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

from shardlib.dsn import Dsn
from shardlib.errors import PoolTimeout, ShardUnavailable
from shardlib.shard.accounts import Claim, Member, Ticket
from shardlib.shard.breaker import Breaker
from shardlib.shard.budget import Section
from shardlib.shard.connect import conninfo_in, explain, hopeless, jittered_lifetime_s, lost
from shardlib.shard.context import PoolContext, PoolStats
from shardlib.shard.entry import PoolEntry
from shardlib.shard.options import Role
from shardlib.shard.probe import answers, cut, dead, let_go, poller_of, sever
from shardlib.waits import forget_after_fork

__all__ = ["ShardPool"]

_OK: Final = int(ConnStatus.OK)
_IDLE: Final = int(TransactionStatus.IDLE)
_PEEK_AFTER_S: Final = 0.001
"""A connection that came back less long ago is used without a look at its socket."""


class ShardPool(Pool):
    """Connections to one endpoint of a shard: the last one returned is the first one used.

    Waiting, limits and fairness are `ConnectionBudget`'s. This class does the I/O: it opens connections
    through the breaker, checks those that were idle, and closes.

    Args:
        context: what all pools of the engine share.
        shard: the shard's id.
        role: which of its endpoints.
        name: what errors call the shard.
        dsn: the endpoint at this moment.
        endpoint: gives the DSN by the latest topology; asked for every new connection.
        dispatch: event listeners of the pool that this one replaces.
    """

    def __init__(
        self,
        context: PoolContext,
        shard: str,
        role: Role,
        endpoint: Callable[[], Dsn],
        name: str,
        dsn: Dsn,
        dispatch: Any = None,
    ) -> None:
        self.context, self.shard, self.role, self.endpoint, self.name = context, shard, role, endpoint, name
        options = context.options
        super().__init__(cast("Any", self._connect), dialect=context.dialect.dialect, _dispatch=dispatch)
        self.member = Member(
            name,
            idle_max=options.pool_size,
            size_max=options.per_endpoint_max,
            connects_max=options.connects_max,
            breaker=self._new_breaker(),
        )
        self._budget = context.budget
        self._owner = context.waits.owner
        self._idle_s = options.idle_s
        self._pre_ping_s = inf if options.pre_ping_idle_s is None else options.pre_ping_idle_s
        self._check_s = min(self._idle_s, self._pre_ping_s)
        self.tried = dsn
        """The endpoint of the latest attempt."""
        self._entries: weakref.WeakSet[PoolEntry] = weakref.WeakSet()
        # SQLAlchemy would run the first connect event under a mutex: without a time limit, and under asyncio with a
        # lock of one event loop. Ours may run side by side (`SharedDialect.set_up`).
        events: Any = self.dispatch.connect.for_modify(self.dispatch)
        events._exec_w_sync_once = True  # noqa: SLF001 - the integration tests fail where it goes
        context.budget.join(self.member)
        forget_after_fork(self)

    def _new_breaker(self) -> Breaker:
        options = self.context.options
        return Breaker(options.breaker_failures, options.breaker_wait_s_first, options.breaker_wait_s_max)

    # -------------------------------------------------------------------------------------- SQLAlchemy's Pool

    def _do_get(self) -> ConnectionPoolEntry:
        budget, member, owner = self._budget, self.member, self._owner()
        while True:
            entry: Any = None
            with budget.lock:
                if stack := member.idle.get(owner):
                    entry = stack.pop()
            if budget.returned:
                budget.drain()
            if entry is None:
                claim = Claim()
                try:
                    entry = self._obtain(owner, claim)
                    if entry is None:
                        return self._open(claim)
                except BaseException:
                    budget.give_up(member, claim)
                    raise
            if self._usable(entry):
                return entry  # type: ignore[no-any-return]
            self._drop(entry)

    def _obtain(self, owner: object, claim: Claim) -> Any:
        """An entry, or None for a permit to open one; waits in the queue where it must."""
        budget, waits, timeout_s = self._budget, self.context.waits, self.context.options.pool_timeout_s
        taken = budget.take(self.member, owner, waits.waiter, claim)
        if not isinstance(taken, Ticket):
            return taken
        if not taken.waiter.wait(timeout_s) and not budget.leave(self.member, taken):
            raise PoolTimeout(self.name, timeout_s, self._detail())
        if taken.error is not None:
            raise taken.error
        claim.ticket, claim.permit = None, taken.permit
        return taken.entry

    def _open(self, claim: Claim) -> PoolEntry:
        """Use a permit: open a connection. If that fails, the permit is still the claim's."""
        try:
            entry = PoolEntry(self)
        except BaseException as error:
            if lost(error):  # while it was being set up: a failed attempt like any other
                raise ShardUnavailable(self.name, explain(error, self.tried)[0]) from None
            raise
        self._budget.connected(self.member, entry, claim)
        entry.fenced.sealed = True  # set up: from now on a transaction starts with a gate, or not at all
        return entry

    def lost(self, entry: PoolEntry) -> None:
        """A connection is collected whose permit nobody gave back: an interrupt took it from whoever had it."""
        self._budget.give_back(self.member, entry, False)

    def _usable(self, entry: PoolEntry) -> bool:
        """Whether a connection that lay idle can be used, without a round trip unless asked for."""
        now = monotonic()
        idle_s = now - entry.idle_since
        if entry.fenced.rolling_back and not self._heard(entry):
            return False
        if entry.fenced.rolling_back and idle_s > self._check_s:
            return False  # a server that has not answered for so long
        if idle_s > _PEEK_AFTER_S and not entry.fenced.rolling_back:
            if entry.pgconn.status != _OK or (entry.poller.poll(0) and dead(entry.pgconn)):
                return False
            if idle_s > self._check_s:
                return idle_s < self._idle_s and entry.expires_at > now and self._ping(entry)
        return entry.expires_at > now

    @staticmethod
    def _heard(entry: PoolEntry) -> bool:
        try:
            entry.fenced.hear_rollback()
        except psycopg.Error:
            return False
        return True

    def _ping(self, entry: PoolEntry) -> bool:
        try:
            return answers(entry.pgconn, self.context.waits, self.context.options.connect_timeout_s)
        except BaseException:
            self._drop(entry)
            raise

    def _drop(self, entry: PoolEntry) -> None:
        """Close a connection that was taken out, and free its permit."""
        try:
            entry.close()
        finally:
            self._budget.gone(self.member, entry)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        entry: Any = record
        entry.idle_since = now = monotonic()
        keep = (
            entry.dbapi_connection is not None
            # UNKNOWN of a closed one; ACTIVE while a ROLLBACK runs that nobody waits for
            and (entry.pgconn.transaction_status == _IDLE or entry.fenced.rolling_back)
            and entry.expires_at > now
            and entry.starttime > self._invalidate_time
            and entry.starttime > entry._soft_invalidate_time  # noqa: SLF001 - the record is of our class
        )
        self._budget.give_back(self.member, entry, keep)

    def _invalidate(
        self, connection: PoolProxiedConnection, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        """A server that broke one connection has broken those that lie idle: they are closed now."""
        super()._invalidate(connection, exception, _checkin)
        invalid_before = self._invalidate_time
        self._budget.close_idle((self.member,), lambda e: cast("PoolEntry", e).starttime < invalid_before)

    def dispose(self) -> None:
        """Close idle connections now and those in use when they come back."""
        self._budget.outdate(self.member)

    def recreate(self) -> ShardPool:
        """A new pool for the same endpoint, with the same listeners."""
        return type(self)(self.context, self.shard, self.role, self.endpoint, self.name, self.tried, self.dispatch)

    def status(self) -> str:
        """One line for people."""
        return f"{self.name} {self.role}: {self._detail()}"

    def stats(self) -> PoolStats:
        """The figures of this moment."""
        member = self.member
        with Section(self._budget), self._budget.lock:
            return PoolStats(
                self.shard, self.name, self.role, member.size, member.idle_count, member.in_use,
                member.connecting, len(member.waiting), member.breaker.state.value,
            )  # fmt: skip

    def _detail(self) -> str:
        now, budget = self.stats(), self._budget
        return (
            f"{now.in_use} in use, {now.idle} idle, {now.connecting} opening of {self.member.size_max}; "
            f"{budget.open} of {budget.limit} in this process; {now.waiting} waiting"
        )

    @property
    def cold(self) -> bool:
        """Whether a checkout would open a connection, and could do so at once: none is idle, and there is room."""
        member, budget = self.member, self._budget
        with Section(budget), budget.lock:
            room = member.size < member.size_max and budget.open < budget.limit
            return room and not member.idle.get(self._owner()) and member.may_connect(monotonic())

    # --------------------------------------------------------------------------------- physical connections

    def _connect(self, connection_record: ConnectionPoolEntry) -> Any:
        """SQLAlchemy's creator: one attempt through the breaker."""
        entry = cast("PoolEntry", connection_record)
        member, context = self.member, self.context
        dsn, epoch = self._latest()
        conninfo = conninfo_in(context.waits, dsn, context.options, self.name)
        jitter = context.random.uniform(0.5, 1.0)
        connection = None
        try:
            self._budget.begin_attempt(member)
            try:
                connection = self._dial(conninfo)
            except Exception as error:
                (reason, down), final = explain(error, dsn, conninfo), hopeless(error)
                let_go(error)
                if final:
                    dsn.refused()
                self._budget.end_attempt(member, reason if down else None, jitter)
                if not isinstance(error, psycopg.Error | OSError):
                    raise
            else:
                self._budget.end_attempt(member, None, jitter)
        except Exception:
            raise  # the breaker refused, or was told
        except BaseException as error:
            # Wherever it came, the breaker must not wait for an attempt that is over.
            let_go(error)
            self._budget.give_up_attempt(member)
            if connection is not None:
                self._close_connection(connection, terminate=True)
            raise
        if connection is None:  # raised here, so that the driver's error and its socket are not kept as its context
            raise ShardUnavailable(self.name, reason, final)
        driver = self._dialect.get_driver_connection(connection)
        try:
            self._adopt(entry, driver, dsn, epoch, jitter)
            context.on_connect(driver, self.shard)
        except BaseException:
            self._close_connection(connection, terminate=True)
            raise
        return connection

    def _latest(self) -> tuple[Dsn, int]:
        """The endpoint by the latest topology, and the epoch of its connections.

        A new one has no failures yet, and what is open to another is outdated: `follow` will not find it so once
        `tried` is the new one.
        """
        while True:
            # Before the endpoint is read: who outdates the pool meanwhile means this connection too.
            epoch = self.member.epoch
            dsn = self.endpoint()
            if dsn == self.tried:
                return dsn, epoch
            with Section(self._budget), self._budget.lock:
                self.member.breaker = self._new_breaker()
            self.tried = dsn
            self._budget.outdate(self.member)

    def _dial(self, conninfo: str) -> Any:
        context = self.context
        threshold = None if context.options.pgbouncer else context.options.prepare_threshold
        arguments = {"context": context.dialect.adapters, "prepare_threshold": threshold}
        if not context.waits.is_async:
            return context.connection_class.connect(conninfo, **arguments)
        return context.dialect.dialect.connect(conninfo, async_creator_fn=context.connection_class.connect, **arguments)

    def fell_silent(self, driver: Any, reason: str) -> None:
        """A connection got no answer where it should get one at once: for the breaker, a failed attempt to connect."""
        with Section(self._budget), self._budget.lock:
            dsns = [entry.dsn for entry in self._entries if entry.fenced is driver]
        if self.tried in dsns:  # else the topology has named another endpoint since
            jitter = self.context.random.uniform(0.5, 1.0)
            self._budget.end_attempt(self.member, f"{self.tried.safe()} did not answer: {reason}", jitter)

    def _adopt(self, entry: PoolEntry, driver: Any, dsn: Dsn, epoch: int, jitter: float) -> None:
        entry.owner = self._owner()
        entry.pgconn, entry.fenced = driver.pgconn, driver
        if not hasattr(driver, "rolling_back"):
            driver.rolling_back = False  # not one of the fence's classes: it always waits
        entry.poller = poller_of(driver.pgconn)
        entry.idle_since = now = monotonic()
        entry.expires_at = now + jittered_lifetime_s(self.context.options.max_lifetime_s, jitter)
        entry.epoch = epoch
        entry.set_up_until = now + self.context.options.connect_timeout_s
        entry.dsn = dsn
        with Section(self._budget), self._budget.lock:
            self._entries.add(entry)

    def cut_hanging(self) -> None:
        """Cut connections whose server took the login and then fell silent; whoever waits gets an error."""
        now = monotonic()
        with Section(self._budget), self._budget.lock:
            entries = list(self._entries)
        for entry in entries:
            if entry.set_up_until <= now:
                entry.set_up_until = inf
                cut(entry.pgconn)

    def moved(self) -> bool:
        """Whether the topology now names another endpoint than the one connected to last."""
        return self.endpoint() != self.tried

    def after_fork_in_child(self) -> None:
        """The connections are the parent's."""
        for entry in list(self._entries):
            entry.counted = False
            entry.epoch = -1
            if entry.dbapi_connection is not None:
                sever(entry.pgconn)
        self._entries = weakref.WeakSet()
