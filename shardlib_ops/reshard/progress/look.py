"""Looks at a job's servers from beside its work: how much there is to copy, and who stands in the way of a switch.

On connections of its own, which take no lock and write nothing, and within a time limit: the job does not wait for it,
and what cannot be seen now is not known.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection

from shardlib.dsn import Dsn, scrub
from shardlib.errors import ShardlibError
from shardlib.fence.gate import Holder, holders
from shardlib.ring import TokenRange
from shardlib.topology import Shard, Table, Topology
from shardlib.topology.model import MoveState
from shardlib.topology.moving import moves_of, moving_gates
from shardlib_ops.reshard.connect import connect, connect_blocking
from shardlib_ops.reshard.guard import ForeignWriter, foreign_writers
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.progress.model import Waiting
from shardlib_ops.reshard.progress.tracker import Tracker
from shardlib_ops.reshard.rows import TableShape, read_shapes
from shardlib_ops.reshard.units import size

__all__ = ["Observer"]

_log: Final = logging.getLogger("shardlib.reshard.progress")

_ANSWER_S: Final = 3
_IN_THE_WAY_S: Final = 1.0
"""Who holds something for less will be gone when a switch is tried."""
_NAMED_MAX: Final = 10


class Observer:
    """Tells a tracker what the job's servers tell. Owns its connections; `close` ends them.

    Args:
        job: its record.
        topology: gives the latest topology that the runner has seen.
        tracker: is told.
    """

    def __init__(self, job: Job, topology: Callable[[], Topology], tracker: Tracker) -> None:
        self._job, self._topology, self._tracker = job, topology, tracker
        # Not the name of a runner's connections, which are ended when the job is taken over.
        self._application = f"shardlib progress of job {job.id}"
        self._conns: dict[str, AsyncConnection[Any]] = {}
        self._gate_conns: dict[str, psycopg.Connection[Any]] = {}
        self._estimated: set[int] = set()
        self._read_copied = False
        self._seen: dict[str, int] = {}
        self._shapes: dict[str, tuple[TableShape, ...]] = {}

    async def close(self) -> None:
        """End the connections; idempotent."""
        self._shapes.clear()
        conns, self._conns = list(self._conns.values()), {}
        for conn in conns:
            with suppress(psycopg.Error):
                await conn.close()
        gates, self._gate_conns = list(self._gate_conns.values()), {}
        for blocking in gates:
            blocking.close()

    async def look(self) -> None:
        """Look once, within some seconds. What goes wrong is logged, and looked at again the next time."""
        status = self._tracker.job.status
        if status in (Status.PENDING, Status.PRECOPY):
            for leg in self._job.legs:
                if leg.number not in self._estimated and await self._safely(self._estimate(leg.number)):
                    self._estimated.add(leg.number)
        if status is Status.PRECOPY and not self._read_copied:
            # Once: what this runner copies it tells itself.
            self._read_copied = await self._safely(self._copied())
        if status in (Status.DELTASYNC, Status.CUTOVER) or self._tracker.activity == "switch":
            found: list[Waiting] = []
            topology = self._topology()
            for shard_id in self._serving(topology):
                await self._safely(self._in_the_way(topology, topology.shard_by_id(shard_id), found))
            # A switch waits for the replicas of both sides.
            for shard_id in self._job.shards:
                await self._safely(self._behind(topology.shard_by_id(shard_id), found))
            self._tracker.waiting = tuple(found[:_NAMED_MAX])
        else:
            self._tracker.waiting = ()

    async def _safely(self, work: Awaitable[None]) -> bool:
        try:
            async with asyncio.timeout(2 * _ANSWER_S):
                await work
        except (psycopg.Error, ShardlibError, OSError, TimeoutError) as error:
            _log.debug("job %d: its servers cannot be looked at now: %s", self._job.id, scrub(str(error).strip()))
            await self.close()
            return False
        return True

    def _serving(self, topology: Topology) -> tuple[str, ...]:
        moves = moves_of(topology, self._job.id)
        switched = bool(moves) and moves[0].state is MoveState.SWITCHED
        return self._job.targets if switched else self._job.sources

    async def _conn(self, key: str, shard: Shard, dsn: Dsn) -> AsyncConnection[Any]:
        conn = self._conns.get(key)
        if conn is None or conn.closed or conn.broken:
            conn = await connect(dsn, shard=shard.name, application=self._application, timeout_s=_ANSWER_S)
            self._conns[key] = conn
            await conn.execute(f"SET statement_timeout = '{_ANSWER_S}s'")
        return conn

    async def _estimate(self, number: int) -> None:
        topology = self._topology()
        leg = next(leg for leg in self._job.legs if leg.number == number)
        owned = _tokens(topology.ring.ranges_of(leg.source))
        share = min(1.0, _tokens(leg.ranges) / owned) if owned else 1.0
        conn = await self._conn(leg.source, shard := topology.shard_by_id(leg.source), shard.primary)
        for table in _sharded(topology):
            found = await conn.execute(_SIZES, (table.schema or "public", table.name))
            row = await found.fetchone()
            if row is not None and row[1] is not None:
                rows, stored = row
                self._tracker.estimated(
                    number, table.fullname, None if rows is None else round(rows * share), round(stored * share)
                )

    async def _copied(self) -> None:
        topology = self._topology()
        for shard_id in self._job.targets:
            conn = await self._conn(shard_id, shard := topology.shard_by_id(shard_id), shard.primary)
            found = await conn.execute(
                "SELECT leg, table_name, rows FROM shardlib.copied WHERE job = %s", (self._job.id,)
            )
            for leg, table, rows in await found.fetchall():
                self._tracker.whole(leg, table, rows)

    async def _in_the_way(self, topology: Topology, shard: Shard, found: list[Waiting]) -> None:
        gates = [gate.number for gate in moving_gates(topology, self._job.id) if gate.shard_id == shard.id]
        held = await asyncio.to_thread(self._holders, shard, gates)
        found += [_holding(shard.name, holder) for holder in held if holder.age_s >= _IN_THE_WAY_S]
        conn = await self._conn(shard.id, shard, shard.primary)
        if shard.id not in self._shapes:
            self._shapes[shard.id] = await read_shapes(conn, _sharded(topology))
        writers = await foreign_writers(conn, self._shapes[shard.id])
        found += [_writing(shard.name, writer) for writer in writers if writer.age_s >= _IN_THE_WAY_S]

    async def _behind(self, shard: Shard, found: list[Waiting]) -> None:
        conn = await self._conn(shard.id, shard, shard.primary)
        row = await (await conn.execute("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint")).fetchone()
        # A replica is behind if it has not replayed what was there at the look before, a second ago or more.
        before, now = self._seen.get(shard.id), None if row is None else int(row[0])
        replicas = [await self._replica(shard, number, before) for number in range(len(shard.replicas))]
        found += [one for one in replicas if one is not None]
        if now is not None:
            self._seen[shard.id] = now

    def _holders(self, shard: Shard, gates: Sequence[int]) -> list[Holder]:
        """In a thread: the fence's own look is a blocking one."""
        if not gates:
            return []
        conn = self._gate_conns.get(shard.id)
        if conn is None or conn.closed or conn.broken:
            conn = self._gate_conns[shard.id] = connect_blocking(
                shard.primary, shard=shard.name, application=self._application, timeout_s=_ANSWER_S
            )
            conn.execute(f"SET statement_timeout = '{_ANSWER_S}s'".encode())
        return [holder for gate in gates for holder in holders(conn, gate)]

    async def _replica(self, shard: Shard, number: int, wanted: int | None) -> Waiting | None:
        dsn = shard.replicas[number]
        try:
            conn = await self._conn(f"{shard.id}/{number}", shard, dsn)
            row = await (await conn.execute(_REPLAYED)).fetchone()
        except (psycopg.Error, ShardlibError) as error:
            said = scrub(str(error).strip()).partition("\n")[0]
            return Waiting(
                kind="replica", shard=shard.name, text=f"replica {dsn} of shard {shard.name!r} does not answer: {said}"
            )
        if row is None or row[0] is None or wanted is None or int(row[0]) >= wanted:
            return None
        behind = wanted - int(row[0])
        text = f"replica {dsn} of shard {shard.name!r} has not replayed {size(behind)} of WAL"
        return Waiting(kind="replica", shard=shard.name, text=text, behind_bytes=behind)


