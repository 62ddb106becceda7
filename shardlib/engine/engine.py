"""`ShardedEngine`: many PostgreSQL databases as one, for an application that knows SQLAlchemy."""

from __future__ import annotations

import logging
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import iscoroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from sqlalchemy import MetaData, event
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.orm import sessionmaker

from shardlib.catalog import POLL_S, Catalog, TopologyCache, open_catalog
from shardlib.checks import check
from shardlib.dsn import Dsn
from shardlib.engine.bulk import BulkProgress, BulkResult, bulk_load
from shardlib.engine.observe import Observer
from shardlib.engine.options import CALLS, EngineOptions
from shardlib.engine.pinned import connect_pinned
from shardlib.engine.schema import SchemaChange
from shardlib.errors import (
    CatalogUnavailable,
    CommitOutcomeUnknown,
    InvalidArgument,
    InvalidTopology,
    ShardKeyRequired,
    StaleTopology,
    UnsupportedOperation,
)
from shardlib.fence.connection import AsyncFencedConnection, FencedConnection, UnknownCommit, drive
from shardlib.fence.gate import check_control
from shardlib.fence.gated import Tally
from shardlib.fence.sql import READ_CONTROL
from shardlib.key import encode_key
from shardlib.route.consistency import Consistency
from shardlib.route.retry import RetryPolicy, next_wait
from shardlib.session.core import Core
from shardlib.session.instances import InstanceKeys
from shardlib.session.session import ShardedSession
from shardlib.session.settling import Settled, settle
from shardlib.shard import PoolOptions, PoolStats, ShardConnection, ShardPools
from shardlib.shard.options import Echo
from shardlib.telemetry import TelemetryOptions
from shardlib.token import token_of
from shardlib.topology import Shard, Topology
from shardlib.waits import GreenletWaits, ThreadWaits, Ticker

__all__ = ["ShardedEngine"]

T = TypeVar("T")

_log = logging.getLogger("shardlib.engine")
_NO_KEY: Final = object()
_SETTLE_EVERY_S: Final = 60.0
_POOL_NAMES: Final = frozenset(PoolOptions.__dataclass_fields__)


