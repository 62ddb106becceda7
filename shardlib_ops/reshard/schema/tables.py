"""The tables of a shard, made on another one: what they must have before their rows come, and what after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, LiteralString

from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib.topology import Table
from shardlib_ops.reshard.control import claimed
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.present import SHOWN, keys_present
from shardlib_ops.reshard.rows import read_shapes
from shardlib_ops.reshard.schema.dump import OURS, Entry, apply, dump
from shardlib_ops.reshard.schema.reference import copy_references, fill, together_locked
from shardlib_ops.reshard.schema.revision import copy_revision
from shardlib_ops.reshard.shape import bare, names_of, parts_of, present, unequal, unfit
from shardlib_ops.reshard.world import Blocked, Failure

__all__ = ["copy_after_rows", "copy_before_rows", "validate_foreign_keys"]

_LOCK_S: Final = 10
_BUILD_MEMORY: Final = "256MB"
_IDENTITIES: Final[Mapping[str, LiteralString]] = {"d": "DEFAULT", "f": "FULL", "n": "NOTHING"}


async def copy_before_rows(link: Link, references: Sequence[Table]) -> bool:
    """Let the sink have the origin's tables, and the rows of the reference tables.

    None of the sharded tables is there: everything in the origin's database but its rows, indexes and constraints is
    made in one transaction, together with the rows of the reference tables. All are there: they must be made alike.
    Idempotent.

    Args:
        link: a leg, forward.
        references: the cluster's reference tables.

    Returns:
        whether the tables were made here.

    Raises:
        Failure: the tables differ, or some are missing, or the sink has rows of the link's ranges that are not this
            job's, or a reference table differs.
        Blocked: a lock could not be had.
        psycopg.Error: a server was lost, or another runner holds the job.
    """
    async with await link.open_origin("schema") as origin, await link.open_sink("schema") as sink:
        there = await present(sink, link.tables)
        made = not there
        if made:
            await _make(link, references, origin, sink)
        else:
            _none_missing(link, await present(sink, (*link.tables, *references)), references)
            await _require_alike(link, (*link.tables, *references), origin, sink)
        await _require_no_rows(link, sink)
        if references:
            await copy_references(link, references, origin, sink)
    return made


async def copy_after_rows(link: Link, references: Sequence[Table] = ()) -> None:
    """Let the sink have the origin's indexes, constraints, triggers and policies, if it has none of them.

    In one transaction; idempotent: nothing is done where both are alike. A foreign key that does not hold yet is added
    NOT VALID. A sink without a revision of the application's migrations then has the origin's.

    Args:
        link: a leg, forward.
        references: reference tables to bring into step first. Between their first copy and the job's announcement a
            load did not know of the new shard yet; from the announcement on it loads both.

    Raises:
        Failure: the sink has some, but not those of the origin; or refuses one.
        Blocked: a lock could not be had.
        psycopg.Error: a server was lost, or another runner holds the job.
    """
    async with await link.open_origin("schema") as origin, await link.open_sink("schema") as sink:
        if references:
            await copy_references(link, references, origin, sink)
        wanted = await parts_of(origin, link.tables)
        found = await parts_of(sink, link.tables)
        if wanted != found:
            if not bare(found):
                raise Failure(_different(link, unequal(wanted, found)))
            await _complete(link, origin, sink)
        # Only now: tables that lack their indexes are at no revision.
        await copy_revision(origin, sink, link.runner)


async def _complete(link: Link, origin: AsyncConnection[Any], sink: AsyncConnection[Any]) -> None:
    listed = await _dumped(link, origin, "post-data")
    async with sink.transaction():
        await sink.execute(claimed(link.runner))
        await sink.execute(
            f"SET LOCAL lock_timeout = '{_LOCK_S}s'; SET LOCAL maintenance_work_mem = '{_BUILD_MEMORY}'".encode()
        )
        await apply(sink, link.sink, listed)
        await _restore_identity(link, origin, sink)
        if lines := unequal(await parts_of(origin, link.tables), await parts_of(sink, link.tables)):
            raise Failure(_different(link, lines))


async def validate_foreign_keys(link: Link) -> tuple[str, ...]:
    """Validate the sink's foreign keys that were added before all rows were there, if they are valid at the origin.

    For when both sides are in step. Writers are not held up. Each in a transaction of its own; idempotent.

    Returns:
        those that do not hold, as `table.constraint`.

    Raises:
        Blocked: a lock could not be had.
        psycopg.Error: a server was lost, or another runner holds the job.
    """
    left = []
    async with await link.open_origin("schema") as origin, await link.open_sink("schema") as sink:
        valid = {place for place, holds in await _foreign_keys(origin, link.tables) if holds}
        for place, holds in await _foreign_keys(sink, link.tables):
            if holds or place not in valid:
                continue
            schema, table, name = place
            try:
                async with sink.transaction():
                    await sink.execute(claimed(link.runner))
                    await sink.execute(f"SET LOCAL lock_timeout = '{_LOCK_S}s'".encode())
                    await sink.execute(
                        sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(
                            sql.Identifier(schema, table), sql.Identifier(name)
                        )
                    )
            except pg.ForeignKeyViolation:
                left.append(f"{table}.{name}")
            except pg.LockNotAvailable as error:
                raise Blocked(
                    f"the foreign key {name!r} of table {table!r} on shard {link.sink.name!r} cannot be validated: "
                    f"somebody holds a lock on the table for {_LOCK_S} s"
                ) from error
    return tuple(left)


async def _foreign_keys(conn: AsyncConnection[Any], tables: Sequence[Table]) -> list[tuple[tuple[str, str, str], bool]]:
    found = await conn.execute(
        "SELECT w.schema, w.name, k.conname::text, k.convalidated"
        " FROM unnest(%s::text[], %s::text[]) AS w(schema, name) JOIN pg_namespace s ON s.nspname = w.schema"
        " JOIN pg_class c ON c.relnamespace = s.oid AND c.relname = w.name"
        " JOIN pg_constraint k ON k.conrelid = c.oid AND k.contype = 'f' ORDER BY 1, 2, 3",
        names_of(tables),
    )
    return [((schema, table, name), holds) for schema, table, name, holds in await found.fetchall()]


async def _make(
    link: Link, references: Sequence[Table], origin: AsyncConnection[Any], sink: AsyncConnection[Any]
) -> None:
    listed = await _dumped(link, origin, "pre-data")
    shapes = await read_shapes(origin, references)

    async def work() -> None:
        # Made and filled in one: nobody loads a reference table that is there and has not its rows yet.
        await apply(sink, link.sink, listed)
        for table in link.tables:
            # The job publishes them, and a published table without an identity refuses to have rows deleted.
            await sink.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL").format(_name(table)))
        for shape in shapes:
            await fill(link, shape, origin, sink)

    await together_locked(link, references, origin, sink, work, sink_locks=False)


async def _restore_identity(link: Link, origin: AsyncConnection[Any], sink: AsyncConnection[Any]) -> None:
    """The origin's replica identity, unless it is an index: that came with the index."""
    for table in link.tables:
        query = "SELECT relreplident::text FROM pg_class WHERE oid = to_regclass(%s)"
        row = await (await origin.execute(query, (_name(table).as_string(),))).fetchone()
        if row is not None and (identity := _IDENTITIES.get(row[0])) is not None:
            await sink.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(_name(table), sql.SQL(identity)))


