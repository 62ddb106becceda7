"""Tables on every shard, and their record in the catalog."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from uuid import uuid4

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, ForeignKeyConstraint, MetaData, create_engine
from sqlalchemy import Table as SaTable
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from shardlib.catalog import Catalog, TopologyCache, publish_change
from shardlib.engine.locks import holders_of
from shardlib.errors import InvalidTopology, LockTimeout, UnsupportedOperation
from shardlib.key.declare import KeySpec, describe
from shardlib.shard.connect import conninfo_of, lost
from shardlib.shard.options import PoolOptions
from shardlib.shard.patience import AskingConnection
from shardlib.shard.prepare import prepare_shard, unavailable
from shardlib.topology import Shard, Table, Topology
from shardlib.topology.change import forget_tables, record_tables

__all__ = ["SchemaChange"]

_LOCK_TIMEOUT_S = 10
"""As long as `install` waits. DDL that waits holds up whoever comes to its table after it."""
_ASK_AFTER_S = 20.0
"""A statement may take as long as it needs; a server that is silent for so long is asked whether it is there."""
_SIDE_BY_SIDE = 8


class SchemaChange:
    """One change of the tables of a cluster. Blocking; runs on connections of its own, outside the pools.

    Args:
        catalog: where the topology is stored.
        cache: the topology in memory.
        options: of the pools; connections are opened as theirs are.
    """

    def __init__(self, catalog: Catalog, cache: TopologyCache, options: PoolOptions) -> None:
        self._catalog, self._cache, self._options = catalog, cache, options

    def create_all(self, metadata: MetaData, *, app_roles: Sequence[str], checkfirst: bool) -> None:
        """See `ShardedEngine.create_all`."""
        tables = records(metadata)
        topology = self._cache.newest()
        # Refuses a changed key before anything is created.
        known = record_tables(topology, tables, nonce="") is topology
        if known and topology.moves:
            return  # an application that starts while rows move: its tables are those that the job moves
        _refuse_while_moving(topology, "made or dropped")

        def on(shard: Shard) -> None:
            self._prepare(topology, shard, app_roles)
            create = partial(metadata.create_all, checkfirst=checkfirst)
            self._ddl(shard, metadata, create, dropping=False)

        self._everywhere(topology, on)
        self._publish(lambda now, nonce: record_tables(now, tables, nonce=nonce))

    def drop_all(self, metadata: MetaData, *, checkfirst: bool) -> None:
        """See `ShardedEngine.drop_all`."""
        topology = self._at_rest()
        drop = partial(metadata.drop_all, checkfirst=checkfirst)
        self._everywhere(topology, lambda shard: self._ddl(shard, metadata, drop, dropping=True))
        self._publish(lambda now, nonce: forget_tables(now, list(metadata.tables), nonce=nonce))

    def record(self, metadata: MetaData) -> None:
        """See `ShardedEngine.register`."""
        tables = records(metadata)
        self._publish(lambda now, nonce: record_tables(now, tables, nonce=nonce))

    def _at_rest(self) -> Topology:
        """The newest topology, while no rows move: a change of a table would end the job, and gates are the job's."""
        topology = self._cache.newest()
        _refuse_while_moving(topology, "made or dropped")
        return topology

    @staticmethod
    def _everywhere(topology: Topology, work: Callable[[Shard], None]) -> None:
        """Run the work for every shard, some side by side; waits for all, then raises the first error."""
        with ThreadPoolExecutor(_SIDE_BY_SIDE, "shardlib-schema") as threads:
            running = [threads.submit(work, shard) for shard in topology.shards]
        for done in running:
            done.result()

    def _prepare(self, topology: Topology, shard: Shard, app_roles: Sequence[str]) -> None:
        gates = topology.gates_of(shard.id)
        with self._connect(shard, autocommit=True) as conn:
            prepare_shard(conn, shard, cluster_id=topology.cluster_id, gates=gates, app_roles=app_roles)

    def _ddl(self, shard: Shard, metadata: MetaData, work: Callable[[Connection], None], *, dropping: bool) -> None:
        """Run DDL in one transaction of a shard, which waits for locks within the limit.

        Raises:
            ShardUnavailable: the connection could not be had, or broke. If it broke at COMMIT, the change may be there:
                running it again is right in any case.
            LockTimeout: other transactions hold the tables.
            sqlalchemy.exc.DBAPIError: the server refused a statement.
        """
        engine = create_engine("postgresql+psycopg://", creator=lambda: self._connect(shard), poolclass=NullPool)
        try:
            with engine.begin() as conn:
                conn.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'")
                work(conn)
        except OperationalError as error:
            if isinstance(error.orig, LockNotAvailable):
                tables = [(table.schema, str(table.name)) for table in metadata.sorted_tables]
                with self._connect(shard, autocommit=True) as conn:
                    holders = holders_of(conn, tables, readers=dropping)
                raise LockTimeout(shard.name, _LOCK_TIMEOUT_S, holders) from None
            if error.orig is None or not lost(error):
                raise
            raise unavailable(shard, error.orig) from None
        finally:
            engine.dispose()

    def _connect(self, shard: Shard, *, autocommit: bool = False) -> AskingConnection:
        """A connection of our own to a shard's primary.

        Raises:
            ShardUnavailable: it could not be had.
        """
        conninfo = make_conninfo(conninfo_of(shard.primary, self._options), application_name="shardlib schema")
        try:
            conn = AskingConnection.connect(conninfo, autocommit=autocommit)
        except psycopg.OperationalError as error:
            raise unavailable(shard, error) from None
        conn.shard, conn.conninfo, conn.ask_after_s = shard, conninfo, _ASK_AFTER_S
        return conn

    def _publish(self, change: Callable[[Topology, str], Topology]) -> None:
        """Apply a change to the newest topology, and see it in the cache.

        Raises:
            UnsupportedOperation: it would change the tables while rows move. A job moves the tables that it began with:
                rows of a later one would stay behind.
        """

        def at_rest(now: Topology) -> Topology:
            after = change(now, uuid4().hex)
            if after is not now:
                _refuse_while_moving(now, "recorded or forgotten")
            return after

        then = publish_change(self._catalog, at_rest, newest=self._cache.newest)
        self._cache.refresh(newer_than=then.version - 1, timeout_s=10.0)


