"""What a job writes down in a shard's database: who holds it, how far a stream is applied, what was copied.

The tables are those of the schema `shardlib`. A runner changes nothing on a shard without `claimed` in the same
transaction, so that one which was paused, lost its lease and woke up is refused by the shard itself.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal, LiteralString

from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib_ops.reshard.connect import Runner

__all__ = [
    "Direction",
    "advance",
    "claim",
    "claimed",
    "clear_control",
    "create_keys",
    "drop_control",
    "keys_table",
    "position",
    "publication",
    "slot",
    "start_position",
]

Direction = Literal["forward", "reverse"]

_CLAIM_S: Final = 10
_EARLIER: Final[LiteralString] = """
    FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
     AND application_name ~ %s AND split_part(application_name, ' ', 4)::bigint < %s
"""


def keys_table(job: int) -> sql.Identifier:
    """`shardlib.job_7_keys`: one row for each distinct shard key of the moving ranges."""
    return sql.Identifier("shardlib", f"job_{job:d}_keys")


def publication(job: int) -> str:
    """The publication of a job, alike on all its shards."""
    return f"shardlib_job_{job:d}"


def slot(job: int, leg: int, direction: Direction) -> str:
    """The replication slot of a leg: `forward` on its source, `reverse` on its target."""
    return f"shardlib_job_{job:d}_{leg:d}_{direction[0]}"


def claimed(runner: Runner) -> sql.Composed:
    """`SELECT shardlib.claimed(…)`: the first statement of each transaction that changes something on a shard."""
    return sql.SQL("SELECT shardlib.claimed({}, {})").format(runner.job, runner.token)


async def claim(conn: AsyncConnection[Any], runner: Runner) -> None:
    """Take the job over on one shard: from now on every runner with a lower token is refused here.

    What is in flight here with a lower token is ended, and seen to be gone: the statements of earlier runners, and
    those of this runner that still run in a server to which it has lost the connection.

    Raises:
        TimeoutError: one of them does not end, or does not let go of the job's row; it is named where it can be.
        psycopg.Error: SQLSTATE SL001 if a later runner holds the job.
    """
    async with asyncio.timeout(_CLAIM_S * 2):
        who = (rf"^shardlib job {runner.job} \d+ ", runner.token)
        found = await conn.execute(f"SELECT pid, pg_terminate_backend(pid, %s) {_EARLIER}", (_CLAIM_S * 1000, *who))
        pids = [pid for pid, gone in await found.fetchall() if not gone]
        # One that ended by itself before it could be told to does not count as ended there.
        found = await conn.execute(f"SELECT pid, application_name {_EARLIER} AND pid = ANY(%s)", (*who, pids))
        if left := [f"{pid} ({name})" for pid, name in await found.fetchall()]:
            raise TimeoutError(f"process {', '.join(left)} of an earlier round does not end within {_CLAIM_S} s")
    try:
        await _take(conn, runner)
    except pg.LockNotAvailable:
        raise TimeoutError(
            f"a transaction of an earlier round of job {runner.job} has not ended within {_CLAIM_S} s"
        ) from None


async def _take(conn: AsyncConnection[Any], runner: Runner) -> None:
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = '{_CLAIM_S}s'")
        await conn.execute(
            "INSERT INTO shardlib.job AS j (id, token) VALUES (%s, %s)"
            " ON CONFLICT (id) DO UPDATE SET token = excluded.token WHERE j.token < excluded.token",
            (runner.job, runner.token),
        )
        await conn.execute(claimed(runner))


async def create_keys(conn: AsyncConnection[Any], runner: Runner) -> None:
    """Make the job's key table, which the application's roles may read; idempotent."""
    name = keys_table(runner.job)
    async with conn.transaction():
        await conn.execute(claimed(runner))
        await conn.execute(
            sql.SQL(
                "CREATE TABLE IF NOT EXISTS {} (k text NOT NULL, more text[] NOT NULL"
                " DEFAULT '{{}}', lsn pg_lsn NOT NULL DEFAULT '0/0', PRIMARY KEY (k, more))"
                " WITH (fillfactor = 80)"
            ).format(name)
        )
        # Finds the few keys that changed lately among all that move, and lets updates stay within their page.
        await conn.execute(
            sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} USING brin (lsn) WITH (pages_per_range = 8)").format(
                sql.Identifier(f"job_{runner.job:d}_keys_lsn"), name
            )
        )
        roles = await conn.execute("SELECT unnest(app_roles) FROM shardlib.control")
        for (role,) in await roles.fetchall():
            await conn.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(name, sql.Identifier(role)))


async def clear_control(conn: AsyncConnection[Any], runner: Runner) -> None:
    """Forget what the job has written down on this shard, but not who held it: the last thing a runner does there.

    A runner that has slept since before that would take a job that is forgotten for one that nobody has held yet. And
    what this one has sent already is refused too: the job is held by its next round, which may begin or not.
    """
    async with conn.transaction():
        await _clear(conn, runner)
        await conn.execute("UPDATE shardlib.job SET token = token + 1 WHERE id = %s", (runner.job,))


async def drop_control(conn: AsyncConnection[Any], runner: Runner) -> None:
    """Forget the job on this shard, and who held it: for one whose number is used again."""
    async with conn.transaction():
        await _clear(conn, runner)
        await conn.execute("DELETE FROM shardlib.job WHERE id = %s", (runner.job,))


async def _clear(conn: AsyncConnection[Any], runner: Runner) -> None:
    await conn.execute(claimed(runner))
    for table in ("copied", "position"):
        await conn.execute(f"DELETE FROM shardlib.{table} WHERE job = %s".encode(), (runner.job,))


async def position(conn: AsyncConnection[Any], job: int, leg: int, direction: Direction) -> str | None:
    """Up to where a stream is applied here: an LSN of the server that it comes from; None before its start."""
    found = await conn.execute(
        "SELECT lsn::text FROM shardlib.position WHERE job = %s AND leg = %s AND direction = %s",
        (job, leg, direction),
    )
    row = await found.fetchone()
    return None if row is None else str(row[0])


async def start_position(conn: AsyncConnection[Any], runner: Runner, leg: int, direction: Direction, lsn: str) -> None:
    """Write down where a stream starts. An earlier start is replaced."""
    async with conn.transaction():
        await conn.execute(claimed(runner))
        await conn.execute(
            "INSERT INTO shardlib.position VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (job, leg, direction) DO UPDATE SET lsn = excluded.lsn",
            (runner.job, leg, direction, lsn),
        )


_ADVANCE: Final[LiteralString] = "UPDATE shardlib.position SET lsn = %s WHERE job = %s AND leg = %s AND direction = %s"


async def advance(conn: AsyncConnection[Any], runner: Runner, leg: int, direction: Direction, lsn: str) -> None:
    """Begin a transaction's work on moved rows: check the claim, then write the position, which the guard looks for.

    The caller has begun the transaction.
    """
    await conn.execute(claimed(runner))
    await conn.execute(_ADVANCE, (lsn, runner.job, leg, direction))
