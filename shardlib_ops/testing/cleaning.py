"""The shards after a test as they were before it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.errors import LockNotAvailable

from shardlib.catalog import open_catalog
from shardlib.catalog.base import Catalog, Conflict
from shardlib.dsn import scrub
from shardlib.engine.locks import holders_of
from shardlib.errors import LockTimeout, ShardUnavailable
from shardlib.fence.verdict import lost_connection
from shardlib.topology import Shard, Table, Topology

__all__ = ["cleaned"]

_CATALOG_S: Final = 10.0
_CONNECT_S: Final = 10
_LOCK_S: Final = 10
_TRIES: Final = 20
_DEFAULT_SCHEMA: Final = "public"
_OBJECTS: Final = """
    SELECT CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'S' THEN 'SEQUENCE'
           WHEN 'f' THEN 'FOREIGN TABLE' ELSE 'TABLE' END AS kind, nspname, relname
      FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
     WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S')
       AND nspname NOT IN ('pg_catalog', 'information_schema', 'shardlib')
       AND nspname !~ '^pg_(toast|temp)'
    UNION ALL
    SELECT 'TYPE', nspname, typname FROM pg_type JOIN pg_namespace ON pg_namespace.oid = typnamespace
     WHERE typtype = 'e' AND nspname NOT IN ('pg_catalog', 'information_schema', 'shardlib')
    UNION ALL
    SELECT 'SCHEMA', '', nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
"""
_ORDER: Final = ("VIEW", "MATERIALIZED VIEW", "FOREIGN TABLE", "TABLE", "SEQUENCE", "TYPE", "SCHEMA")


@dataclass(frozen=True, slots=True)
class _Before:
    """One shard before a test: what exists, and which reference tables held rows."""

    objects: frozenset[tuple[str, str, str]]
    filled: frozenset[str]


@contextlib.contextmanager
def cleaned(url: str) -> Iterator[None]:
    """Leave the shards of a cluster, and the tables its catalog records, as they were when the block began.

    Whatever the block created is dropped; recorded tables that were there are emptied, their sequences set
    back, except reference tables that held rows.

    Raises:
        ShardUnavailable: a shard is down, or its connection was lost.
        LockTimeout: a transaction that did not end holds a lock on its tables.
        CatalogUnavailable: the catalog did not answer.
    """
    catalog = open_catalog(url, timeout_s=_CATALOG_S)
    try:
        topology = catalog.load()
        before = {shard.id: _look(shard, topology.tables) for shard in topology.shards}
        try:
            yield
        finally:
            for shard in catalog.load(topology).shards:
                _restore(shard, topology.tables, before.get(shard.id, _Before(frozenset(), frozenset())))
            _restore_record(catalog, topology)
    finally:
        catalog.close()


@contextlib.contextmanager
def _connected(shard: Shard) -> Iterator[psycopg.Connection[Any]]:
    try:
        info = shard.primary.conninfo(connect_timeout=_CONNECT_S, application_name="shardlib tests")
        with psycopg.connect(info, autocommit=True) as connection:
            yield connection
    except psycopg.OperationalError as error:
        if not lost_connection(error):
            raise
        raise ShardUnavailable(shard.name, scrub(str(error).strip(), shard.primary.reveal())) from None


def _name(table: Table) -> sql.Identifier:
    return sql.Identifier(table.schema or _DEFAULT_SCHEMA, table.name)


def _look(shard: Shard, tables: Sequence[Table]) -> _Before:
    with _connected(shard) as connection:
        objects = _objects(connection)
        references = [table for table in tables if table.reference and _exists(table, objects)]
        filled = []
        for table in references:
            row = connection.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(_name(table))).fetchone()
            if row is not None and row[0]:
                filled.append(table.fullname)
        return _Before(objects, frozenset(filled))


def _objects(connection: psycopg.Connection[Any]) -> frozenset[tuple[str, str, str]]:
    return frozenset((kind, schema, name) for kind, schema, name in connection.execute(_OBJECTS))


def _exists(table: Table, objects: frozenset[tuple[str, str, str]]) -> bool:
    return ("TABLE", table.schema or _DEFAULT_SCHEMA, table.name) in objects


def _restore(shard: Shard, tables: Sequence[Table], before: _Before) -> None:
    with _connected(shard) as connection:
        try:
            _change_back(connection, tables, before)
        except LockNotAvailable:
            there = [(schema, name) for kind, schema, name in _objects(connection) if kind == "TABLE"]
            raise LockTimeout(shard.name, _LOCK_S, holders_of(connection, there, readers=True)) from None


def _change_back(connection: psycopg.Connection[Any], tables: Sequence[Table], before: _Before) -> None:
    with connection.transaction():
        connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(f"{_LOCK_S}s")))
        new = _objects(connection) - before.objects
        for kind, schema, name in sorted(new, key=lambda one: (_ORDER.index(one[0]), one)):
            what = sql.Identifier(schema, name) if schema else sql.Identifier(name)
            # A table takes its own sequences with it, a schema what is in it: IF EXISTS.
            connection.execute(sql.SQL("DROP {} IF EXISTS {} CASCADE").format(sql.SQL(kind), what))
        left = _objects(connection)
        emptied = [table for table in tables if table.fullname not in before.filled and _exists(table, left)]
        if emptied:
            names = sql.SQL(", ").join(map(_name, emptied))
            connection.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY CASCADE").format(names))


def _restore_record(catalog: Catalog, before: Topology) -> None:
    """The catalog records the tables it recorded before: the next test may give the same name another key."""
    for _ in range(_TRIES):
        now = catalog.load(before)
        if now.tables == before.tables:
            return
        try:
            catalog.publish(now.evolve(tables=before.tables, nonce=uuid.uuid4().hex), expected=now.version)
        except Conflict:
            continue  # an engine that is still open published as well
        return
    raise ShardUnavailable("catalog", f"{_TRIES} attempts to restore its tables met other publishers")
