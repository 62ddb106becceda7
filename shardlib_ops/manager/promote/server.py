"""One server of a shard under promotion: what is asked of it and done to it, by SQL alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
from psycopg import AsyncConnection, sql

from shardlib.dsn import Dsn
from shardlib.fence.gate import Closing, close_gate, list_gates, open_gate
from shardlib_ops.reshard.connect import Runner, connect, connect_blocking
from shardlib_ops.reshard.control import claimed

__all__ = ["JOB", "Demoted", "Node", "Rejoin", "until"]

T = TypeVar("T")

JOB: Final = 0
"""The number under which a promotion holds a shard in `shardlib.job`; jobs that move rows begin at 1."""
_POLL_FIRST_S: Final = 0.002
_POLL_MAX_S: Final = 0.1
_RELOAD_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Demoted:
    """An old primary that is to become a replica.

    Attributes:
        shard: name of the shard.
        old: the server to stop, to bring into line with the new primary, and to start as its replica. It is fenced:
            its gates are closed, and sessions begin read-only.
        new: the new primary.
    """

    shard: str
    old: Dsn
    new: Dsn


Rejoin = Callable[[Demoted], Awaitable[None]]
"""Makes an old primary a replica; returns when it runs as one. A manager that died may have called it before."""


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float) -> bool:
    """Whether the condition came true in time. Looks often at first, then every 100 ms."""
    pause_s = _POLL_FIRST_S
    try:
        async with asyncio.timeout(max(timeout_s, _POLL_FIRST_S)):
            while not await condition():
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, _POLL_MAX_S)
            return True
    except TimeoutError:
        return False


class Node:
    """Connections to one server, opened when first used and again after they broke.

    They are found by their name, `shardlib job 0 <token> promote`, and may write where others may not.

    Args:
        dsn: the server.
        shard: the shard's name.
        runner: who is at work.
    """

    def __init__(self, dsn: Dsn, shard: str, runner: Runner) -> None:
        self.dsn, self._shard, self._runner = dsn, shard, runner
        self._check = claimed(runner).as_string()
        self._conn: AsyncConnection[Any] | None = None
        self._gate_conns: dict[int, psycopg.Connection[Any]] = {}

    async def close(self) -> None:
        """Close the connections; idempotent."""
        kept, self._gate_conns = self._gate_conns, {}
        for blocking in kept.values():
            blocking.close()
        conn, self._conn = self._conn, None
        if conn is not None:
            with suppress(psycopg.Error):
                await conn.close()

    async def conn(self) -> AsyncConnection[Any]:
        """The connection for statements, in autocommit."""
        if self._conn is None or self._conn.closed or self._conn.broken:
            self._conn = await connect(self.dsn, shard=self._shard, application=self._runner.application("promote"))
            await self._conn.execute("SET default_transaction_read_only = off")
        return self._conn

    async def rows(self, query: str, *params: object) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        conn = await self.conn()
        return await (await conn.execute(query.encode(), params or None)).fetchall()

    async def value(self, query: str, *params: object) -> Any:
        """The first column of the first row; None if there is no row."""
        found = await self.rows(query, *params)
        return found[0][0] if found else None

    async def do(self, command: sql.Composed) -> None:
        """Run a command that is no part of a transaction."""
        await (await self.conn()).execute(command)

    async def in_recovery(self) -> bool:
        """Whether it is a replica at this moment."""
        return bool(await self.value("SELECT pg_is_in_recovery()"))

    async def set(self, name: str, value: str | None, *, shows: str) -> None:
        """`ALTER SYSTEM SET`, or `RESET` for None; and wait until each session that begins anything anew sees it.

        The server's first process reads its files anew, then tells its children, then takes the next connection: a
        connection that shows the value proves that every session was told.

        Args:
            name: the setting.
            value: for `ALTER SYSTEM`.
            shows: what `SHOW` answers then.

        Raises:
            TimeoutError: the server does not take it up.
        """
        setting = sql.Identifier(name)
        if value is None:
            await self.do(sql.SQL("ALTER SYSTEM RESET {}").format(setting))
        else:
            await self.do(sql.SQL("ALTER SYSTEM SET {} = {}").format(setting, sql.Literal(value)))
        await self.value("SELECT pg_reload_conf()")
        if not await until(lambda: self._shows(name, shows), _RELOAD_S):
            raise TimeoutError(f"{self.dsn} does not take {name} up within {_RELOAD_S:g} s")

    async def setting(self, name: str) -> tuple[str, bool]:
        """The value of a setting, and whether `ALTER SYSTEM` has set it, as far as that can be told."""
        rows = await self.rows(
            "SELECT reset_val, CASE WHEN source = 'default' THEN false"
            " ELSE coalesce(sourcefile LIKE '%%/postgresql.auto.conf', true) END FROM pg_settings WHERE name = %s",
            name,
        )
        return str(rows[0][0]), bool(rows[0][1])

    async def _shows(self, name: str, wanted: str) -> bool:
        conn = await connect(self.dsn, shard=self._shard, application=self._runner.application("look"))
        async with conn:
            row = await (await conn.execute("SELECT current_setting(%s)", (name,))).fetchone()
        return row is not None and row[0] == wanted

    async def replayed(self, lsn: str, timeout_s: float) -> bool:
        """Whether it has replayed a position in time."""

        async def there() -> bool:
            return bool(await self.value("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", lsn))

        return await until(there, timeout_s)

    async def marked(self) -> str:
        """Write a message into the WAL, and with it all that came before: the position after it, flushed.

        The wait for a synchronous replica is left out: whoever promotes one waits until it has replayed this.
        """
        conn = await self.conn()
        async with conn.transaction():
            await conn.execute("SET LOCAL synchronous_commit = 'local'")
            await conn.execute(claimed(self._runner))
            await conn.execute("SELECT pg_logical_emit_message(true, 'shardlib', 'promote')")
        return str(await self.value("SELECT pg_current_wal_flush_lsn()::text"))

    async def promote(self) -> bool:
        """Ask it to end its recovery, unless another manager has taken the promotion over as far as it has replayed."""
        asked = await self.value(
            "SELECT pg_promote(false) FROM shardlib.job WHERE id = %s AND token = %s", JOB, self._runner.token
        )
        return bool(asked)

    async def streams_from(self, host: str, port: str) -> bool:
        """Whether it streams from the server that its `primary_conninfo` calls so."""
        row = await self.rows("SELECT status, sender_host, sender_port::text FROM pg_stat_wal_receiver")
        return bool(row) and row[0] == ("streaming", host, port)

    # Gates: the functions of `fence.gate` block, so each runs in a thread.

    async def ready(self, gates: int = 1) -> None:
        """Connect now, with a connection for each of so many gates: there is no time for it when they are closed."""
        await self.conn()
        await _in_threads([partial(self._gate_conn, place) for place in range(gates)])

    def _gate_conn(self, place: int) -> psycopg.Connection[Any]:
        conn = self._gate_conns.get(place)
        if conn is None or conn.closed or conn.broken:
            conn = connect_blocking(self.dsn, shard=self._shard, application=self._runner.application("gates"))
            self._gate_conns[place] = conn
            conn.execute("SET default_transaction_read_only = off")
        return conn

    async def gates(self) -> tuple[int, ...]:
        """The gates that are open here."""
        (found,) = await _in_threads([lambda: list_gates(self._gate_conn(0))])
        return found

    async def open_gates(self, numbers: Sequence[int]) -> None:
        """Open these; idempotent."""

        def opening() -> None:
            for number in numbers:
                open_gate(self._gate_conn(0), number, check=self._check)

        await _in_threads([opening])

    async def close_gates(self, numbers: Sequence[int], *, budget_s: float) -> list[Closing]:
        """Close these side by side."""

        def closing(place: int, number: int) -> Closing:
            return close_gate(self._gate_conn(place), number, budget_s=budget_s, check=self._check)

        return await _in_threads([partial(closing, place, number) for place, number in enumerate(numbers)])


async def _in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Their results. All have ended when this returns or raises, also when it is cancelled: none works on unseen."""
    running = asyncio.gather(*(asyncio.to_thread(call) for call in calls), return_exceptions=True)
    try:
        found = await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


async def arrives(primary: Node, replica: Node, timeout_s: float) -> bool:
    """Whether what a primary writes now is replayed by a replica in time: the proof that it follows this very server.

    A transaction of its own, since a message outside of one may lie unflushed; nobody is waited for.
    """
    conn = await primary.conn()
    async with conn.transaction():
        await conn.execute("SET LOCAL synchronous_commit = 'local'")
        await conn.execute("SELECT pg_logical_emit_message(true, 'shardlib', 'arrives')")
    lsn = str(await primary.value("SELECT pg_current_wal_flush_lsn()::text"))
    return await replica.replayed(lsn, timeout_s)
