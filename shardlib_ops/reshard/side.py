"""One shard of a job, at its primary: the real `Side`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import psycopg
from psycopg import AsyncConnection, sql
from psycopg import errors as pg

from shardlib.dsn import scrub
from shardlib.errors import RetryableError, ShardlibError
from shardlib.fence.gate import OPEN_GATES, Closing, close_gate, install, list_gates, open_gate
from shardlib.ring import TokenRange
from shardlib.topology import Shard, Table
from shardlib_ops.reshard.cleanup import retire
from shardlib_ops.reshard.connect import Runner, connect, connect_blocking, is_lost, is_passing, is_superseded
from shardlib_ops.reshard.control import claim, claimed, create_keys, keys_table, publication, slot
from shardlib_ops.reshard.guard import (
    ForeignWriter,
    activate_guard,
    deactivate_guard,
    foreign_writers,
    install_guard,
    lasting,
)
from shardlib_ops.reshard.job import Job
from shardlib_ops.reshard.rows import TableShape, read_shapes
from shardlib_ops.reshard.stream import SchemaChanged, SlotBlocked, SlotLost, create_publication
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.world import Blocked, Failure, Lost, Superseded

__all__ = ["ShardSide", "translated"]

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")

_log = logging.getLogger("shardlib.reshard")
_REPLAY_POLL_S: Final = 0.005
_NAMED_S: Final = 1.0
_NAMED_AGAIN_S: Final = 5.0


def translated(
    call: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """A verb whose errors are those of `world`: `Failure` is left for what will not pass by itself."""

    @wraps(call)
    async def run(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(self, *args, **kwargs)
        except (Blocked, Failure, Lost, Superseded, TimeoutError):
            raise
        except (psycopg.Error, ShardlibError, OSError) as error:
            if is_superseded(error):
                raise Superseded(str(error).partition("\n")[0]) from error
            if isinstance(error, SlotBlocked) or is_passing(error):
                raise Blocked(scrub(str(error).strip())) from error
            if (altered := _altered(error)) is not None:
                # Waited for: it can be undone, and the operator may cancel; what is copied is not thrown away for it.
                raise Blocked(altered) from error
            # A lost slot is found by the next look at the job, which makes the copy anew.
            if is_lost(error) or isinstance(error, RetryableError | SlotLost | OSError):
                raise Lost(scrub(str(error).strip())) from error
            raise Failure(scrub(str(error).strip())) from error

    return run  # type: ignore[return-value]  # `wraps` gives the first parameter a name


def _altered(error: BaseException) -> str | None:
    """What was altered, if that is why a statement failed; None if it is not."""
    if isinstance(error, SchemaChanged):
        return str(error)
    said = str(error).partition("\n")[0]
    altered = isinstance(error, pg.UndefinedColumn | pg.UndefinedTable | pg.DatatypeMismatch | pg.NotNullViolation)
    if not altered or "shardlib." in said:
        return None
    return f"a table was altered while its rows move ({said}): undo that and the job goes on by itself, or cancel it"


class ShardSide:
    """Connections to one shard's primary, opened when first used and again after they broke.

    Args:
        job: what moves.
        runner: who is at work.
        shard: which shard.
        tables: the cluster's sharded tables.
        hash_function: the cluster's.
        cluster_id: the cluster's.
        waits: see `World.waits`.
        places: who has the rows when this shard does not: names of shards, with their ranges.
    """

    def __init__(
        self,
        job: Job,
        runner: Runner,
        shard: Shard,
        tables: Sequence[Table],
        *,
        hash_function: str,
        cluster_id: str,
        waits: Callable[[str | None], Awaitable[None]],
        places: Sequence[tuple[str, Sequence[TokenRange]]] = (),
    ) -> None:
        self.job, self.runner, self.shard = job, runner, shard
        self.tables, self.hash_function, self.cluster_id = tuple(tables), hash_function, cluster_id
        self.ranges = tuple(part for leg in job.legs if shard.id in (leg.source, leg.target) for part in leg.ranges)
        self._conn: AsyncConnection[Any] | None = None
        self._gate_conn: psycopg.Connection[Any] | None = None
        self._server: str | None = None  # that this round has begun with
        self._shapes: tuple[TableShape, ...] | None = None
        self._before_guard: tuple[ForeignWriter, ...] | None = None
        self._waits, self._places = waits, tuple(places)
        self._turn = asyncio.Lock()
        self._gate_turn = asyncio.Lock()

    @asynccontextmanager
    async def using(self) -> AsyncIterator[AsyncConnection[Any]]:
        """The connection for short statements, for one user at a time."""
        async with self._turn:
            if self._conn is None or self._conn.closed or self._conn.broken:
                conn = await self.open("control")
                if self._server is not None and (now := await self._identity_of(conn)) != self._server:
                    await conn.close()
                    raise Lost(f"shard {self.shard.name!r} was failed over: {now} answers, not {self._server}")
                self._conn = conn
            yield self._conn

    async def open(self, what: str) -> AsyncConnection[Any]:
        """A connection more; the caller closes it."""
        return await connect(self.shard.primary, shard=self.shard.name, application=self.runner.application(what))

    async def close(self) -> None:
        """Close the connections; idempotent."""
        if self._conn is not None:
            with suppress(psycopg.Error):
                await self._conn.close()
        if self._gate_conn is not None:
            self._gate_conn.close()
        self._conn = self._gate_conn = self._server = None

    @asynccontextmanager
    async def naming(self, what: str, who: Callable[[AsyncConnection[Any]], Awaitable[str]]) -> AsyncIterator[None]:
        """While the body waits for others, tell for whom, from the first second on.

        Args:
            what: what waits, such as `making the guard`.
            who: asks the shard, on a connection of its own; empty if there is nobody.
        """
        said: list[str] = []
        watching = asyncio.create_task(self._name(what, who, said))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])
            if not watching.cancelled() and (error := watching.exception()) is not None:
                # Only the telling is lost: what waits says itself whether it has failed.
                _log.warning("job %d: whom it waits for cannot be told: %s", self.job.id, scrub(str(error)))
        if said:
            await self._waits(None)

    async def _name(self, what: str, who: Callable[[AsyncConnection[Any]], Awaitable[str]], said: list[str]) -> None:
        await asyncio.sleep(_NAMED_S)
        conn = await self.open("observe")
        async with conn:
            while True:
                if names := await who(conn):
                    said.append(names)
                    await self._waits(f"shard {self.shard.name!r}: {what} waits for {names}")
                await asyncio.sleep(_NAMED_AGAIN_S)

    async def shapes(self) -> tuple[TableShape, ...]:
        """The sharded tables as they are here, read once after each claim."""
        if self._shapes is None:
            async with self.using() as conn:
                self._shapes = await read_shapes(conn, self.tables)
        return self._shapes

    def forget_shapes(self) -> None:
        """The tables were changed by the job itself."""
        self._shapes = None

    async def _gates(self, call: Callable[[psycopg.Connection[Any]], T]) -> T:
        """Run a function of `fence.gate` in a thread. It ends before this does, also when this is cancelled."""
        async with self._gate_turn:
            done = asyncio.ensure_future(asyncio.to_thread(self._with_gate_conn, call))
            try:
                return await asyncio.shield(done)
            except asyncio.CancelledError:
                await asyncio.wait([done])
                done.exception()  # looked at; the cancellation is what counts
                raise

    def _with_gate_conn(self, call: Callable[[psycopg.Connection[Any]], T]) -> T:
        conn = self._gate_conn
        if conn is None or conn.closed or conn.broken:
            conn = self._gate_conn = connect_blocking(
                self.shard.primary, shard=self.shard.name, application=self.runner.application("gates")
            )
        return call(conn)

    @property
    def _check(self) -> str:
        return claimed(self.runner).as_string()

    @translated
    async def identity(self) -> str:
        """See `Side.identity`."""
        async with self.using() as conn:
            self._server = await self._identity_of(conn)
        return self._server

    async def _identity_of(self, conn: AsyncConnection[Any]) -> str:
        # A promotion begins a new timeline, a restart does not; replicas of one primary begin timelines of one number.
        found = await conn.execute(
            "SELECT system_identifier::text, left(pg_walfile_name(pg_current_wal_lsn()), 8) FROM pg_control_system()"
        )
        row = await found.fetchone()
        if row is None:
            raise Lost(f"shard {self.shard.name!r} does not say which server it is")
        primary = self.shard.primary
        return f"{primary.host}:{primary.port} {row[0]}/{row[1]}"

    @translated
    async def claim(self) -> None:
        """See `Side.claim`."""
        self._shapes = None
        await asyncio.to_thread(self._install)
        async with self.using() as conn:
            await claim(conn, self.runner)

    def _install(self) -> None:
        """A shard made by an earlier release gets what this one needs."""
        with connect_blocking(
            self.shard.primary, shard=self.shard.name, application=self.runner.application("install")
        ) as conn:
            install(conn, cluster_id=self.cluster_id, shard_id=self.shard.id)

    @translated
    async def prepare(self) -> None:
        """See `Side.prepare`."""
        shapes = await self.shapes()

        async def writers(conn: AsyncConnection[Any]) -> str:
            found = await foreign_writers(conn, shapes, gated=True)
            return "; ".join(str(writer) for writer in found if writer.age_s >= _NAMED_S)

        async with self.using() as conn, self.naming("making the guard", writers):
            await create_keys(conn, self.runner)
            await create_publication(conn, self.runner, self.tables)
            await install_guard(conn, self.runner, shapes)

    @translated
    async def retire(self) -> None:
        """See `Side.retire`."""
        job, here = self.job, self.shard.id
        names = [slot(job.id, leg.number, "forward") for leg in job.legs if leg.source == here]
        names += [slot(job.id, leg.number, "reverse") for leg in job.legs if leg.target == here]
        async with self.using() as conn:
            await retire(conn, self.runner, slots=names, publication=publication(self.job.id))

    @translated
    async def gates(self) -> tuple[int, ...]:
        """See `Side.gates`."""
        return await self._gates(list_gates)

    @translated
    async def open_gate(self, number: int) -> None:
        """See `Side.open_gate`."""
        await self._gates(lambda conn: open_gate(conn, number, check=self._check))

    @translated
    async def close_gate(self, number: int, *, budget_s: float) -> Closing:
        """See `Side.close_gate`."""
        return await self._gates(lambda conn: close_gate(conn, number, budget_s=budget_s, check=self._check))

    @translated
    async def replayed(self, lsn: str, *, timeout_s: float) -> None:
        """See `Side.replayed`."""
        await together(
            self._replayed(number, lsn, timeout_s, "the closing of the gates")
            for number in range(len(self.shard.replicas))
        )

    async def _replayed(self, number: int, lsn: str, timeout_s: float, done: str, *, follows: bool = False) -> None:
        replica = self.shard.replicas[number]
        what = f"replica {replica} of shard {self.shard.name!r}"
        behind = f"{what} has not replayed {done}"
        try:
            async with asyncio.timeout(timeout_s):
                conn = await connect(replica, shard=self.shard.name, application=self.runner.application("replica"))
                async with conn:
                    while True:
                        found = await conn.execute(
                            "SELECT pg_is_in_recovery(), pg_last_wal_replay_lsn() >= %s::pg_lsn", (lsn,)
                        )
                        standby, replayed = await found.fetchone() or (True, None)
                        if not standby and follows:
                            raise Blocked(
                                f"{what} was promoted: it is no standby; make it a replica again, or take it out of"
                                " the topology"
                            )
                        if not standby:
                            return await self._closed_at(conn, what)
                        if replayed:
                            return None
                        await asyncio.sleep(_REPLAY_POLL_S)
        except TimeoutError:
            raise Blocked(f"{behind} within {timeout_s:.2f} s") from None
        except (psycopg.Error, ShardlibError) as error:
            raise Blocked(f"{behind}: {scrub(str(error).strip())}") from None

    async def _closed_at(self, conn: AsyncConnection[Any], what: str) -> None:
        """A replica that replays no more, since somebody has promoted it, lets nobody in whom the primary keeps out.

        Raises:
            Blocked: it does.
        """
        there = {number for (number,) in await (await conn.execute(OPEN_GATES.encode())).fetchall()}
        if more := sorted(there - set(await self.gates())):
            raise Blocked(
                f"{what} was promoted: it is no standby, and its gates {', '.join(map(str, more))} are open; make it a "
                "replica again, or take it out of the topology"
            )

    @translated
    async def replicated(self, *, timeout_s: float) -> None:
        """See `Side.replicated`."""
        if not self.shard.replicas:
            return
        async with self.using() as conn:
            # A commit of its own: what else is in the WAL need not be on any disk yet, and would be waited for in vain.
            async with conn.transaction():
                await conn.execute("SET LOCAL synchronous_commit = 'local'")  # who is waited for is named below
                await conn.execute(claimed(self.runner))
                await conn.execute("SELECT pg_logical_emit_message(true, 'shardlib', 'replicated')")
            row = await (await conn.execute("SELECT pg_current_wal_flush_lsn()::text")).fetchone()
        if row is None:
            raise Lost(f"shard {self.shard.name!r} gave no position")
        await together(
            self._replayed(number, str(row[0]), timeout_s, "what the job has done there", follows=True)
            for number in range(len(self.shard.replicas))
        )

    @translated
    async def guard(self, *, active: bool) -> None:
        """See `Side.guard`."""
        shapes = await self.shapes()
        self._before_guard = None
        async with self.using() as conn:
            if active:
                await activate_guard(
                    conn,
                    self.runner,
                    shapes,
                    hash_function=self.hash_function,
                    ranges=self.ranges,
                    places=self._places,
                )
            else:
                await deactivate_guard(conn, self.runner, shapes)

    @translated
    async def foreign_writers(self) -> tuple[str, ...]:
        """See `Side.foreign_writers`."""
        shapes = await self.shapes()
        async with self.using() as conn:
            found = await foreign_writers(conn, shapes, gated=True)
        if self._before_guard is None:
            self._before_guard = found
        # Who began later has met the guard.
        return tuple(map(str, lasting(self._before_guard, found)))

    @translated
    async def old_writers(self, *, older_s: float) -> tuple[str, ...]:
        """See `Side.old_writers`."""
        shapes = await self.shapes()
        async with self.using() as conn:
            found = await foreign_writers(conn, shapes, gated=True)
        return tuple(str(writer) for writer in found if writer.age_s >= older_s)

    @translated
    async def barrier(self, message: str) -> None:
        """See `Side.barrier`."""
        async with self.using() as conn, conn.transaction():
            await conn.execute(claimed(self.runner))
            await conn.execute("SELECT pg_logical_emit_message(true, 'shardlib', %s)", (message,))

    @translated
    async def wal_position(self) -> str:
        """See `Side.wal_position`."""
        async with self.using() as conn:
            row = await (await conn.execute("SELECT pg_current_wal_insert_lsn()::text")).fetchone()
        if row is None:
            raise Lost(f"shard {self.shard.name!r} gave no position")
        return str(row[0])

    async def add_keys(self, keys: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        """Let the key table of this side know keys that appeared on the other; idempotent.

        Raises:
            psycopg.Error: as it is, for the stream that hands them over.
        """
        async with self.using() as conn, conn.transaction():
            await conn.execute(claimed(self.runner))
            await conn.cursor().executemany(
                sql.SQL("INSERT INTO {} (k, more) VALUES (%s, %s) ON CONFLICT DO NOTHING").format(
                    keys_table(self.job.id)
                ),
                [(first, list(rest)) for first, rest in keys],
            )