def _tokens(ranges: Iterable[TokenRange]) -> int:
    return sum(last - first + 1 for first, last in ranges)


def _sharded(topology: Topology) -> tuple[Table, ...]:
    return tuple(table for table in topology.tables if not table.reference)


def _holding(shard: str, holder: Holder) -> Waiting:
    who = f"prepared transaction {holder.gid!r}" if holder.gid is not None else f"process {holder.pid}"
    since = _ago(holder.age_s)
    return Waiting(
        kind="transaction" if holder.gid is None else "prepared",
        shard=shard,
        text=(
            f"shard {shard!r}: {who} of {holder.user} ({holder.application or 'no application name'}, {holder.state},"
            f" for {holder.age_s:.1f} s) is in a transaction on moving keys"
        ),
        pid=holder.pid,
        gid=holder.gid,
        user=holder.user,
        application=holder.application,
        state=holder.state,
        since=since,
    )


def _writing(shard: str, writer: ForeignWriter) -> Waiting:
    return Waiting(
        kind="foreign_writer",
        shard=shard,
        text=f"shard {shard!r}: {writer}",
        pid=writer.pid,
        gid=writer.gid,
        user=writer.user,
        application=writer.application,
        state=writer.state,
        since=_ago(writer.age_s),
    )


def _ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


# A table that was never analyzed has a negative `reltuples`, unless it is empty.
_SIZES: Final = """
    SELECT CASE WHEN bool_or(c.reltuples < 0 AND pg_relation_size(c.oid) > 0) THEN NULL
                ELSE sum(greatest(c.reltuples, 0)) END::float8,
           sum(pg_table_size(c.oid))::bigint
      FROM pg_class t
      JOIN LATERAL (SELECT relid FROM pg_partition_tree(t.oid) WHERE isleaf UNION SELECT t.oid::regclass) x ON true
      JOIN pg_class c ON c.oid = x.relid AND c.relkind = 'r'
     WHERE t.relnamespace = to_regnamespace(quote_ident(%s)) AND t.relname = %s
"""

_REPLAYED: Final = """
    SELECT CASE WHEN pg_is_in_recovery() THEN (pg_last_wal_replay_lsn() - '0/0')::bigint END
"""
