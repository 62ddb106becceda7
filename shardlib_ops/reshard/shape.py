"""How tables are made on two servers, and where they differ."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from psycopg import AsyncConnection

from shardlib.topology import Table

__all__ = ["Part", "bare", "differences", "names_of", "parts_of", "present", "unequal", "unfit"]


class Part(NamedTuple):
    """One thing that a table is made of: a column, an index, a constraint, and so on.

    Attributes:
        table: `schema.name`, or `name` in the schema `public`.
        kind: `table`, `column`, `sequence`, `type`, `constraint`, `foreign key`, `index`, `trigger`, `policy`.
        name: its name in the table.
    """

    table: str
    kind: str
    name: str

    def __str__(self) -> str:
        if self.kind == "table":
            return f"table {self.table!r}"
        return f"table {self.table!r}, {self.kind} {self.name!r}"


BEFORE_ROWS: Final = frozenset({"table", "column", "sequence", "type"})
"""Kinds of parts that a table has from the first. The others may come after its rows. See `bare`."""

IDENTITY: Final = ", replica identity "
"""Stands in the text of a table whose replica identity is not the primary key; an index's says so itself."""


def names_of(tables: Iterable[Table]) -> tuple[list[str], list[str]]:
    """Schemas and names, side by side, for a query's `unnest(%s::text[], %s::text[])`."""
    listed = list(tables)
    return [table.schema or "public" for table in listed], [table.name for table in listed]


async def present(conn: AsyncConnection[Any], tables: Sequence[Table]) -> tuple[Table, ...]:
    """Those of the tables that are there, whatever kind of relation they are."""
    found = await conn.execute(
        "SELECT w.n FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS w(schema, name, n)"
        " JOIN pg_namespace s ON s.nspname = w.schema"
        " JOIN pg_class c ON c.relnamespace = s.oid AND c.relname = w.name ORDER BY 1",
        names_of(tables),
    )
    return tuple(tables[number - 1] for (number,) in await found.fetchall())


async def parts_of(conn: AsyncConnection[Any], tables: Sequence[Table]) -> dict[Part, str]:
    """What the tables are made of, as texts that are alike on every server.

    Left out: what shardlib itself has put there, the order of columns, and whether a foreign key was validated.
    """
    found = await conn.execute(_PARTS.encode(), names_of(tables))
    names = [table.fullname for table in tables]
    return {Part(names[number - 1], kind, name): text for number, kind, name, text in await found.fetchall()}


def unequal(origin: Mapping[Part, str], sink: Mapping[Part, str]) -> list[str]:
    """Where two sides differ, one line a part."""
    lines = []
    for part in sorted({*origin, *sink}):
        here, there = origin.get(part), sink.get(part)
        if here == there:
            continue
        if there is None:
            lines.append(f"{part}: not at the target ({here} at the source)")
        elif here is None:
            lines.append(f"{part}: not at the source ({there} at the target)")
        else:
            lines.append(f"{part}: {here} at the source, {there} at the target")
    return lines


def bare(found: Mapping[Part, str]) -> bool:
    """Whether tables have nothing yet of what comes after the rows."""
    return all(
        part.kind in BEFORE_ROWS or (part.kind == "constraint" and text.startswith("CHECK"))
        for part, text in found.items()
    )


def unfit(wanted: Mapping[Part, str], found: Mapping[Part, str]) -> list[str]:
    """Why rows of the one side cannot come to the other: where they differ, one line a part.

    Tables that have neither indexes nor constraints are fit: they get them, and the replica identity, after the rows.
    """
    if not bare(found):
        return unequal(wanted, found)
    early = {part: text for part, text in wanted.items() if part in found or part.kind in BEFORE_ROWS}
    return unequal(_without_identity(early), _without_identity(found))


def _without_identity(parts: Mapping[Part, str]) -> dict[Part, str]:
    return {part: text.partition(IDENTITY)[0] if part.kind == "table" else text for part, text in parts.items()}


async def differences(
    origin_conn: AsyncConnection[Any], sink_conn: AsyncConnection[Any], tables: Sequence[Table]
) -> list[str]:
    """Where the tables of two databases are not made alike: one line for each difference, empty if there is none.

    Compared are, by their names: columns (type, NULL, default, generated, identity, collation; an enum's labels),
    constraints, indexes, triggers, row-level security, replica identity, and whether a table is one at all.

    Args:
        origin_conn: the source; both connections have `search_path ''` (see `connect`).
        sink_conn: the target.
        tables: which; one that is on neither side counts as equal.
    """
    return unequal(*await asyncio.gather(parts_of(origin_conn, tables), parts_of(sink_conn, tables)))


