"""Whether the tables of all shards are made alike, and made as the application's metadata says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from psycopg import AsyncConnection
from sqlalchemy import Connection, MetaData

from shardlib.topology import Table
from shardlib_ops.reshard.schema.revision import VERSION_TABLE
from shardlib_ops.reshard.shape import IDENTITY, Part, parts_of

__all__ = ["Structure", "differences", "read_structure", "unlike_metadata"]

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


def unlike_metadata(connection: Connection, metadata: MetaData) -> list[str]:
    """Where the tables of a shard are not as the metadata says, as Alembic's autogenerate finds it, a line each."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    named = {table.schema for table in metadata.tables.values()}
    default = connection.dialect.default_schema_name

    def include(name: str | None, kind: str, parents: Mapping[str, str | None]) -> bool:
        if kind == "schema":
            return name is None or name in named or name == default
        return not (kind == "table" and name == VERSION_TABLE)

    options = {"include_schemas": named != {None}, "include_name": include, "compare_type": True}
    found: list[Any] = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    return [_line(step) for step in _flat(found)]


def _flat(steps: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    for step in steps:
        if isinstance(step, tuple):
            yield step
        else:
            yield from _flat(step)


def _line(step: tuple[Any, ...]) -> str:
    """A step that autogenerate would write, as what is wrong now."""
    what = str(step[0])
    verb, _, kind = what.partition("_")
    if what in ("add_table", "remove_table"):
        name = f"table {step[1].fullname!r}"
    elif what in ("add_column", "remove_column"):
        name = f"column {step[3].name!r} of table {step[2]!r}"
    elif verb == "modify":
        return f"column {step[3]!r} of table {step[2]!r}: {kind} is {step[5]!r}, and the metadata says {step[6]!r}"
    else:
        item = step[1]
        table = getattr(item, "table", None)
        name = f"{kind} {getattr(item, 'name', None) or item!r}" + (
            f" of table {table.name!r}" if table is not None else ""
        )
    if verb == "add":
        return f"{name} is in the metadata and not on the shards"
    return f"{name} is on the shards and not in the metadata"
