"""Asks one server how it is: over a connection of its own, within a deadline of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from shardlib.dsn import Dsn, said_once, scrub
from shardlib.errors import ShardlibError, ShardUnavailable
from shardlib.shard.probe import cut, let_go
from shardlib_ops.failover.sighting import Sender, Sighting
from shardlib_ops.health.vitals import AGES, PLACE, SLOTS, disk_usage
from shardlib_ops.reshard.connect import connect

__all__ = ["DETAILS_S", "Probe", "each_server"]

DETAILS_S: Final = 10.0
"""Seconds between two looks at what changes slowly: slots, ages, the disk."""
_DETAILS_TIMEOUT: Final = "300ms"


def each_server(dsn: Dsn) -> tuple[Dsn, ...]:
    """The servers that a DSN lists, each by a DSN that leads to it alone; the same one if it lists one.

    A password that is encrypted for the list is none for a single server: whoever connects is told so.
    """
    hosts = dsn.host.split(",")
    if len(hosts) == 1:
        return (dsn,)
    params = conninfo_to_dict(dsn.reveal())
    ports = str(params.get("port") or "5432").split(",")
    addresses = str(params.get("hostaddr") or "").split(",")
    for name in ("hostaddr", "target_session_attrs", "load_balance_hosts"):
        params.pop(name, None)
    found = []
    for place, host in enumerate(hosts):
        one: dict[str, Any] = {**params, "host": host, "port": ports[place if len(ports) > 1 else 0] or "5432"}
        if len(addresses) > 1 and addresses[place]:
            one["hostaddr"] = addresses[place]
        found.append(Dsn(make_conninfo("", **one)))
    return tuple(found)


class Probe:
    """One server, asked again and again over a connection that is kept.

    Args:
        dsn: of the server alone, see `each_server`.
        shard: name of its shard, for messages.
        identity: (cluster id, shard id) that its database has to be of, where it says so.
        deadline_s: seconds for one answer, connecting included.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self, dsn: Dsn, shard: str, identity: tuple[str, str], *, deadline_s: float, clock: Callable[[], float]
    ) -> None:
        self.dsn = dsn
        self._shard, self._identity, self._deadline_s, self._clock = shard, identity, deadline_s, clock
        self._conn: AsyncConnection[Any] | None = None
        self._asking: asyncio.Task[Sighting] | None = None
        self._given_up_at: float | None = None
        self._found: Sighting | None = None
        self._details: Mapping[str, float] = {}
        self._detailed_at: float | None = None

    async def close(self) -> None:
        """Close the connection, and end what is under way; idempotent."""
        asking, self._asking = self._asking, None
        if asking is not None and not asking.done():
            asking.add_done_callback(_seen)
            self._cut(asking)
            await asyncio.wait([asking], timeout=self._deadline_s)
        await self._drop()

    async def look(self) -> Sighting:
        """What the server says now, or why it says nothing. Takes `deadline_s` at most, whatever the server does.

        Never raises for anything that a server or a DSN can be.
        """
        at = self._clock()
        if (before := self._asking) is not None and self._given_up_at is not None:
            # Cut off and cancelled, it ends at once, unless something outside of the loop has to end first.
            await asyncio.wait([before], timeout=self._deadline_s)
            if not before.done():
                return Sighting(self.dsn, at, took_s=self._clock() - at, fault="the look before has not ended yet")
        self._given_up_at, self._found = None, None
        self._asking = asking = asyncio.create_task(self._ask(at), name=f"look at {self.dsn.safe()}")
        left = max(0.0, self._deadline_s - (self._clock() - at))
        try:
            await asyncio.wait([asking], timeout=left)
        except asyncio.CancelledError:
            self._give_up()
            raise
        if asking.done():
            self._asking = None
            return asking.result()
        self._give_up()
        # What is late may be the details alone.
        return self._found or Sighting(
            self.dsn, at, took_s=self._clock() - at, fault=f"no answer within {self._deadline_s:g} s"
        )

    def _give_up(self) -> None:
        """End the look that is under way; it may take a moment."""
        self._given_up_at = self._clock()
        if self._asking is not None:
            self._asking.add_done_callback(_seen)
            self._cut(self._asking)

    def _cut(self, asking: asyncio.Task[Sighting]) -> None:
        """Whoever waits for an answer gets an error at once. One that were cancelled would ask the server to cancel
        its query, and wait for that: a server that hangs never answers (psycopg 1371).
        """
        if self._conn is not None and not self._conn.closed:
            cut(self._conn.pgconn)
        else:
            asking.cancel()

    async def _drop(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            self._details, self._detailed_at = {}, None
            # No goodbye to be waited for: `close` of a connection with a query under way sends none.
            await conn.close()

    async def _ask(self, at: float) -> Sighting:
        try:
            found = await self._asked(at)
        except (psycopg.Error, ShardlibError, OSError, UnicodeError) as error:
            await self._drop()
            said = _said(error, self.dsn)
            refused = "Connection refused" in said
            return Sighting(self.dsn, at, took_s=self._clock() - at, fault=said, refused=refused)
        except asyncio.CancelledError as error:
            let_go(error)
            await self._drop()
            raise
        return found

    async def _asked(self, at: float) -> Sighting:
        if self._conn is None or self._conn.closed or self._conn.broken:
            await self._drop()
            self._conn = await connect(
                self.dsn, shard=self._shard, application="shardlib health", timeout_s=math.ceil(self._deadline_s) + 1
            )
            if (wrong := await self._stranger(self._conn)) is not None:
                await self._drop()
                return Sighting(self.dsn, at, took_s=self._clock() - at, fault=wrong)
        sent = self._clock()
        row = await _row(self._conn, _STATE)
        found = replace(_sighting(self.dsn, at, row), took_s=self._clock() - at)
        if found.receiver == _HIDDEN:
            return Sighting(self.dsn, at, took_s=found.took_s, fault=_BLIND)
        timing = {"query_s": self._clock() - sent, "wal_receiver_timeout_s": row["wal_receiver_timeout_s"]}
        self._found = found = replace(found, facts={**self._details, **timing})
        if self._detailed_at is None or self._clock() - self._detailed_at >= DETAILS_S:
            self._details = await self._detailed(self._conn)
            self._detailed_at = self._clock()
            self._found = found = replace(found, facts={**self._details, **timing})
        return found

    async def _stranger(self, conn: AsyncConnection[Any]) -> str | None:
        """Why this is no server of the shard, by what its database says of itself; else None."""
        row = await _row(conn, "SELECT to_regclass('shardlib.control') IS NOT NULL AS there")
        if not row["there"]:
            return None
        row = await _row(conn, "SELECT cluster_id, shard_id FROM shardlib.control LIMIT 1")
        if not row or (row["cluster_id"], row["shard_id"]) == self._identity:
            return None
        return (
            f"its database is of shard {row['shard_id']!r} of cluster {row['cluster_id']!r}, not of "
            f"{self._identity[1]!r} of {self._identity[0]!r}: correct its DSN in the catalog"
        )

    async def _detailed(self, conn: AsyncConnection[Any]) -> dict[str, float]:
        """What changes slowly; what cannot be told is left out, and is no fault of the server."""
        found: dict[str, float] = {}
        try:
            async with conn.transaction():
                await conn.execute(f"SET LOCAL statement_timeout = '{_DETAILS_TIMEOUT}'")
                ages = await (await conn.execute(AGES)).fetchone()
                if ages is not None:
                    found["xid_age"] = float(max(ages))
                slots = await (await conn.execute(SLOTS)).fetchall()
                found["slot_lag_bytes"] = max((float(held) for *_, held in slots), default=0.0)
                place = await (await conn.execute(PLACE)).fetchone()
        except psycopg.Error:
            if conn.closed or conn.broken:
                raise
            return found
        if place is not None and place[0] is not None:
            usage = await asyncio.to_thread(disk_usage, Path(place[0]), int(place[1]))
            if usage is not None:
                found |= {"disk_free_bytes": float(usage.free), "disk_bytes": float(usage.total)}
        return found


def _seen(task: asyncio.Task[Sighting]) -> None:
    """A look that was given up has ended; whatever it came to, nobody waits for it."""
    if not task.cancelled():
        task.exception()


async def _row(conn: AsyncConnection[Any], query: str) -> dict[str, Any]:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query.encode())
        return await cursor.fetchone() or {}