def _refuse_while_moving(topology: Topology, what: str) -> None:
    if topology.moves:
        raise UnsupportedOperation(
            f"job {topology.moves[0].job} is moving rows, so tables cannot be {what} now",
            "wait until it is over, complete it, or cancel it (`shardlib-ops reshard list`); then run this again",
        )


def records(metadata: MetaData) -> list[Table]:
    """What the catalog keeps of each table.

    Raises:
        ShardKeyRequired: a table declares neither a shard key nor that it is a reference table.
        InvalidShardKey: a column cannot be a shard key.
        InvalidTopology: a foreign key could refer to a row on another shard.
    """
    found = []
    for table in metadata.sorted_tables:
        spec = describe(table)
        for constraint in table.foreign_key_constraints:
            _check_reference(table, spec, constraint)
        # SQLAlchemy's quoted_name is a str that only it can encode.
        schema = None if table.schema is None else str(table.schema)
        found.append(Table(name=str(table.name), key=tuple(map(str, spec.key_names)), schema=schema))
    return found


def _check_reference(table: SaTable, spec: KeySpec, constraint: ForeignKeyConstraint) -> None:
    """A foreign key holds within one shard: to a reference table, or from key to key.

    Raises:
        InvalidTopology: it could refer to a row on another shard, where PostgreSQL does not see it.
    """
    target = describe(constraint.referred_table)
    if target.reference:
        return
    pairs = {element.parent.name: element.column.name for element in constraint.elements}
    if spec.reference or [pairs.get(name) for name in spec.key_names] != list(target.key_names):
        columns = ", ".join(constraint.column_keys)
        raise InvalidTopology(
            f"the foreign key ({columns}) of {table.fullname!r} refers to {target.table!r} without pairing the shard "
            f"keys ({', '.join(spec.key_names) or 'none: a reference table'} with {', '.join(target.key_names)})",
            "add the shard key to the foreign key, or leave the constraint away: the rows may be on other shards",
        )
