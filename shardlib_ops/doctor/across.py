"""What can only be told by looking at all shards: clocks, reference tables, how tables are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib.topology import Shard
from shardlib_ops.doctor.finding import Finding, Severity
from shardlib_ops.doctor.view import View
from shardlib_ops.reshard.check.facts import read_server
from shardlib_ops.reshard.rows import TableShape, read_shapes
from shardlib_ops.reshard.schema.revision import read_revision
from shardlib_ops.reshard.schema.structure import Structure, differences, read_structure, real_tables
from shardlib_ops.reshard.shape import present

__all__ = ["Seen", "across", "look_structure", "references_of"]

_SHOWN: Final = 10
Digest = tuple[int, int]
"""Rows, and the sum of a hash of each."""


@dataclass
class Seen:
    """What a shard has told for the comparison with others. None: it was not asked, or did not tell in time."""

    clock_s: float | None = None
    structure: Structure | None = None
    revision: tuple[str, ...] = ()
    references: dict[str, Digest] = field(default_factory=dict)


async def look_structure(conn: AsyncConnection[Any], view: View, seen: Seen) -> None:
    """The clock, how the tables are made, and at which revision they are."""
    seen.clock_s = (await read_server(conn)).clock_offset_s
    seen.revision = await read_revision(conn)
    seen.structure = await read_structure(conn, moving=bool(view.open_jobs))


async def references_of(conn: AsyncConnection[Any], view: View, seen: Seen) -> None:
    """A digest of each reference table that is there. The same on every version of PostgreSQL."""
    tables = [table for table in view.topology.tables if table.reference]
    for shape in await read_shapes(conn, await present(conn, tables)):
        seen.references[shape.table.fullname] = await _digest(conn, shape)


async def _digest(conn: AsyncConnection[Any], shape: TableShape) -> Digest:
    columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in sorted(column.name for column in shape.stored))
    query = sql.SQL(
        "SELECT count(*), coalesce(sum(('x' || left(md5(ROW({})::text), 15))::bit(60)::bigint), 0) FROM {} AS t"
    ).format(columns, shape.name)
    row = await (await conn.execute(query)).fetchone()
    return (0, 0) if row is None else (int(row[0]), int(row[1]))


def across(view: View, seen: Mapping[str, Seen]) -> list[Finding]:
    """What differs between shards. Pure.

    Args:
        view: the cluster.
        seen: shard id -> what it told.
    """
    shards = [shard for shard in view.topology.shards if shard.id in seen]
    return [*_clocks(view, shards, seen), *_structures(view, shards, seen), *_references(shards, seen)]


def _clocks(view: View, shards: list[Shard], seen: Mapping[str, Seen]) -> list[Finding]:
    known = [(offset, shard.name) for shard in shards if (offset := seen[shard.id].clock_s) is not None]
    if len(known) < 2:
        return []
    (low, slow), (high, fast) = min(known), max(known)
    if high - low <= view.limits.clocks_s:
        return []
    what = f"the clock of shard {fast!r} is {high - low:.1f} s ahead of that of shard {slow!r}"
    todo = "let all servers take the time from one place (NTP); nothing is decided by it, but times of rows differ"
    return [Finding(Severity.WARNING, "clocks", f"shards {slow!r}, {fast!r}", what, todo)]


def _structures(view: View, shards: list[Shard], seen: Mapping[str, Seen]) -> list[Finding]:
    arriving = {shard_id for job in view.open_jobs for shard_id in job.targets}
    owning = set(view.topology.ring.shard_ids)
    structures = {
        shard.name: structure
        for shard in shards
        if (structure := seen[shard.id].structure) is not None
        and shard.id not in arriving
        and (structure or shard.id in owning)
    }
    todo = "`schema status` tells it all; bring them into line by a migration, or by hand"
    lines = differences(structures)
    found = [Finding(Severity.ERROR, "drift", "tables", line, todo) for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        found.append(Finding(Severity.ERROR, "drift", "tables", f"and {len(lines) - _SHOWN} more differences", todo))
    if unknown := sorted({name for one in structures.values() for name in real_tables(one)} - _known(view)):
        what = f"the cluster does not know the tables {', '.join(unknown[:_SHOWN])}{' ...' * (len(unknown) > _SHOWN)}"
        todo = (
            "no statement is routed to them, and no job moves their rows; engine.register(metadata) tells the cluster"
        )
        found.append(Finding(Severity.NOTE, "unknown tables", "tables", what, todo))
    revisions = {shard.name: seen[shard.id].revision for shard in shards if structures.get(shard.name)}
    if len(set(revisions.values())) > 1 and not (view.change is not None and view.change.open):
        said = ", ".join(f"{name} at {' and '.join(revision) or 'none'}" for name, revision in revisions.items())
        what = f"the tables are at several revisions: {said}"
        found.append(Finding(Severity.WARNING, "revisions", "tables", what, "`schema apply`, or `schema stamp`"))
    return found


def _known(view: View) -> set[str]:
    return {table.fullname for table in view.topology.tables}


def _references(shards: list[Shard], seen: Mapping[str, Seen]) -> list[Finding]:
    found = []
    for table in sorted({name for shard in shards for name in seen[shard.id].references}):
        digests = {
            shard.name: seen[shard.id].references[table] for shard in shards if table in seen[shard.id].references
        }
        if len(set(digests.values())) < 2:
            continue
        right = Counter(digests.values()).most_common(1)[0][0]
        others = ", ".join(f"{name!r} ({one[0]} rows)" for name, one in digests.items() if one != right)
        what = f"reference table {table!r} holds other rows on {others} than on the rest ({right[0]} rows)"
        todo = "correct the rows by hand, or delete all of them on every shard and load them again: engine.bulk_load"
        found.append(Finding(Severity.ERROR, "references", f"table {table!r}", what, todo))
    return found
