"""Whether the tables of a shard can give their rows to another, and whether that one can take them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from psycopg import AsyncConnection

from shardlib.errors import ShardlibError
from shardlib.topology import Table
from shardlib_ops.reshard.check.facts import Server, TableFacts
from shardlib_ops.reshard.check.fault import Fault
from shardlib_ops.reshard.present import SHOWN, keys_present
from shardlib_ops.reshard.program import find_pg_dump
from shardlib_ops.reshard.rows import Identity, TableShape, read_shapes
from shardlib_ops.reshard.shape import names_of, parts_of, unfit
from shardlib_ops.reshard.world import Failure

__all__ = ["arriving_faults", "key_faults", "shapes_of", "table_faults"]

_KINDS: Final = {"p": "a partitioned table", "f": "a foreign table", "v": "a view", "m": "a materialized view"}


def table_faults(where: str, server: Server, tables: Mapping[Table, TableFacts]) -> Iterator[Fault]:
    """What of the tables themselves, or of the role's rights on them, stands in the way."""
    role = server.role
    for table, facts in tables.items():
        name = f"table {table.fullname!r}"
        if facts.kind != "r":
            yield Fault(
                where, f"{name} is {_KINDS.get(facts.kind, 'no table')}", "only ordinary tables can move: make it one"
            )
            continue
        if facts.persistence != "p":
            yield Fault(
                where, f"{name} is unlogged, so its changes are in no stream", f"ALTER TABLE {_sql(table)} SET LOGGED"
            )
        if facts.family:
            yield Fault(where, f"{name} has a parent or children", "only tables of their own can move: make it one")
        if not facts.mine:
            yield Fault(
                where,
                f"role {role!r} does not own {name}, and cannot publish it",
                f'ALTER TABLE {_sql(table)} OWNER TO "{role}", or GRANT its owner TO "{role}"',
            )
        if not (facts.readable and facts.writable):
            yield Fault(
                where,
                f"role {role!r} may not read and write {name}",
                f'GRANT SELECT, INSERT, UPDATE, DELETE ON {_sql(table)} TO "{role}"',
            )
        if facts.filtered:
            yield Fault(
                where,
                f"row-level security hides rows of {name} from role {role!r}",
                f'ALTER ROLE "{role}" BYPASSRLS, or ALTER TABLE {_sql(table)} NO FORCE ROW LEVEL SECURITY',
            )


async def shapes_of(
    conn: AsyncConnection[Any], where: str, tables: Mapping[Table, TableFacts]
) -> tuple[list[TableShape], list[Fault]]:
    """The shapes of the sharded tables among them, and what is wrong with how their rows are told apart."""
    shapes: list[TableShape] = []
    faults: list[Fault] = []
    for table in [table for table, facts in tables.items() if not table.reference and facts.kind == "r"]:
        try:
            shapes += await read_shapes(conn, [table])
        except ShardlibError as error:
            faults.append(Fault(where, str(error), "see above"))
    for shape in shapes:
        whole = shape.identity is Identity.FULL or (
            shape.identity is Identity.KEY and set(shape.table.key) <= set(shape.identity_columns)
        )
        if not whole:
            told = {
                Identity.NOTHING: "no primary key and no replica identity",
                Identity.KEY: f"the replica identity ({', '.join(shape.identity_columns)})",
            }[shape.identity]
            faults.append(
                Fault(
                    where,
                    f"table {shape.table.fullname!r} has {told}, so the stream does not tell the shard key "
                    f"({', '.join(shape.table.key)}) of a row that is changed",
                    f"ALTER TABLE {_sql(shape.table)} REPLICA IDENTITY FULL",
                )
            )
    return shapes, faults


async def arriving_faults(
    where: str,
    source: tuple[AsyncConnection[Any], Server],
    target: tuple[AsyncConnection[Any], Server],
    tables: Sequence[Table],
    there: Mapping[Table, TableFacts],
) -> AsyncIterator[Fault]:
    """What stops the tables of the source from being made on the target, or differs where they are there."""
    (source_conn, giver), (target_conn, taker) = source, target
    if giver.encoding != taker.encoding:
        yield Fault(
            where,
            f"the source's database is encoded in {giver.encoding}, the target's in {taker.encoding}",
            "make the target's database anew with the source's encoding",
        )
    if giver.collation != taker.collation:
        yield Fault(
            where,
            f"the source's database sorts by {giver.collation!r}, the target's by {taker.collation!r}",
            "make the target's database with the source's locale, if an order of texts matters to the application",
            note=True,
        )
    sharded = [table for table in tables if not table.reference]
    if any(table in there for table in sharded):
        missing = [table.fullname for table in tables if table not in there]
        if missing:
            yield Fault(
                where,
                f"the target has the tables {', '.join(t.fullname for t in there)}, but not {', '.join(missing)}",
                "make them there as they are on the source, or drop all of them there: then they are made",
            )
        both = list(there)
        for line in unfit(await parts_of(source_conn, both), await parts_of(target_conn, both)):
            yield Fault(where, line, "bring the tables into line, or drop them on the target: then they are made")
        return
    for table in there:
        yield Fault(
            where,
            f"the target has the table {table.fullname!r}, but none of the sharded tables",
            "drop it there: it is made with the others",
        )
    for name in giver.extensions:
        if name not in taker.extensions and name not in taker.available:
            yield Fault(
                where,
                f"the source uses the extension {name!r}, which the target's server does not have",
                "install its package on the target's server",
            )
    found = await source_conn.execute(_ROLES.encode(), names_of(tables))
    for (role,) in await found.fetchall():
        if role not in taker.roles:
            yield Fault(
                where,
                f"role {role!r} owns or may use tables of the source, and is not on the target's server",
                f'CREATE ROLE "{role}" there',
            )
    try:
        await find_pg_dump(source_conn.info.server_version)
    except Failure as failure:
        yield Fault(where, str(failure), "see above")


async def key_faults(
    where: str,
    conn: AsyncConnection[Any],
    shapes: Sequence[TableShape],
    moves: Callable[[bytes], bool],
    job: int,
) -> list[Fault]:
    """Rows on the target that a job would bring as well. Only rows of one shard key can collide."""
    found = await keys_present(conn, shapes, moves, job=job)
    if not found:
        return []
    shown = ", ".join(f"{table} {' / '.join(parts)!r}" for table, parts in found)
    return [
        Fault(
            where,
            f"the target holds rows of the ranges that would come: {shown}"
            f"{' and maybe more' if len(found) >= SHOWN else ''}",
            "they are invisible to the application: delete them there",
        )
    ]


def _sql(table: Table) -> str:
    return ".".join(f'"{part}"' for part in (table.schema or "public", table.name))


_ROLES: Final = """
    SELECT DISTINCT r.rolname::text
      FROM unnest(%s::text[], %s::text[]) AS w(schema, name)
      JOIN pg_namespace s ON s.nspname = w.schema
      JOIN pg_class c ON c.relnamespace = s.oid AND c.relname = w.name
     CROSS JOIN LATERAL (SELECT c.relowner UNION SELECT grantee FROM aclexplode(c.relacl)) AS a(role)
      JOIN pg_roles r ON r.oid = a.role AND r.rolname <> current_user
     ORDER BY 1
"""
