"""What all tables of a shard are made of, and whether the shards are made alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from psycopg import AsyncConnection

from shardlib.topology import Table
from shardlib_ops.reshard.schema.revision import VERSION_TABLE
from shardlib_ops.reshard.shape import IDENTITY, Part, parts_of

__all__ = ["Structure", "differences", "read_structure", "real_tables", "tables_in"]

Structure = Mapping[Part, str]
"""What the tables of a shard are made of."""

_SHOWN: Final = 3
_LIST: Final = """
    SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname !~ '^pg_'
       AND n.nspname NOT IN ('information_schema', 'shardlib', 'shardlib_catalog') AND c.relname <> %s
       AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                                                 AND d.deptype = 'e')
     ORDER BY 1, 2
"""


async def read_structure(conn: AsyncConnection[Any], *, moving: bool = False) -> Structure:
    """What all tables and views of a shard are made of, but for shardlib's own, Alembic's and those of extensions.

    Args:
        conn: made by `connect`, which pins what texts depend on.
        moving: leave out replica identities, which a job that is under way sets as it needs them.
    """
    found = await (await conn.execute(_LIST.encode(), (VERSION_TABLE,))).fetchall()
    tables = [Table(name, schema=None if schema == "public" else schema) for schema, name in found]
    parts = await parts_of(conn, tables)
    if moving:
        return {part: text.partition(IDENTITY)[0] if part.kind == "table" else text for part, text in parts.items()}
    return parts


def tables_in(structure: Structure) -> set[str]:
    """The names of the tables and views of a shard, with their schemas but for `public`."""
    return {part.table for part in structure if part.kind == "table"}


def real_tables(structure: Structure) -> set[str]:
    """The names of the tables of a shard, without views and the like."""
    kinds = ("table", "partitioned table")
    return {part.table for part, text in structure.items() if part.kind == "table" and text.startswith(kinds)}


def differences(structures: Mapping[str, Structure]) -> list[str]:
    """Where the shards differ, a line for each shard and part; what most of them have counts as right. Pure.

    Args:
        structures: name of a shard -> what its tables are made of.
    """
    lines = []
    every = set().union(*map(tables_in, structures.values())) if structures else set()
    lacking = {(shard, table) for shard, one in structures.items() for table in every - tables_in(one)}
    for part in sorted(set().union(*structures.values())):
        texts = {shard: one.get(part) for shard, one in structures.items()}
        if len(set(texts.values())) == 1:
            continue
        if part.kind != "table":  # of a table that is not there, one line is enough
            texts = {shard: text for shard, text in texts.items() if (shard, part.table) not in lacking}
        counts = Counter(texts.values())
        right = counts.most_common(1)[0][0]  # of equally many, the first shard's
        those = [shard for shard, text in texts.items() if text == right]
        for shard, text in texts.items():
            if text != right:
                lines.append(f"shard {shard!r}: {part}: {text or 'missing'}, but {_named(those)}: {right or 'missing'}")
    return lines


def _named(shards: list[str]) -> str:
    more = f" and {len(shards) - _SHOWN} more" if len(shards) > _SHOWN else ""
    return "on " + ", ".join(map(repr, shards[:_SHOWN])) + more