class ShardedEngine:
    """One SQLAlchemy engine per shard behind one face, routed by a topology kept in memory.

    ::

        engine = ShardedEngine("etcd://127.0.0.1:2379/shop", pool_size=5)
        with engine.session("tenant-42") as session:
            session.add(Order(tenant_id="tenant-42", id=1))
            session.commit()

    Thread-safe; survives `os.fork`; opens connections only when they are needed. A routing decision reads memory:
    it takes no lock and no network.

    Args:
        url: the catalog: `etcd://host:port[,host:port]/name`, `postgresql://...` or `memory://name`.
        consistency: how fresh reads must be, unless a session or statement says otherwise.
        hash_function: if given, a cluster that uses another one is refused.
        topology_file: a file that keeps the last topology, to start from while the catalog is down.
        catalog_timeout_s: seconds that one call of the catalog may take.
        poll_s: seconds between looks at the catalog beside its watch.
        reroute_timeout_s: seconds that work which has not begun waits to be routed anew.
        retry: how `run` tries again.
        telemetry: what it tells of its work, to OpenTelemetry and in `metrics`.
        echo: as in SQLAlchemy.
        **options: of the pools; see `PoolOptions` (`pool_size`, `max_overflow`, `max_connections`, ...).

    Raises:
        CatalogUnavailable: the catalog does not answer, and there is no saved topology.
        InvalidTopology: the catalog is empty, damaged, or of another hash function.
        InvalidArgument: an option with a wrong name or value.
    """

    _is_async = False

    def __init__(
        self,
        url: str,
        *,
        consistency: Consistency | str = Consistency.STRONG,
        hash_function: str | None = None,
        topology_file: str | Path | None = None,
        catalog_timeout_s: float = 3.0,
        poll_s: float = POLL_S,
        reroute_timeout_s: float = 15.0,
        retry: RetryPolicy | None = None,
        telemetry: TelemetryOptions | None = None,
        echo: Echo = False,
        **options: Any,
    ) -> None:
        self.options = EngineOptions(
            consistency=Consistency.of(consistency),
            hash_function=hash_function,
            topology_file=topology_file,
            catalog_timeout_s=catalog_timeout_s,
            poll_s=poll_s,
            reroute_timeout_s=reroute_timeout_s,
            retry=RetryPolicy() if retry is None else retry,
            telemetry=TelemetryOptions() if telemetry is None else telemetry,
            echo=echo,
        )
        self.consistency = self.options.consistency
        for name, value in options.items():
            if name not in _POOL_NAMES:
                known = sorted(_POOL_NAMES | set(EngineOptions.__dataclass_fields__))
                near = get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise InvalidArgument(name, value, f"{hint}the options are {', '.join(known)}")
        pool_options = PoolOptions(**options)
        self._catalog: Catalog = open_catalog(url, timeout_s=catalog_timeout_s, poll_s=poll_s)
        file = None if topology_file is None else Path(topology_file)
        self._cache = TopologyCache(self._catalog, file=file, poll_s=poll_s)
        try:
            self._cache.start(timeout_s=catalog_timeout_s)
            self._check_hash(self._cache.current)
            self._open(pool_options, echo)
        except BaseException:
            self._cache.close()
            self._catalog.close()
            raise

    def _check_hash(self, topology: Topology) -> None:
        wanted = self.options.hash_function
        if wanted is not None and wanted != topology.hash_function:
            raise InvalidTopology(
                f"the cluster hashes keys with {topology.hash_function!r}, this engine was told {wanted!r}",
                "leave hash_function away: it is chosen once, when a cluster is created",
            )

    def _open(self, pool_options: PoolOptions, echo: Echo) -> None:
        waits = GreenletWaits() if self._is_async else ThreadWaits()
        pools = ShardPools(
            waits,
            is_async=self._is_async,
            options=pool_options,
            on_connect=self._check_server,
            endpoint_of=self._endpoint_of,
            connection_class=AsyncFencedConnection if self._is_async else FencedConnection,
            name_of=lambda shard_id: self._cache.current.shard(shard_id).name,
            echo=echo,
        )
        event.listen(pools.dialect, "handle_error", _show_unknown_commit)
        self._core = Core(self._cache, pools, waits, self.options.reroute_timeout_s, self.options.catalog_timeout_s)
        self._instance_keys = InstanceKeys(self._core.described)
        self._token = token_of(self._cache.current.hash_function)
        self._schema_lock = threading.Lock()
        self._cache.listen(self._topology_changed)
        self._observer = Observer(self._core, self.options.telemetry)
        self._settler = Ticker(_SETTLE_EVERY_S * random.uniform(0.8, 1.2), self._settle_alone, "shardlib-settle")  # noqa: S311
        _engines.add(self)

    # -- the topology ---------------------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """The immutable snapshot that routes now."""
        return self._cache.current

    def refresh(self) -> Topology:
        """Ask the catalog for the newest topology now, instead of waiting for the watch.

        Raises:
            CatalogUnavailable: it does not answer in time.
            InvalidTopology: what it holds is gone, damaged, or may not follow the topology in memory: another cluster,
                another hash function, an older version. The engine goes on with what it has.
        """
        return self._core.refresh()

    def token(self, shard_key: object) -> int:
        """The unsigned 64-bit token of a shard key.

        Raises:
            InvalidShardKey: the value cannot be a key.
        """
        return self._token(shard_key)

    def shard_for(self, shard_key: object) -> Shard:
        """The shard that owns a key by the topology in memory.

        Raises:
            InvalidShardKey: the value cannot be a key.
        """
        return self._cache.current.shard_of(self._token(shard_key))

    def pool_status(self) -> list[PoolStats]:
        """The connection pools at this moment, by shard: open, idle and in use, and how many callers wait.

        Pools of shards that nothing was sent to yet are left out. Reads memory: no server is asked.
        """
        return self._core.pools.stats()

    def metrics(self) -> str:
        """The metrics of this engine in this process, in Prometheus' text format.

        The connection pools are always there; the rest if `TelemetryOptions(metrics=True)` was given or a meter
        provider of OpenTelemetry is configured. Reads memory: no server is asked.
        """
        return self._observer.text()

    def _topology_changed(self, topology: Topology) -> None:
        kept = {shard.id for shard in topology.shards}
        for shard_id in self._core.pools.endpoints():
            if shard_id not in kept:
                self._core.pools.drop(shard_id)
        self._core.pools.follow()

    def _endpoint_of(self, shard_id: str, role: str) -> Dsn:
        del role  # reads go to the primary, which satisfies every consistency level
        return self._cache.current.shard(shard_id).primary

    def _check_server(self, driver: FencedConnection | AsyncFencedConnection, shard_id: str) -> None:
        """On each new connection: is this the database of that shard, with a schema this library knows?"""
        self._observer.look()
        topology = self._cache.current
        shard = topology.shard(shard_id)
        driver.shard_name = shard.name
        driver.pooled = self._core.pools.options.pgbouncer
        found = drive(driver, driver.one_row(READ_CONTROL))
        if found is None:
            raise InvalidTopology(
                f"the database of shard {shard.name!r} has no schema shardlib",
                "run engine.create_all(metadata), which installs it, or correct the shard's DSN in the catalog",
            )
        version, cluster_id, owner = found
        check_control(
            (int(version), cluster_id, owner),
            cluster_id=topology.cluster_id,
            shard_id=shard_id,
            shard_name=shard.name,
        )

    # -- work -----------------------------------------------------------------------------------------------------

    def session(self, shard_key: object = _NO_KEY, **options: Any) -> ShardedSession:
        """A session: pinned to one shard if a key is given, routed statement by statement if not.

        Args:
            shard_key: any value that can be a key; a tuple for a composite key. None is an error, not "no key".
            **options: of `ShardedSession` and SQLAlchemy's `Session`.

        Raises:
            InvalidShardKey: the value cannot be a key.
        """
        if shard_key is not _NO_KEY:
            options["shard_key"] = shard_key
        return ShardedSession(engine=self, **options)

    def sessionmaker(self, **options: Any) -> sessionmaker[ShardedSession]:
        """A SQLAlchemy `sessionmaker` of `ShardedSession`; `maker(shard_key=...)` makes a pinned one."""
        return sessionmaker(class_=ShardedSession, engine=self, **options)

    def connect(self, shard_key: object = _NO_KEY) -> ShardConnection:
        """A Core connection to the shard that owns the key. Each of its transactions is routed anew as it begins.

        Raises:
            ShardKeyRequired: no key is given.
            InvalidShardKey: the value cannot be a key.
            ShardUnavailable, PoolTimeout: no connection could be had.
        """
        if shard_key is _NO_KEY:
            raise ShardKeyRequired(
                "a Core connection is one shard's", "write engine.connect(key), or use engine.session()"
            )
        return connect_pinned(self._core, encode_key(shard_key))

    @contextmanager
    def begin(self, shard_key: object = _NO_KEY) -> Iterator[ShardConnection]:
        """A Core connection in a transaction, committed at the end of the block; see `connect`."""
        conn = self.connect(shard_key)
        with conn, conn.begin():
            yield conn

    def _run_ddl_visitor(self, *args: object, **kw: object) -> None:
        # What MetaData.create_all and drop_all call on the engine that they are given.
        raise UnsupportedOperation(
            "metadata.create_all and drop_all work on one database",
            "use engine.create_all(metadata) and engine.drop_all(metadata), which know of every shard",
        )

    def run(self, work: Callable[[ShardedSession], T], *, shard_key: object = _NO_KEY, **options: Any) -> T:
        """Run a whole unit of work in a session of its own, commit it, and run it again when that is safe.

        `work` gets a fresh session at each attempt and must keep its effects inside it. It runs again after errors
        that certainly left nothing behind: a closed gate, an unreachable shard, a lost connection before COMMIT,
        a serialization failure, a deadlock. Never after `CommitOutcomeUnknown`, nor once `work` has committed itself.

        Args:
            work: called with the session; what it returns is returned after the commit.
            shard_key: pins the session.
            **options: as for `session`.

        Raises:
            InvalidArgument: `work` is a coroutine function.
            CommitOutcomeUnknown: COMMIT was sent and its outcome is not known.
            RetryableError: (StaleTopology, ShardUnavailable, PoolTimeout, CatalogUnavailable) the last attempt's, when
                there were as many as `retry` allows, or when another would be useless (`final`).
            sqlalchemy.exc.DBAPIError: as the database raises it; of those that are run again, the last attempt's.
            Exception: whatever else `work` raises, from the first attempt on.
        """
        attempt = 0
        while True:
            attempt += 1
            session = self.session(shard_key, **options)
            session._tally = tally = Tally()  # noqa: SLF001 - our own class
            try:
                with session:
                    answer = work(session)
                    if iscoroutine(answer):
                        answer.close()
                        raise InvalidArgument(
                            "work", work, "a plain function; a coroutine function needs AsyncShardedEngine.run"
                        )
                    session.commit()
                    return answer
            except Exception as error:
                if tally.kept:
                    raise  # a part of the work is there already
                wait_s = next_wait(error, attempt, self.options.retry, random.uniform(0.5, 1.0))  # noqa: S311
                if wait_s is None:
                    raise
                if isinstance(error, StaleTopology):
                    self._cache.ask()  # what watches the catalog may be cut off
                self._core.waits.sleep(wait_s)

    def bulk_load(
        self,
        table: Any,
        rows: Iterable[Any],
        *,
        columns: Sequence[Any] | None = None,
        progress: Callable[[BulkProgress], object] | None = None,
        batch_rows: int | None = None,
        stall_timeout_s: float = 300.0,
    ) -> BulkResult:
        """Load rows with COPY, into all shards side by side; a reference table's rows go to every shard in full.

        The rows are read once and never held as a whole: at most 1,024 of them, and 64 KiB of text for each shard.
        One connection of each shard concerned is in use. Values pass the types of their columns, as in an INSERT;
        a column that no row gives gets its `default`, or is left to the server.

        Not atomic across shards: nothing is committed before every shard has accepted all of its rows; then one
        shard after the other commits. With `batch_rows` each shard commits as it goes. As every transaction does,
        the load holds its gates: ranges that it writes to cannot be moved meanwhile, so load much in batches.

        Args:
            table: a Table (rows name its columns) or a mapped class of one table (rows name its attributes).
            rows: an iterable of mappings, or of tuples if `columns` is given. All give the same columns.
            columns: names of the columns that the rows give, in the order of the tuples; else the first row tells.
            progress: called about 10 times a second, and at the end, with a `BulkProgress`; what it raises ends
                the load.
            batch_rows: commit a shard after so many rows or a few more; None: everything at the end.
            stall_timeout_s: a shard may take no data, or give no answer, for so long (seconds).

        Raises:
            InvalidArgument, InvalidShardKey, ShardKeyRequired: of a row; the message or a note tells its number,
                counted from 1. As below, nothing is committed unless it is a `BulkLoadIncomplete`.
            InvalidTopology: the cluster does not know the table.
            UnsupportedOperation: a column needs SQL on its way in, or a shard is read-only.
            sqlalchemy.exc.DBAPIError: a shard refuses a row (IntegrityError, DataError, ...), or its connection was
                lost (OperationalError).
            StaleTopology: a gate was closed after rows had been sent.
            ShardUnavailable, PoolTimeout: a shard could not be reached, or stalled.
            CommitOutcomeUnknown: the one shard of the load gave no answer to COMMIT.
            BulkLoadIncomplete: it failed after something was committed (or may have been); it tells what.
        """
        return bulk_load(
            self._core, table, rows,
            columns=columns, progress=progress, batch_rows=batch_rows, stall_timeout_s=stall_timeout_s,
        )  # fmt: skip

    # -- schema ---------------------------------------------------------------------------------------------------

    def create_all(self, metadata: MetaData, *, app_roles: Sequence[str] = (), checkfirst: bool = True) -> None:
        """Create the tables on every shard, and record them with their keys in the catalog; idempotent.

        Also installs the schema `shardlib` where it is missing.

        Args:
            metadata: tables that mark their shard key (`info={"shard_key": True}`) or that they are reference
                tables (`info={"reference": True}`).
            app_roles: database roles of applications that do not own the schema: they get what the fence needs.
            checkfirst: as in SQLAlchemy.

        Raises:
            ShardKeyRequired: a table marks neither.
            InvalidShardKey: a column cannot be a shard key.
            InvalidTopology: the cluster has recorded a table with another key.
            ShardUnavailable: a shard is not reachable; the others may have their tables already: run it again.
            LockTimeout: transactions that use the tables did not end within 10 seconds; the message names them.
            UnsupportedOperation: a job is moving rows, and a table is new to the cluster; with tables that it knows,
                nothing is done then. If the job began meanwhile, the tables are there and not recorded: run it again
                when it is over.
            CatalogUnavailable: it does not answer in time; the tables may be there already: run it again.
        """
        check(CALLS, {"app_roles": app_roles})
        with self._schema_lock:
            self._schema_change().create_all(metadata, app_roles=app_roles, checkfirst=checkfirst)

    def drop_all(self, metadata: MetaData, *, checkfirst: bool = True) -> None:
        """Drop the tables on every shard and forget them in the catalog. Raises as `create_all` does."""
        with self._schema_lock:
            self._schema_change().drop_all(metadata, checkfirst=checkfirst)
            for table in metadata.tables.values():
                self._core.specs.pop(table, None)

    def register(self, metadata: MetaData) -> None:
        """Record tables in the catalog that something else creates (Alembic, for example); idempotent.

        Raises:
            ShardKeyRequired: a table marks neither a shard key nor that it is a reference table.
            InvalidShardKey: a column cannot be a shard key.
            InvalidTopology: the cluster has recorded a table with another key.
            CatalogUnavailable: it does not answer in time; the tables may have been recorded.
            UnsupportedOperation: a job is moving rows, and a table is new to the cluster.
        """
        with self._schema_lock:
            self._schema_change().record(metadata)

    def _schema_change(self) -> SchemaChange:
        return SchemaChange(self._catalog, self._cache, self._core.pools.options)

    # -- in-doubt transactions ------------------------------------------------------------------------------------

    def settle(self, *, older_than_s: float = 60.0) -> list[Settled]:
        """Finish two-phase transactions whose session was lost, by the verdict at their deciding shard.

        An engine that has opened a two-phase session does so by itself about once a minute, one process of the cluster
        at a time; this does it now.

        A part that cannot be settled and a shard that cannot be looked at are entries of the answer, with the reason
        and what to do. Decisions that nobody can need any more are deleted. Nothing is settled while the catalog does
        not answer: it alone tells where the deciding shard's primary is now.

        Args:
            older_than_s: leave younger ones to their session.

        Returns:
            One entry for each transaction in doubt, and for each shard that could not be looked at.

        Raises:
            InvalidArgument: `older_than_s` is not a number of seconds.
        """
        check(CALLS, {"older_than_s": older_than_s})
        return settle(self.topology, older_than_s=older_than_s, newest=self._core.refresh)

    def _help_to_settle(self) -> None:
        """From its first two-phase session on, this process helps to settle what others left in doubt."""
        if not self._settler.running:
            self._settler.start()

    def _settle_alone(self) -> None:
        """Settle, unless another process of the cluster is at it."""
        try:
            lease = self._catalog.acquire("settle", ttl_s=_SETTLE_EVERY_S, holder=f"process {os.getpid()}", wait_s=0.0)
        except CatalogUnavailable:
            return  # nothing is lost by waiting for the next time
        if lease is not None:
            with lease:
                settle(self.topology, older_than_s=_SETTLE_EVERY_S, newest=self._core.refresh)

    # -- its end --------------------------------------------------------------------------------------------------

    def dispose(self) -> None:
        """Close every connection, the watch and the catalog. Idempotent; the engine cannot be used afterwards.

        An engine that is no longer wanted needs it: its threads follow the catalog, and keep the engine, until then.
        """
        self._leave()
        self._cache.close()
        self._close_pools()
        self._catalog.close()

    def _leave(self) -> None:
        _engines.discard(self)
        self._core.closed = True
        self._observer.close()
        self._settler.stop()

    def _close_pools(self) -> None:
        self._core.pools.dispose()
        self._core.waits.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dispose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._catalog.safe_url!r}, topology {self.topology.version})"

    def _after_fork(self) -> None:
        self._schema_lock = threading.Lock()
        self._cache.after_fork()


def _show_unknown_commit(context: ExceptionContext) -> BaseException | None:
    original = context.original_exception
    if isinstance(original, UnknownCommit):
        driver = getattr(context.connection, "driver", None)
        return CommitOutcomeUnknown(getattr(driver, "shard_name", "?"), str(original))
    return None


_engines: weakref.WeakSet[ShardedEngine] = weakref.WeakSet()


def _engines_after_fork() -> None:
    # A hook of its own, which runs after that of `waits`: it was registered later. The cache begins to watch anew here,
    # from threads that may call the pools, and those must have let go of the parent's connections by then.
    for engine in list(_engines):
        try:
            engine._after_fork()  # noqa: SLF001 - our own class
        except Exception:  # noqa: BLE001 - one engine's fault must not leave the others with the parent's catalog connections
            _log.exception("a forked child could not begin to watch anew for %r", engine)


os.register_at_fork(after_in_child=_engines_after_fork)
