"""The old side's database refuses rows of moved ranges, whoever writes them: psql, a trigger, a cascade, COPY.

Each sharded table has a function and two triggers of the job's, which fire always (also under
`session_replication_role = replica`). At first the function lets everything pass; making it active replaces the
function alone, so that no lock on a table is waited for in the short time of a cutover.

An active guard computes the token of the row's key as the library does, and looks it up in the moved ranges. A row that
has moved passes only in a transaction that has written the job's row in `shardlib.position`, which the job's own
streams and its cleanup do, and no application can. A row without a key (NULL) is of no range and passes.

What it cannot stop is the owner of a table who takes the guard off, detaches or drops a partition, or makes a BEFORE
trigger later whose name comes after the guard's and which changes the key. A partition made while the guard is on gets
its row trigger, but not the one that refuses TRUNCATE of that partition alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.key.sql import key_text
from shardlib.ring import TokenRange, merge_ranges
from shardlib.ring.ranges import TOKEN_MAX
from shardlib.token import hash_of
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import claimed
from shardlib_ops.reshard.guard import murmur3, xxh3
from shardlib_ops.reshard.guard.arithmetic import SIGN
from shardlib_ops.reshard.locks import with_short_locks
from shardlib_ops.reshard.rows import TableShape

__all__ = ["activate_guard", "deactivate_guard", "install_guard", "remove_guard", "token_function"]

_SQLSTATE: Final = "SL002"
_HASHES: Final = {"murmur3": (murmur3.DECLARE, murmur3.body), "xxhash": (xxh3.DECLARE, xxh3.body)}
_EVENTS: Final = {
    # Row triggers fire in the order of their names: after `~` comes none that could still change the key.
    "guard": "BEFORE INSERT OR UPDATE OR DELETE ON {table} FOR EACH ROW",
    "guard_all": "BEFORE TRUNCATE ON {table} FOR EACH STATEMENT",
}
_INACTIVE: Final = "BEGIN\nIF TG_OP = 'DELETE' THEN RETURN OLD; END IF;\nRETURN NEW;\nEND"


async def install_guard(
    conn: AsyncConnection[Any], runner: Runner, shapes: Sequence[TableShape], *, budget_s: float = 30.0
) -> None:
    """Put the guard on each table, inactive; one that is there stays as it is. Idempotent.

    Making a trigger takes a lock that waits for the table's writers and holds up others: each attempt waits only a
    moment.

    Args:
        conn: autocommit connection to the shard's primary, of a role that owns the tables.
        runner: who is at work.
        shapes: the sharded tables, as they are in this database.
        budget_s: seconds for all attempts on one table.

    Raises:
        Blocked: transactions hold a table for longer than the budget; they are named.
        InvalidTopology: a trigger of the application's fires after the guard, and could change the key then.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    for shape in shapes:
        await _refuse_later_triggers(conn, shape)
        function = _function(runner.job, shape)
        row = await (await conn.execute("SELECT to_regproc(%s) IS NULL", (function.as_string(conn),))).fetchone()
        if row is not None and row[0]:
            async with conn.transaction():
                await conn.execute(claimed(runner))
                await conn.execute(_create(function, _INACTIVE))
                await conn.execute(sql.SQL("REVOKE ALL ON FUNCTION {}() FROM PUBLIC").format(function))
        missing = await (await conn.execute(_MISSING, (runner.job, shape.oid))).fetchall()
        for oid, schema, name, event in missing:
            await with_short_locks(
                conn,
                runner,
                _Creation(conn, runner.job, event, sql.Identifier(schema, name), function),
                tables=[oid],
                what=f"the guard on table {shape.table.fullname!r}",
                budget_s=budget_s,
            )


async def activate_guard(
    conn: AsyncConnection[Any],
    runner: Runner,
    shapes: Sequence[TableShape],
    *,
    hash_function: str,
    ranges: Sequence[TokenRange],
    places: Sequence[tuple[str, Sequence[TokenRange]]] = (),
) -> None:
    """From when this returns, every transaction that begins to write a table finds the guard active. Idempotent.

    It takes no lock on a table. A transaction that has written the table before may go on with what it knows (an UPDATE
    or DELETE under locks that it holds already does not look for news): wait for those that `foreign_writers` finds, as
    `lasting` tells them from newcomers.

    Args:
        conn: autocommit connection to the shard's primary.
        runner: who is at work.
        shapes: the sharded tables, on which `install_guard` has put the guard.
        hash_function: the cluster's.
        ranges: what has moved away, of all of the job's legs of this shard.
        places: names of the shards that have the rows now, with their ranges: for the message of a refusal.

    Raises:
        InvalidArgument: there are no ranges, or there is no such hash function.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    hash_of(hash_function)
    if not ranges:
        raise InvalidArgument("ranges", tuple(ranges), "at least one range")
    await _replace(
        conn,
        runner,
        [
            (shape, _active(runner.job, shape, conn.info.server_version, hash_function, ranges, places))
            for shape in shapes
        ],
    )


async def deactivate_guard(conn: AsyncConnection[Any], runner: Runner, shapes: Sequence[TableShape]) -> None:
    """Let everything pass again; without a lock on a table, as `activate_guard`. Idempotent.

    Raises:
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    await _replace(conn, runner, [(shape, _INACTIVE) for shape in shapes])


