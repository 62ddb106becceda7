"""A cluster in the midst of a move: half of one shard's rows are on another shard as well, and hidden on one of them.

What a resharding job does to a topology and to the two databases, without the job: the gates, the key tables, the
copies. Beside it stands one plain database with all rows once, to compare answers with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import URL, Engine, MetaData, Table, create_engine, select

from shardlib import ShardedEngine
from shardlib.catalog import open_catalog
from shardlib.fence import close_gate, list_gates, open_gate
from shardlib.key import describe
from shardlib.key.composite import SEPARATOR
from shardlib.ring import TokenRange
from shardlib.topology import Move, Topology
from shardlib.topology.moving import announce, finish, give_back, moving_gates, renew_moving, switch
from shardlib_ops import LocalCluster

JOB = 7
SOURCE, TARGET = "s1", "s2"


class Moving:
    """Two shards with the tables of some metadata; `copying`, `switched`, `given_back` and `over` move on in turn."""

    def __init__(self, cluster: LocalCluster, metadata: Sequence[MetaData]) -> None:
        self.cluster, self.metadata = cluster, metadata
        self.catalog = open_catalog(cluster.url)
        self.tables = [table for each in metadata for table in each.sorted_tables]
        with ShardedEngine(cluster.url) as engine:
            for each in metadata:
                engine.create_all(each)
            self.token = engine._core.token
        self._open = ExitStack()
        topology = self.catalog.load()
        self._servers: dict[str, psycopg.Connection[Any]] = {}
        self.databases: dict[str, Engine] = {}
        for shard in topology.shards:
            conn = psycopg.connect(shard.primary.conninfo(), autocommit=True)
            self._servers[shard.id] = self._open.enter_context(conn)
            self.databases[shard.id] = self._database(shard.primary.conninfo())
        self._servers[SOURCE].execute("CREATE DATABASE plain")
        self.plain = self._database(topology.shard(SOURCE).primary.conninfo(dbname="plain"))
        for each in metadata:
            each.create_all(self.plain)

    def _database(self, conninfo: str) -> Engine:
        parts = psycopg.conninfo.conninfo_to_dict(conninfo)
        url = URL.create(
            "postgresql+psycopg", username=parts.get("user"), password=parts.get("password"), host=parts.get("host"),
            port=int(parts["port"]), database=parts.get("dbname"),
        )  # fmt: skip
        engine = create_engine(url, hide_parameters=True)
        self._open.callback(engine.dispose)
        return engine

    def close(self) -> None:
        self._open.close()
        self.catalog.close()

    # -- rows ----------------------------------------------------------------------------------------------------

    def fill(self, rows: dict[Table, list[dict[str, Any]]]) -> None:
        """All rows, in the plain database and each on the shard that owns it. Before the move."""
        topology = self.catalog.load()
        for table in self.tables:
            if not rows.get(table):
                continue
            with self.plain.begin() as conn:
                conn.execute(table.insert(), rows[table])
            for shard_id, database in self.databases.items():
                own = [
                    row
                    for row in rows[table]
                    if describe(table).reference or topology.shard_of(self.token_of(table, row)).id == shard_id
                ]
                if own:
                    with database.begin() as conn:
                        conn.execute(table.insert(), own)

    def key_of(self, table: Table, row: Any) -> bytes:
        spec = describe(table)
        return spec.encode([row[key] for key in spec.column_keys])

    def token_of(self, table: Table, row: Any) -> int:
        return self.token(self.key_of(table, row))

    def _copy(self, ranges: Sequence[TokenRange]) -> int:
        copied = 0
        keys: dict[bytes, None] = {}
        for table in self.tables:
            if describe(table).reference:
                continue
            with self.databases[SOURCE].connect() as conn:
                found = [dict(row) for row in conn.execute(select(table)).mappings()]
            moved = [row for row in found if any(r.first <= self.token_of(table, row) <= r.last for r in ranges)]
            keys.update(dict.fromkeys(self.key_of(table, row) for row in moved))
            copied += len(moved)
            if moved:
                with self.databases[TARGET].begin() as conn:
                    conn.execute(table.insert(), moved)
        texts = [[part.decode() for part in key.split(SEPARATOR)] for key in keys]
        for conn in self._servers.values():
            conn.cursor().executemany(
                f"INSERT INTO shardlib.job_{JOB}_keys (k, more) VALUES (%s, %s)",
                [(first, more) for first, *more in texts],
            )
        return copied

    # -- the move ------------------------------------------------------------------------------------------------

    def copying(self) -> Topology:
        """Rows of half the source's ranges are on the target too, and hidden there."""
        topology = self.catalog.load()
        ranges = topology.ring.ranges_of(SOURCE)[::2]
        for conn in self._servers.values():
            conn.execute(
                f"CREATE TABLE shardlib.job_{JOB}_keys (k text NOT NULL, more text[] NOT NULL DEFAULT '{{}}',"
                " lsn pg_lsn NOT NULL DEFAULT '0/0', PRIMARY KEY (k, more))"
            )
        after = self.publish(announce(topology, [Move(JOB, ranges, SOURCE, TARGET)], nonce=uuid4().hex))
        assert self._copy(ranges) > 10
        return after

    def switched(self, *, close: bool = True) -> Topology:
        """The target owns them; the source's are old."""
        return self.publish(switch(self.catalog.load(), JOB, nonce=uuid4().hex), close=close)

    def given_back(self) -> Topology:
        """The source owns them again."""
        return self.publish(give_back(self.catalog.load(), JOB, nonce=uuid4().hex))

    def over(self) -> Topology:
        """The topology no longer knows of the move. The copies and the key tables are still there."""
        return finish(self.catalog.load(), JOB, nonce=uuid4().hex)

    def publish(self, after: Topology, *, close: bool = True) -> Topology:
        """Open what is new, publish, and close what the new topology does not name."""
        for gate in after.gates:
            open_gate(self._servers[gate.shard_id], gate.number)
        self.catalog.publish(after, expected=after.version - 1)
        if close:
            self.sweep(after)
        return after

    def sweep(self, topology: Topology) -> None:
        for shard_id, conn in self._servers.items():
            for number in set(list_gates(conn)) - set(topology.gates_of(shard_id)):
                assert close_gate(conn, number, budget_s=5.0).closed

    def shut(self) -> list[int]:
        """Close the gates of the moving ranges where they are served, as a cutover does; their numbers."""
        topology = self.catalog.load()
        closed = moving_gates(topology, JOB)
        for gate in closed:
            assert close_gate(self._servers[gate.shard_id], gate.number, budget_s=5.0).closed
        return [gate.number for gate in closed]

    def renewed(self) -> Topology:
        """The moving ranges are open again where they were; the other shard is not asked."""
        after = renew_moving(self.catalog.load(), JOB, nonce=uuid4().hex)
        for gate in moving_gates(after, JOB):
            open_gate(self._servers[gate.shard_id], gate.number)
        self.catalog.publish(after, expected=after.version - 1)
        return after

    def run(self, shard_id: str, statement: str) -> list[Any]:
        """Run a statement of the test's own on one shard."""
        cursor = self._servers[shard_id].execute(sql.SQL(statement))
        return cursor.fetchall() if cursor.description else []