def _said(error: BaseException, dsn: Dsn) -> str:
    text = error.reason if isinstance(error, ShardUnavailable) else str(error)
    return scrub(said_once(text), dsn.reveal()) or type(error).__name__


def _sighting(dsn: Dsn, at: float, row: Mapping[str, Any]) -> Sighting:
    receiver = None
    if row["receiving"]:
        receiver = _HIDDEN if row["sender"] is None else str(row["sender"])
    return Sighting(
        dsn,
        at,
        system=str(row["system"]),
        standby=bool(row["standby"]),
        timeline=_whole(row["timeline"]),
        written=_whole(row["written"]),
        received=_whole(row["received"]),
        replayed=_whole(row["replayed"]),
        receiver=receiver,
        heard=row["heard"],
        name=_standby_name(row["conninfo"], row["cluster_name"]) if row["standby"] else "",
        paused=bool(row["paused"]),
        late=bool(row["late"]),
        synchronous_standby_names=str(row["synchronous"]),
        senders=tuple(
            Sender(str(name or ""), _whole(flushed), state in ("sync", "quorum"))
            for name, flushed, state in row["senders"] or ()
        ),
    )


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _standby_name(conninfo: str | None, cluster_name: str) -> str:
    """By what a standby is known to its primary: `application_name` of its conninfo, or what PostgreSQL takes else."""
    try:
        given = conninfo_to_dict(conninfo or "").get("application_name")
    except psycopg.ProgrammingError:
        given = None
    return str(given or cluster_name or "walreceiver")


