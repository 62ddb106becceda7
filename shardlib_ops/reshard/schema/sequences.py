"""Sequences: the side that takes over gives no number that the other has given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import claimed
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.world import Blocked, Failure

__all__ = ["advance_sequences"]

_STEPS_MAX: Final = 10_000
_LOCK_MS: Final = 100
_BUDGET_S: Final = 10.0
_PAUSE_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class _Counter:
    """Where a sequence stands.

    Attributes:
        name: quoted, with its schema.
        increment: never 0.
        bound: the last number it may give: the maximum, or descending the minimum.
        given: the number it gave last; before the first, the one that would come before it.
    """

    name: sql.Identifier
    increment: int
    bound: int
    given: int

    def towards(self, number: int) -> int:
        """How many steps of its own lead to `number` or past it; 0 if it is there."""
        return max(0, -((self.given - number) // self.increment))


async def advance_sequences(
    giver_conn: AsyncConnection[Any],
    taker_conn: AsyncConnection[Any],
    runner: Runner,
    shapes: Sequence[TableShape],
    *,
    ahead: int,
) -> None:
    """Let each sequence of these tables stand on the taker at least where it stands on the giver, plus `ahead` steps.

    Sequences of a table are those it owns (serial and identity columns) and those its defaults use. One that is far
    enough is not touched. Each moves in whole steps of its own, so that sequences which were set up to interleave
    still do, and never back, whatever others draw from it meanwhile. None goes past its bound.

    Args:
        giver_conn: the side whose numbers count; not in a transaction.
        taker_conn: the side that is changed, in a transaction that holds the claim; not in a transaction.
        runner: who is at work.
        shapes: the tables, as they are on the giver.
        ahead: steps of the giver's sequence to be ahead of it.

    Raises:
        Failure: the taker has no such sequence, or it counts in the other direction.
        Blocked: a sequence that is far behind is in use by transactions that do not end.
        psycopg.Error: a server was lost, or another runner holds the job.
    """
    found = await giver_conn.execute(_LIST.encode(), {"tables": [shape.oid for shape in shapes]})
    names = [sql.Identifier(schema, name) for schema, name in await found.fetchall()]
    if not names:
        return
    try:
        given, taken = await together([_read(giver_conn, names), _read(taker_conn, names)])
    except pg.UndefinedTable as error:
        raise Failure(
            f"the target lacks a sequence of the source: {error.diag.message_primary}; "
            "create it there as it is on the source"
        ) from error
    behind: list[tuple[_Counter, int]] = []
    for here, there in zip(given, taken, strict=True):
        if (here.increment > 0) is not (there.increment > 0):
            raise Failure(
                f"sequence {here.name.as_string()} counts by {here.increment} on the source and by {there.increment} "
                "on the target; alter it on the target"
            )
        limit = min if here.increment > 0 else max
        wanted = limit(here.given + ahead * here.increment, there.bound)
        if there.towards(wanted):
            behind.append((there, wanted))
    near = [(counter, wanted) for counter, wanted in behind if counter.towards(wanted) <= _STEPS_MAX]
    if near:
        async with taker_conn.transaction():
            await taker_conn.execute(claimed(runner))
            await taker_conn.execute(sql.SQL("; ").join(_drawn(*one) for one in near))
    for counter, wanted in behind:
        if counter.towards(wanted) > _STEPS_MAX:
            await _set(taker_conn, runner, counter, wanted)


def _drawn(counter: _Counter, wanted: int) -> sql.Composed:
    """SQL that draws the numbers in between, which needs no lock and takes nobody's number."""
    # A step that would pass the bound is refused, or starts again: it is left out.
    steps = min(counter.towards(wanted), (counter.bound - counter.given) // counter.increment)
    return sql.SQL("SELECT max(nextval({}::regclass)) FROM generate_series(1, {})").format(
        sql.Literal(counter.name.as_string()), steps
    )


async def _set(conn: AsyncConnection[Any], runner: Runner, counter: _Counter, wanted: int) -> None:
    """Set a sequence that is far behind. Nobody draws from it between the look and the change."""
    deadline = time.monotonic() + _BUDGET_S
    while True:
        try:
            async with conn.transaction():
                await conn.execute(claimed(runner))
                await conn.execute(f"SET LOCAL lock_timeout = {_LOCK_MS}".encode())
                await _lock(conn, counter.name)
                now = (await _read(conn, [counter.name]))[0]
                steps = min(now.towards(wanted), (now.bound - now.given) // now.increment)
                if steps:
                    await conn.execute(
                        "SELECT setval(%s::regclass, %s)",
                        (now.name.as_string(), now.given + steps * now.increment),
                    )
                return
        except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
            if time.monotonic() > deadline:
                raise Blocked(
                    f"sequence {counter.name.as_string()} stands at {counter.given} and must be set to {wanted}, but "
                    f"transactions that have drawn from it did not end within {_BUDGET_S:g} s"
                ) from error
        await asyncio.sleep(_PAUSE_S)


async def _lock(conn: AsyncConnection[Any], name: sql.Identifier) -> None:
    """Let nobody draw from a sequence until the transaction ends."""
    row = await (
        await conn.execute(
            "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s::regclass", (name.as_string(),)
        )
    ).fetchone()
    if row is None:
        raise Failure(f"sequence {name.as_string()} was dropped on the target; create it there as it is on the source")
    # Changes nothing, but takes the lock that drawing a number waits for. LOCK TABLE takes no sequences.
    await conn.execute(sql.SQL("ALTER SEQUENCE {} OWNER TO {}").format(name, sql.Identifier(row[0])))


async def _read(conn: AsyncConnection[Any], names: Sequence[sql.Identifier]) -> list[_Counter]:
    query = sql.SQL(" UNION ALL ").join(
        sql.SQL(
            "SELECT {number}, v.last_value, v.is_called, s.seqincrement, s.seqmin, s.seqmax"
            " FROM {name} AS v, pg_sequence AS s WHERE s.seqrelid = {text}::regclass"
        ).format(number=number, name=name, text=sql.Literal(name.as_string()))
        for number, name in enumerate(names)
    )
    found = []
    for number, last, called, increment, low, high in sorted(await (await conn.execute(query)).fetchall()):
        found.append(
            _Counter(
                name=names[number],
                increment=increment,
                bound=high if increment > 0 else low,
                given=last if called else last - increment,
            )
        )
    return found


_LIST: Final = """
    SELECT DISTINCT n.nspname::text, c.relname::text
      FROM (SELECT d.objid FROM pg_depend d
             WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
               AND d.deptype IN ('a', 'i') AND d.refobjid = ANY (%(tables)s::oid[])
            UNION
            SELECT d.refobjid FROM pg_attrdef a
              JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid
               AND d.refclassid = 'pg_class'::regclass
             WHERE a.adrelid = ANY (%(tables)s::oid[])) AS s(oid)
      JOIN pg_class c ON c.oid = s.oid AND c.relkind = 'S'
      JOIN pg_namespace n ON n.oid = c.relnamespace
     ORDER BY 1, 2
"""
