"""Whether the tables of a shard are made as the application's metadata says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, MetaData

from shardlib_ops.reshard.schema.revision import VERSION_TABLE

__all__ = ["unlike_metadata"]


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