async def remove_guard(
    conn: AsyncConnection[Any], runner: Runner, shapes: Sequence[TableShape], *, budget_s: float = 30.0
) -> None:
    """Take the guard off each table. Idempotent.

    Raises:
        Blocked: transactions hold a table for longer than the budget; they are named.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    for shape in shapes:
        drop = sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE").format(_function(runner.job, shape))
        await with_short_locks(
            conn,
            runner,
            lambda drop=drop: conn.execute(drop),  # type: ignore[misc]  # bound now
            tables=[shape.oid],
            what=f"taking the guard off table {shape.table.fullname!r}",
            budget_s=budget_s,
        )


def token_function(name: sql.Identifier, hash_function: str, server_version: int) -> sql.Composed:
    """`CREATE FUNCTION name(key bytea) RETURNS bigint`: the token's 64 bits, as a guard computes them.

    Raises:
        InvalidArgument: there is no such hash function.
    """
    hash_of(hash_function)
    declare, body = _HASHES[hash_function]
    text = f"DECLARE token bigint; {declare}\nBEGIN\n{body(server_version)}RETURN token;\nEND"
    return sql.SQL(
        "CREATE FUNCTION {}(key bytea) RETURNS bigint LANGUAGE plpgsql IMMUTABLE STRICT"
        " SET search_path = pg_catalog, pg_temp AS {}"
    ).format(name, text)


class _Creation:
    """Makes one trigger, in a transaction that has begun."""

    def __init__(
        self, conn: AsyncConnection[Any], job: int, event: str, table: sql.Identifier, function: sql.Identifier
    ) -> None:
        self._conn, self._table, self._function, self._event = conn, table, function, event
        self._trigger = sql.Identifier(f"~shardlib_job_{job:d}_{event}")

    async def __call__(self) -> None:
        names = {"trigger": self._trigger, "table": self._table, "function": self._function}
        await self._conn.execute(sql.SQL("DROP TRIGGER IF EXISTS {trigger} ON {table}").format(**names))
        event = sql.SQL(_EVENTS[self._event]).format(**names)
        await self._conn.execute(
            sql.SQL("CREATE TRIGGER {trigger} {event} EXECUTE FUNCTION {function}()").format(event=event, **names)
        )
        await self._conn.execute(sql.SQL("ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}").format(**names))


async def _replace(conn: AsyncConnection[Any], runner: Runner, bodies: Sequence[tuple[TableShape, str]]) -> None:
    async with conn.transaction():
        await conn.execute(claimed(runner))
        for shape, body in bodies:
            await conn.execute(_create(_function(runner.job, shape), body))


def _function(job: int, shape: TableShape) -> sql.Identifier:
    # By the table's OID: it stays when other tables come and go.
    return sql.Identifier("shardlib", f"job_{job:d}_guard_{shape.oid:d}")


def _create(function: sql.Identifier, body: str) -> sql.Composed:
    # A backslash in a literal means what the session says, unless it is pinned; a pin costs something in each call.
    pinned = sql.SQL(" SET standard_conforming_strings = on" if "\\" in body else "")
    return sql.SQL(
        "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
        " SET search_path = pg_catalog, pg_temp{} AS {}"
    ).format(function, pinned, body)


def _active(
    job: int,
    shape: TableShape,
    server_version: int,
    hash_function: str,
    ranges: Sequence[TokenRange],
    places: Sequence[tuple[str, Sequence[TokenRange]]],
) -> str:
    declare, hash_body = _HASHES[hash_function]
    passes = f"EXISTS (SELECT FROM shardlib.position p WHERE p.job = {job:d} AND p.xmin = pg_current_xact_id()::xid)"
    where = "".join(f" WHEN {_inside(parts)} THEN {_literal(f'shard {name}')}" for name, parts in places)
    table = _literal(shape.table.fullname)
    hint = _literal(
        "Write through shardlib, which finds the shard, or connect to the shard that has the key now."
        f" Job {job} is over when this copy is removed."
    )
    return f"""DECLARE key bytea; old_key bytea; shown text; token bigint; {declare}
