"""What one server says about itself, its role and its tables, read in a few queries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import class_row, dict_row

from shardlib.errors import InvalidTopology
from shardlib.topology import Table
from shardlib_ops.reshard.shape import names_of

__all__ = ["NEWEST", "OLDEST", "Prepared", "Server", "TableFacts", "read_server", "read_tables"]

OLDEST: Final = 15
"""Major versions that jobs work with: from this one."""
NEWEST: Final = 18
"""To this one."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared transaction that nobody has ended yet."""

    gid: str
    owner: str
    age_s: float


@dataclass(frozen=True)
class TableFacts:
    """A relation by the name of one of the cluster's tables.

    Attributes:
        n: which of the tables that were asked for, from 1.
        oid: of this database.
        kind: `relkind`.
        persistence: `relpersistence`.
        family: whether it has a parent or children.
        mine: whether the role may act as its owner.
        readable: whether the role may read it.
        writable: whether the role may insert, update and delete.
        filtered: whether row-level security hides rows from the role.
        filled: whether the statistics or its size say that it may hold rows.
        bytes: with indexes.
        loose: names of unique indexes without the whole shard key.
    """

    n: int
    oid: int
    kind: str
    persistence: str
    family: bool
    mine: bool
    readable: bool
    writable: bool
    filtered: bool
    filled: bool
    bytes: int
    loose: list[str]


@dataclass(frozen=True)
class Server:
    """A server and the database that the DSN leads to. Attributes are PostgreSQL's words where not explained.

    Attributes:
        identity: (system identifier, oid of the database): the same from every client.
        clock_offset_s: the server's clock minus ours.
        slots: names of the replication slots.
        senders: WAL senders at work, none of them this check's.
        control: (cluster id, shard id) of the schema `shardlib`, if it is there.
        settings: of the role or the database, which sessions start with.
    """

    role: str
    database: str
    version: int
    standby: bool
    identity: tuple[str, int]
    clock_offset_s: float
    encoding: str
    collation: str
    wal_level: str
    max_replication_slots: int
    slots: list[str]
    max_wal_senders: int
    senders: int
    max_prepared_transactions: int
    max_slot_wal_keep_size: str
    idle_replication_slot_timeout: str | None
    superuser: bool
    replication: bool
    may_create: bool
    may_set_role: bool
    owns_shardlib: bool
    read_only: bool
    control: tuple[str, str] | None
    extensions: list[str]
    available: list[str]
    roles: list[str]
    settings: list[str]
    prepared: list[Prepared] = field(default_factory=list)

    @property
    def major(self) -> int:
        """Such as 18."""
        return self.version // 10_000


async def read_server(conn: AsyncConnection[Any]) -> Server:
    """What the server says. It must be of version `OLDEST` or later, see `conn.info.server_version`."""
    before = time.time()
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_SERVER.encode())
        row = await cursor.fetchone()
    after = time.time()
    if row is None:
        raise InvalidTopology(f"database {conn.info.dbname!r} does not show its own role", "name a role in the DSN")
    system, oid, now = row.pop("system"), row.pop("oid"), row.pop("now")
    control = None
    if row.pop("has_control"):
        control = await (await conn.execute("SELECT cluster_id, shard_id FROM shardlib.control")).fetchone()
    async with conn.cursor(row_factory=class_row(Prepared)) as listed:
        await listed.execute(
            "SELECT gid, owner::text, extract(epoch FROM clock_timestamp() - prepared)::float8 AS age_s"
            " FROM pg_prepared_xacts WHERE database = current_database() ORDER BY prepared"
        )
        prepared = await listed.fetchall()
    return Server(
        **row,
        identity=(str(system), int(oid)),
        clock_offset_s=float(now) - (before + after) / 2,
        control=None if control is None else (str(control[0]), str(control[1])),
        prepared=prepared,
    )


async def read_tables(conn: AsyncConnection[Any], tables: Sequence[Table]) -> dict[Table, TableFacts]:
    """Those of the tables that are there."""
    schemas, names = names_of(tables)
    keys = ["\n".join(table.key) for table in tables]
    async with conn.cursor(row_factory=class_row(TableFacts)) as cursor:
        await cursor.execute(_TABLES.encode(), (schemas, names, keys))
        return {tables[found.n - 1]: found for found in await cursor.fetchall()}