_HIDDEN: Final = "?"
_BLIND: Final = "its role may not see from whom it streams: GRANT pg_monitor to it"

# On a replica without a receiver, the control file may lag behind the timeline of what it has received; the names of
# its WAL files do not. A history file says nothing: it may have been fetched for a timeline that was never followed.
_STATE: Final = """
WITH r AS MATERIALIZED (SELECT pg_is_in_recovery() AS standby),
     w AS MATERIALIZED (SELECT * FROM pg_stat_wal_receiver)
SELECT r.standby,
       (SELECT system_identifier::text FROM pg_control_system()) AS system,
       CASE WHEN NOT r.standby THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint
            ELSE greatest((SELECT received_tli FROM w),
                          (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
                          (SELECT timeline_id FROM pg_control_checkpoint()),
                          CASE WHEN NOT EXISTS (SELECT FROM w)
                                AND has_function_privilege('pg_ls_waldir()', 'EXECUTE')
                               THEN (SELECT max(('x' || left(name, 8))::bit(32)::bigint) FROM pg_ls_waldir()
                                      WHERE name ~ '^[0-9A-F]{24}$') END)
       END AS timeline,
       CASE WHEN NOT r.standby THEN pg_current_wal_flush_lsn() - '0/0'::pg_lsn END::numeric AS written,
       CASE WHEN r.standby THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn
       END::numeric AS received,
       CASE WHEN r.standby THEN pg_last_wal_replay_lsn() - '0/0'::pg_lsn END::numeric AS replayed,
       EXISTS (SELECT FROM w) AS receiving,
       (SELECT sender_host || ':' || sender_port FROM w) AS sender,
       (SELECT concat_ws(' ', pid, latest_end_lsn, flushed_lsn, last_msg_receipt_time) FROM w) AS heard,
       (SELECT setting FROM pg_settings WHERE name = 'primary_conninfo') AS conninfo,
       current_setting('cluster_name') AS cluster_name,
       CASE WHEN r.standby THEN pg_is_wal_replay_paused() ELSE false END AS paused,
       (SELECT setting::bigint > 0 FROM pg_settings WHERE name = 'recovery_min_apply_delay') AS late,
       (SELECT setting::float8 / 1000 FROM pg_settings WHERE name = 'wal_receiver_timeout') AS wal_receiver_timeout_s,
       current_setting('synchronous_standby_names') AS synchronous,
       (SELECT json_agg(json_build_array(a.application_name, (a.flush_lsn - '0/0'::pg_lsn)::numeric, a.sync_state))
          FROM pg_stat_replication a LEFT JOIN pg_replication_slots s ON s.active_pid = a.pid
         WHERE a.state IN ('startup', 'catchup', 'streaming') AND s.slot_type IS DISTINCT FROM 'logical') AS senders
  FROM r
"""
