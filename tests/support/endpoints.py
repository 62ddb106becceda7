"""A shard's primary is somewhere else from one version of the topology to the next."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardlib.catalog import open_catalog
from shardlib.dsn import Dsn

_END_OTHERS = """
    SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"""


def copy_primary(dsn: Dsn) -> Dsn:
    """A database with the content of this one, as a promoted replica has it. Ends the connections to this one."""
    params = conninfo_to_dict(dsn.conninfo())
    name = f"promoted_{uuid4().hex[:8]}"
    with psycopg.connect(make_conninfo(**{**params, "dbname": "postgres"}), autocommit=True) as conn:
        conn.execute(_END_OTHERS, (params["dbname"],))
        old = sql.Identifier(str(params["dbname"]))
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), old))
    return Dsn(make_conninfo(**{**params, "dbname": name}))


def publish_primary(url: str, shard_id: str, primary: Dsn) -> None:
    """Publish a topology with this primary and the same gates: the old one still has them."""
    catalog = open_catalog(url)
    try:
        now = catalog.load()
        shards = tuple(replace(shard, primary=primary) if shard.id == shard_id else shard for shard in now.shards)
        catalog.publish(now.evolve(shards=shards, nonce=uuid4().hex), expected=now.version)
    finally:
        catalog.close()
