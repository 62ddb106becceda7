"""What one shard's primary tells of itself, a small function for each check."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from psycopg import AsyncConnection

from shardlib.fence.gate import OPEN_GATES
from shardlib.fence.sql import SCHEMA_VERSION
from shardlib.topology import Shard
from shardlib_ops.doctor.finding import Finding, Severity
from shardlib_ops.doctor.misplaced import misplaced
from shardlib_ops.doctor.view import View
from shardlib_ops.health.vitals import AGES, PLACE, SLOTS, disk_usage
from shardlib_ops.reshard.check.facts import read_server
from shardlib_ops.reshard.check.server import Needs, server_faults, version_fault

__all__ = ["SHARD_CHECKS", "Check", "identity"]

Conn = AsyncConnection[Any]

_SWITCH_S: Final = 3.0


class Check(NamedTuple):
    """A question to a shard's primary, by a name that findings carry."""

    name: str
    ask: Callable[[Conn, Shard, View], Awaitable[list[Finding]]]


async def identity(conn: Conn, shard: Shard, view: View) -> list[Finding]:
    """Whether this is the primary of this shard at all; if not, no other check makes sense."""

    def wrong(what: str, todo: str) -> list[Finding]:
        return [Finding(Severity.ERROR, "identity", f"shard {shard.name!r}", what, todo)]

    if (fault := version_fault(shard.name, conn.info.server_version)) is not None:
        return wrong(fault.problem, fault.way_out)
    row = await (
        await conn.execute("SELECT pg_is_in_recovery(), to_regclass('shardlib.control') IS NOT NULL")
    ).fetchone()
    if row is None or row[0]:
        todo = "`shard promote`, or correct the DSN of its primary in the catalog"
        return wrong(f"its primary {shard.primary} is a standby, which takes no writes", todo)
    control = await (await conn.execute(_CONTROL)).fetchone() if row[1] else None
    if control is None:
        todo = "correct the DSN in the catalog; if it is right, engine.create_all(metadata) installs the schema"
        return wrong("its database has no schema shardlib with a control row", todo)
    version, cluster_id, shard_id = control
    if (cluster_id, shard_id) != (view.topology.cluster_id, shard.id):
        return wrong(
            f"its database says that it is shard {shard_id!r} of cluster {cluster_id!r}, not {shard.id!r} of "
            f"{view.topology.cluster_id!r}",
            "the DSN in the catalog leads to the wrong database: correct it before anything is written there",
        )
    if version != SCHEMA_VERSION:
        finding = Finding(
            Severity.WARNING,
            "identity",
            f"shard {shard.name!r}",
            f"its schema shardlib has version {version}, and this release {SCHEMA_VERSION}",
            "upgrade this program" if version > SCHEMA_VERSION else "engine.create_all(metadata) brings it up to date",
        )
        return [finding]
    return []


async def gates(conn: Conn, shard: Shard, view: View) -> list[Finding]:
    """Whether exactly those gates are open that the topology names."""
    named, where, found = set(view.topology.gates_of(shard.id)), f"shard {shard.name!r}", list[Finding]()
    there = await _open_gates(conn)
    if named - there and view.busy(shard.id):
        await asyncio.sleep(_SWITCH_S)  # closed for a moment, by whoever switches
        there = await _open_gates(conn)
    if missing := sorted(named - there):
        found.append(
            Finding(
                Severity.ERROR,
                "gates",
                where,
                f"the gates {_list(missing)} are closed, though the topology names them: statements there are refused",
                "if a job or a promotion is at it, wait; else engine.create_all(metadata) opens them",
            )
        )
    spare = sorted(there - named)
    old = [number for number in spare if number < view.topology.next_gate]
    unknown = [number for number in spare if number >= view.topology.next_gate]
    if old and not view.busy(shard.id):
        found.append(
            Finding(
                Severity.ERROR,
                "gates",
                where,
                f"the gates {_list(old)} are open, and the topology names them no more: who has an old map gets in",
                f"look who holds them, then DROP TABLE {', '.join(f'shardlib.gate_{one}' for one in old)}",
            )
        )
    if unknown:
        found.append(
            Finding(
                Severity.ERROR,
                "gates",
                where,
                f"the gates {_list(unknown)} are open, and have numbers that were never given out: the catalog may be "
                "an older one than the shards have seen",
                "stop all changes; if the catalog was restored from a backup, publish a topology with a higher version "
                "and higher numbers",
            )
        )
    return found