def _name(table: Table) -> sql.Identifier:
    return sql.Identifier(table.schema or "public", table.name)


async def _dumped(link: Link, origin: AsyncConnection[Any], section: Any) -> list[Entry]:
    row = await (await origin.execute(_OTHER_OWNERS.encode(), (list(OURS),))).fetchone()
    return await dump(
        link.origin,
        section,
        server_version=origin.info.server_version,
        application=link.runner.application(f"schema {link.number}"),
        owners=row is not None and bool(row[0]),
    )


def _none_missing(link: Link, there: Sequence[Table], references: Sequence[Table]) -> None:
    missing = [table.fullname for table in (*link.tables, *references) if table not in there]
    if missing:
        raise Failure(
            f"shard {link.sink.name!r} has the tables {', '.join(table.fullname for table in there)}, but not "
            f"{', '.join(missing)}; make them there as they are on shard {link.origin.name!r}, or drop all of them "
            "there: then they are made"
        )


async def _require_alike(
    link: Link, tables: Sequence[Table], origin: AsyncConnection[Any], sink: AsyncConnection[Any]
) -> None:
    # Those without indexes were made by a runner that did not come to the rest: that is done after the rows.
    if lines := unfit(await parts_of(origin, tables), await parts_of(sink, tables)):
        raise Failure(_different(link, lines))


def _different(link: Link, lines: Sequence[str]) -> str:
    return (
        f"the tables of shard {link.sink.name!r} (target) are not made like those of {link.origin.name!r} (source): "
        f"{'; '.join(lines)}. Bring them into line, or drop the tables on the target: then they are made"
    )


async def _require_no_rows(link: Link, sink: AsyncConnection[Any]) -> None:
    shapes = await read_shapes(sink, link.tables)
    found = await keys_present(sink, shapes, link.moves, job=link.runner.job)
    if found:
        shown = ", ".join(f"{table} {' / '.join(parts)!r}" for table, parts in found)
        more = " and maybe more" if len(found) == SHOWN else ""
        raise Failure(
            f"shard {link.sink.name!r} holds rows already that shard {link.origin.name!r} would bring, with the keys "
            f"{shown}{more}; they are invisible to the application: delete them there"
        )


_OTHER_OWNERS: Final = """
    SELECT EXISTS (
        SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND n.nspname <> ALL (%s)
           AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
           AND c.relowner <> (SELECT oid FROM pg_roles WHERE rolname = current_user)
           AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                                                     AND d.deptype = 'e'))
"""