_SERVER: Final = """
SELECT current_user::text AS role, current_database()::text AS database,
       current_setting('server_version_num')::int AS version, pg_is_in_recovery() AS standby,
       (SELECT system_identifier::text FROM pg_control_system()) AS system, d.oid,
       extract(epoch FROM clock_timestamp())::float8 AS now,
       pg_encoding_to_char(d.encoding)::text AS encoding, concat_ws(' ', d.datlocprovider, d.datcollate) AS collation,
       current_setting('wal_level') AS wal_level,
       current_setting('max_replication_slots')::int AS max_replication_slots,
       ARRAY(SELECT slot_name::text FROM pg_replication_slots) AS slots,
       current_setting('max_wal_senders')::int AS max_wal_senders,
       (SELECT count(*)::int FROM pg_stat_activity WHERE backend_type = 'walsender') AS senders,
       current_setting('max_prepared_transactions')::int AS max_prepared_transactions,
       current_setting('max_slot_wal_keep_size') AS max_slot_wal_keep_size,
       current_setting('idle_replication_slot_timeout', true) AS idle_replication_slot_timeout,
       r.rolsuper AS superuser, r.rolreplication AS replication,
       has_database_privilege(d.oid, 'CREATE') AS may_create,
       has_parameter_privilege(current_user, 'session_replication_role', 'SET') AS may_set_role,
       NOT EXISTS (SELECT FROM pg_namespace n WHERE n.nspname = 'shardlib'
                      AND NOT pg_has_role(n.nspowner, 'USAGE')) AS owns_shardlib,
       current_setting('default_transaction_read_only')::bool AS read_only,
       EXISTS (SELECT FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = 'control'
                WHERE n.nspname = 'shardlib' AND has_schema_privilege(n.oid, 'USAGE')
                  AND has_table_privilege(c.oid, 'SELECT')) AS has_control,
       ARRAY(SELECT extname::text FROM pg_extension WHERE extname <> 'plpgsql' ORDER BY 1) AS extensions,
       ARRAY(SELECT name::text FROM pg_available_extensions) AS available,
       ARRAY(SELECT rolname::text FROM pg_roles) AS roles,
       ARRAY(SELECT DISTINCT c FROM pg_db_role_setting s CROSS JOIN unnest(s.setconfig) AS c
              WHERE s.setdatabase IN (0, d.oid) AND s.setrole IN (0, r.oid) ORDER BY 1) AS settings
  FROM pg_database d CROSS JOIN pg_roles r
 WHERE d.datname = current_database() AND r.rolname = current_user
"""

_TABLES: Final = """
SELECT w.n::int, c.oid::bigint, c.relkind::text AS kind, c.relpersistence::text AS persistence,
       EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent)) AS family,
       pg_has_role(c.relowner, 'USAGE') AS mine,
       has_schema_privilege(s.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable,
       has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE')
           AND has_table_privilege(c.oid, 'DELETE') AS writable,
       c.relkind IN ('r', 'p') AND row_security_active(c.oid) AS filtered,
       c.relkind = 'r' AND pg_relation_size(c.oid) > 0 AS filled,
       CASE WHEN c.relkind = 'r' THEN pg_total_relation_size(c.oid) ELSE 0 END AS bytes,
       ARRAY(SELECT x.relname::text FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
              WHERE i.indrelid = c.oid AND i.indisunique AND w.key <> ''
                AND NOT (SELECT array_agg(a.attname::text) FROM pg_attribute a
                          WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))
                    @> string_to_array(w.key, E'\\n')
              ORDER BY 1) AS loose
  FROM unnest(%s::text[], %s::text[], %s::text[]) WITH ORDINALITY AS w(schema, name, key, n)
  JOIN pg_namespace s ON s.nspname = w.schema
  JOIN pg_class c ON c.relnamespace = s.oid AND c.relname = w.name
"""