async def _open_gates(conn: Conn) -> set[int]:
    return {int(number) for (number,) in await (await conn.execute(OPEN_GATES.encode())).fetchall()}


async def leftovers(conn: Conn, shard: Shard, view: View) -> list[Finding]:
    """What jobs that are over have left behind."""
    here = {job.id for job in view.jobs_of(shard.id)}
    left: dict[int, list[str]] = {}
    for job, kind, name in await (await conn.execute(_LEFTOVERS)).fetchall():
        if job not in here:
            left.setdefault(int(job), []).append(f"{kind} {name}")
    known = {job.id for job in view.jobs}
    return [
        Finding(
            Severity.ERROR if any(thing.startswith(("slot", "function")) for thing in things) else Severity.WARNING,
            "leftovers",
            f"shard {shard.name!r}",
            f"job {job} {'is over' if job in known else 'is not in the catalog'}, and has left {', '.join(things)}",
            "take it away: a slot keeps WAL for ever, and a function may hang on each write (pg_drop_replication_slot, "
            "DROP PUBLICATION, DROP FUNCTION ... CASCADE, DROP TABLE, pg_replication_origin_drop)",
        )
        for job, things in sorted(left.items())
    ]


async def settings(conn: Conn, shard: Shard, view: View) -> list[Finding]:
    """Whether the server and the role can do what the cluster asks of them."""
    del view
    server = replace(await read_server(conn), prepared=[])
    return [
        Finding(Severity.WARNING, "settings", f"shard {shard.name!r}", fault.problem, fault.way_out)
        for fault in server_faults(shard.name, server, Needs(slots=1))
        if not fault.note
    ]


async def in_doubt(conn: Conn, shard: Shard, view: View) -> list[Finding]:
    """Prepared transactions that nobody ends."""
    found = []
    for gid, owner, age_s in await (await conn.execute(_PREPARED, (view.limits.in_doubt_s,))).fetchall():
        who = "it is not shardlib's"
        todo = "let whoever coordinates it decide, or COMMIT PREPARED or ROLLBACK PREPARED it"
        if (parts := re.fullmatch(r"shardlib:[^:]*:([^:]*):[^:]*", gid)) is not None:
            decider = next((one for one in view.topology.shards if one.id == parts[1]), None)
            who = f"shard {decider.name!r} decides it" if decider else f"its decider {parts[1]!r} is no shard any more"
            todo = "`engine.settle()` asks the decider and ends it" if decider else f"{todo}: on all its shards alike"
        what = f"prepared transaction {gid!r} of {owner} is in doubt for {age_s:.0f} s and holds its locks; {who}"
        found.append(Finding(Severity.ERROR, "in doubt", f"shard {shard.name!r}", what, todo))
    return found


async def transactions(conn: Conn, shard: Shard, view: View) -> list[Finding]:
    """Transactions that stay open, and the age of the oldest transaction id."""
    found, where = [], f"shard {shard.name!r}"
    for pid, user, name, state, age_s in await (
        await conn.execute(_OLD_TRANSACTIONS, (view.limits.transaction_s,))
    ).fetchall():
        what = f"a transaction of {user} ({name or 'no application name'}, {state}) is open for {age_s / 60:.0f} min"
        todo = f"it keeps vacuum, moves and migrations waiting: SELECT pg_terminate_backend({pid})"
        found.append(Finding(Severity.WARNING, "transactions", where, what, todo))
    row = await (await conn.execute(AGES)).fetchone()
    if row is not None and max(row) > view.limits.transaction_ids:
        what = f"its oldest transaction id is {max(row):,} transactions old, of {2**31:,} that there are"
        todo = "see why autovacuum does not freeze: long transactions, slots, prepared transactions; VACUUM (FREEZE)"
        found.append(Finding(Severity.ERROR, "transaction ids", where, what, todo))
    return found


