"""Which revision of the application's migrations a shard's tables have: `shardlib.alembic_version`.

It stands in the schema that belongs to the shard, beside the gates: what a program of the application does in its own
schemas does not touch it, and a dump of the application's tables does not take it elsewhere.
"""

from __future__ import annotations

from typing import Any, Final

from psycopg import AsyncConnection

from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import claimed

__all__ = ["VERSION_SCHEMA", "VERSION_TABLE", "copy_revision", "read_revision"]

VERSION_SCHEMA: Final = "shardlib"
VERSION_TABLE: Final = "alembic_version"

_EXISTS: Final = "SELECT to_regclass('shardlib.alembic_version') IS NOT NULL"
# As Alembic makes it.
_CREATE: Final = """
    CREATE TABLE IF NOT EXISTS shardlib.alembic_version (
        version_num varchar(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))
"""


async def read_revision(conn: AsyncConnection[Any]) -> tuple[str, ...]:
    """The revisions that a shard's tables are at, sorted; empty if none was ever applied there.

    More than one stands there only if the migrations have branches.
    """
    row = await (await conn.execute(_EXISTS)).fetchone()
    if row is None or not row[0]:
        return ()
    found = await conn.execute("SELECT version_num FROM shardlib.alembic_version ORDER BY 1")
    return tuple(version for (version,) in await found.fetchall())


async def copy_revision(origin: AsyncConnection[Any], sink: AsyncConnection[Any], runner: Runner) -> None:
    """Let the sink, whose tables are made like the origin's now, be at the origin's revision. Idempotent.

    A sink that has one already keeps it.

    Raises:
        psycopg.Error: a server was lost, or another runner holds the job.
    """
    wanted = await read_revision(origin)
    if not wanted or await read_revision(sink):
        return
    async with sink.transaction():
        await sink.execute(claimed(runner))
        await sink.execute(_CREATE)
        await sink.execute(
            "INSERT INTO shardlib.alembic_version SELECT unnest(%s::text[]) ON CONFLICT DO NOTHING", (list(wanted),)
        )