BEGIN
IF TG_OP = 'TRUNCATE' THEN
IF NOT {passes} THEN
RAISE EXCEPTION USING ERRCODE = '{_SQLSTATE}', HINT = {hint}, MESSAGE = format(
'table %s cannot be truncated here: some of its rows have moved to another shard (job {job})', {table});
END IF;
RETURN NULL;
END IF;
IF TG_OP <> 'INSERT' THEN old_key := {_bytes(shape, "old")}; END IF;
IF TG_OP <> 'DELETE' THEN key := {_bytes(shape, "new")}; ELSE key := old_key; END IF;
LOOP
IF key IS NOT NULL THEN
{hash_body(server_version)}IF {_inside(ranges)} THEN
IF NOT {passes} THEN
IF key = old_key THEN shown := {_shown(shape, "old")}; ELSE shown := {_shown(shape, "new")}; END IF;
RAISE EXCEPTION USING ERRCODE = '{_SQLSTATE}', HINT = {hint}, MESSAGE = format(
'%s of table %s is refused: this key has moved to %s (key %s, job {job})', TG_OP, {table},
(CASE{where or " WHEN false THEN ''"} ELSE 'another shard' END), shown);
END IF;
END IF;
END IF;
EXIT WHEN old_key IS NULL OR old_key = key;
key := old_key;
END LOOP;
IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
RETURN NEW;
END"""


def _inside(ranges: Sequence[TokenRange]) -> str:
    """SQL: `token` is in one of the ranges: a binary search of where they begin and end."""
    bounds = []
    for first, last in merge_ranges(ranges):
        bounds.append(first)
        if last < TOKEN_MAX:
            bounds.append(last + 1)
    # Flipping the first bit puts unsigned numbers in signed order; as a Python number that is a subtraction.
    listed = ",".join(str(bound - (1 << 63)) for bound in bounds)
    return f"width_bucket(token # {SIGN}, '{{{listed}}}'::bigint[]) & 1 = 1"


def _texts(shape: TableShape, row: str) -> list[str]:
    bases = {column.name: column.base for column in shape.columns}
    return [key_text(sql.Identifier(row, part).as_string(), bases[part]) for part in shape.table.key]


def _bytes(shape: TableShape, row: str) -> str:
    """SQL: the key bytes of a row; NULL if a part is. See `shardlib.key.composite`."""
    return " || decode('00', 'hex') || ".join(f"convert_to(({text})::text, 'UTF8')" for text in _texts(shape, row))


def _shown(shape: TableShape, row: str) -> str:
    return f"concat_ws(', ', {', '.join(f'quote_literal({text})' for text in _texts(shape, row))})"


def _literal(text: str) -> str:
    quoted = "'" + text.replace("'", "''") + "'"
    if "\\" in text:
        raise InvalidArgument("name", text, "without a backslash")
    return quoted


async def _refuse_later_triggers(conn: AsyncConnection[Any], shape: TableShape) -> None:
    found = await conn.execute(_LATER, (shape.oid,))
    row = await found.fetchone()
    if row is not None:
        raise InvalidTopology(
            f"trigger {row[0]!r} of table {shape.table.fullname!r} fires after every trigger of shardlib's",
            "rename it (ALTER TRIGGER ... RENAME TO ...) so that its name comes before '~': it could change the shard "
            "key of a row that was looked at already",
        )


_LATER: Final = """
    SELECT g.tgname::text FROM pg_trigger g JOIN pg_proc f ON f.oid = g.tgfoid
      JOIN pg_namespace s ON s.oid = f.pronamespace
     WHERE g.tgrelid = %s AND NOT g.tgisinternal AND g.tgtype & 3 = 3 AND g.tgname::text COLLATE "C" >= '~'
       AND s.nspname <> 'shardlib'
     ORDER BY 1 LIMIT 1
"""

# A partition gets the row trigger of its table, but no statement trigger.
_MISSING: Final = """
    SELECT c.oid, n.nspname::text, c.relname::text, e.event
      FROM (SELECT %s::bigint AS job, %s::oid AS oid) w
      CROSS JOIN LATERAL (SELECT w.oid AS relid UNION SELECT relid FROM pg_partition_tree(w.oid)) t
      JOIN pg_class c ON c.oid = t.relid
      JOIN pg_namespace n ON n.oid = c.relnamespace
      CROSS JOIN (VALUES ('guard'), ('guard_all')) e(event)
     WHERE (c.oid = w.oid OR e.event = 'guard_all')
       AND NOT EXISTS (
           SELECT FROM pg_trigger g JOIN pg_proc f ON f.oid = g.tgfoid
            WHERE g.tgrelid = c.oid AND g.tgenabled = 'A' AND f.pronamespace = 'shardlib'::regnamespace
              AND f.proname = format('job_%%s_guard_%%s', w.job, w.oid)
              AND g.tgname = format('~shardlib_job_%%s_%%s', w.job, e.event))
     ORDER BY c.oid, e.event
"""