async def slots(conn: Conn, shard: Shard, view: View) -> list[Finding]:
    """Slots that keep WAL which nobody reads."""
    ours = tuple(f"shardlib_job_{job.id}_" for job in view.jobs_of(shard.id))
    found = []
    for name, active, status, held in await (await conn.execute(SLOTS)).fetchall():
        if name.startswith("shardlib_job_") and not name.startswith(ours):
            continue  # among what is left over
        where = f"shard {shard.name!r}"
        if status in ("lost", "unreserved"):
            todo = f"who reads it must begin anew: SELECT pg_drop_replication_slot('{name}')"
            found.append(Finding(Severity.ERROR, "slots", where, f"the slot {name!r} is {status}", todo))
        elif held > view.limits.slot_bytes and not active:
            what = f"the slot {name!r}, which nobody reads, keeps {held / 2**20:,.0f} MiB of WAL"
            todo = f"start who reads it, or SELECT pg_drop_replication_slot('{name}'), before the disk is full"
            found.append(Finding(Severity.ERROR, "slots", where, what, todo))
    return found


async def disk(conn: Conn, shard: Shard, view: View) -> list[Finding]:
    """Room on the disk, if the server runs on this machine and says where."""
    row = await (await conn.execute(PLACE)).fetchone()
    if row is None or row[0] is None:
        return []
    usage = disk_usage(Path(row[0]), int(row[1]))
    if usage is None or usage.free >= usage.total * view.limits.disk_free:
        return []
    what = f"{usage.free / 2**30:.1f} GiB of {usage.total / 2**30:.1f} GiB are free on the disk of {row[0]}"
    return [Finding(Severity.ERROR, "disk", f"shard {shard.name!r}", what, "make room, or move ranges to other shards")]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


SHARD_CHECKS: Final = (
    Check("gates", gates),
    Check("leftovers", leftovers),
    Check("settings", settings),
    Check("in doubt", in_doubt),
    Check("transactions", transactions),
    Check("slots", slots),
    Check("disk", disk),
    Check("misplaced", misplaced),
)
"""Asked of each shard, one after the other; shards side by side."""

_CONTROL: Final = "SELECT schema_version, cluster_id, shard_id FROM shardlib.control"
_LEFTOVERS: Final = r"""
    SELECT substring(name FROM '[0-9]+')::bigint, kind, name FROM (
        SELECT 'table', c.relname::text FROM pg_class c
         WHERE c.relnamespace = 'shardlib'::regnamespace AND c.relkind = 'r' AND c.relname ~ '^job_[0-9]+_'
        UNION ALL
        SELECT 'function', p.proname::text FROM pg_proc p
         WHERE p.pronamespace = 'shardlib'::regnamespace AND p.proname ~ '^job_[0-9]+_'
        UNION ALL
        SELECT 'slot', slot_name::text FROM pg_replication_slots
         WHERE database = current_database() AND slot_name ~ '^shardlib_job_[0-9]+_'
        UNION ALL
        SELECT 'publication', pubname::text FROM pg_publication WHERE pubname ~ '^shardlib_job_[0-9]+'
        UNION ALL
        SELECT 'origin', roname FROM pg_replication_origin WHERE roname ~ '^shardlib_job_[0-9]+'
    ) AS made(kind, name) ORDER BY 1, 2, 3
"""
_PREPARED: Final = """
    SELECT gid, owner::text, extract(epoch FROM now() - prepared)::float8 FROM pg_prepared_xacts
     WHERE database = current_database() AND prepared <= now() - make_interval(secs => %s) ORDER BY prepared
"""
_OLD_TRANSACTIONS: Final = """
    SELECT pid, coalesce(usename, '')::text, application_name, coalesce(state, ''),
           extract(epoch FROM now() - xact_start)::float8
      FROM pg_stat_activity
     WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
       AND application_name !~ '^shardlib job [0-9]+ '  -- a copy takes as long as it takes
       AND xact_start <= now() - make_interval(secs => %s) ORDER BY xact_start LIMIT 5
"""