_PARTS: Final = """
WITH t AS (
    SELECT w.n, c.* FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS w(schema, name, n)
      JOIN pg_namespace s ON s.nspname = w.schema
      JOIN pg_class c ON c.relnamespace = s.oid AND c.relname = w.name
)
SELECT t.n, 'table', '', concat_ws(', ',
           CASE t.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'f' THEN 'foreign table'
                WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' ELSE 'relation of kind ' || t.relkind::text END,
           CASE t.relpersistence WHEN 'u' THEN 'unlogged' WHEN 't' THEN 'temporary' END,
           CASE t.relreplident WHEN 'f' THEN 'replica identity full' WHEN 'n' THEN 'replica identity nothing' END)
  FROM t
UNION ALL
SELECT t.n, 'column', a.attname, concat_ws(' ',
           format_type(a.atttypid, a.atttypmod),
           CASE WHEN a.attcollation <> y.typcollation THEN
               (SELECT format('COLLATE %%I.%%I', cn.nspname, co.collname) FROM pg_collation co
                  JOIN pg_namespace cn ON cn.oid = co.collnamespace WHERE co.oid = a.attcollation) END,
           CASE WHEN a.attnotnull THEN 'NOT NULL' ELSE 'NULL' END,
           CASE a.attidentity WHEN 'a' THEN 'GENERATED ALWAYS AS IDENTITY' WHEN 'd' THEN 'GENERATED AS IDENTITY' END,
           CASE WHEN d.oid IS NOT NULL THEN
               CASE WHEN a.attgenerated <> '' THEN 'GENERATED AS ' ELSE 'DEFAULT ' END
               || pg_get_expr(d.adbin, d.adrelid) END)
  FROM t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
  JOIN pg_type y ON y.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
UNION ALL
SELECT t.n, 'type', format_type(y.oid, NULL), 'enum of ' ||
           (SELECT string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder)
              FROM pg_enum e WHERE e.enumtypid = y.oid)
  FROM t JOIN pg_type y ON y.typtype = 'e' AND y.oid IN
       (SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped)
UNION ALL
SELECT t.n, 'sequence', x.relname, format_type(q.seqtypid, NULL)
  FROM t JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
                         AND d.refobjid = t.oid AND d.deptype IN ('a', 'i')
  JOIN pg_sequence q ON q.seqrelid = d.objid JOIN pg_class x ON x.oid = d.objid
UNION ALL
SELECT t.n, CASE k.contype WHEN 'f' THEN 'foreign key' ELSE 'constraint' END, k.conname,
       regexp_replace(pg_get_constraintdef(k.oid), ' NOT VALID$', '')
  FROM t JOIN pg_constraint k ON k.conrelid = t.oid AND k.contype NOT IN ('t', 'n')
UNION ALL
SELECT t.n, 'index', x.relname, concat_ws(', ', pg_get_indexdef(i.indexrelid),
           CASE WHEN NOT i.indisvalid THEN 'invalid' END, CASE WHEN i.indisreplident THEN 'the replica identity' END)
  FROM t JOIN pg_index i ON i.indrelid = t.oid JOIN pg_class x ON x.oid = i.indexrelid
UNION ALL
SELECT t.n, 'trigger', g.tgname, concat_ws(', ', pg_get_triggerdef(g.oid),
           CASE g.tgenabled WHEN 'D' THEN 'disabled' WHEN 'A' THEN 'enabled always'
                            WHEN 'R' THEN 'enabled on replicas' END)
  FROM t JOIN pg_trigger g ON g.tgrelid = t.oid AND NOT g.tgisinternal
  JOIN pg_proc f ON f.oid = g.tgfoid JOIN pg_namespace fs ON fs.oid = f.pronamespace AND fs.nspname <> 'shardlib'
UNION ALL
SELECT t.n, 'policy', '', concat_ws(', ', 'row-level security', CASE WHEN t.relforcerowsecurity THEN 'forced' END)
  FROM t WHERE t.relrowsecurity
UNION ALL
SELECT t.n, 'policy', p.polname, concat_ws(' ',
           CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END, 'FOR', p.polcmd::text, 'TO',
           (SELECT string_agg(CASE WHEN r = 0 THEN 'public' ELSE pg_get_userbyid(r)::text END, ', ' ORDER BY 1)
              FROM unnest(p.polroles) AS r),
           'USING ' || pg_get_expr(p.polqual, p.polrelid), 'CHECK ' || pg_get_expr(p.polwithcheck, p.polrelid))
  FROM t JOIN pg_policy p ON p.polrelid = t.oid
"""
