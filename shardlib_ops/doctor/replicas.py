"""What a shard's replicas tell, held against its primary."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection

from shardlib.dsn import Dsn, scrub
from shardlib.errors import ShardlibError
from shardlib.topology import Shard
from shardlib_ops.doctor.finding import Finding, Severity
from shardlib_ops.doctor.view import View
from shardlib_ops.reshard.connect import connect

__all__ = ["replicas"]

_REPLICA_S: Final = 15.0
_PRIMARY: Final = "SELECT (SELECT system_identifier::text FROM pg_control_system()), pg_current_wal_lsn()::text"
_REPLICA: Final = """
    SELECT pg_is_in_recovery(), (SELECT system_identifier::text FROM pg_control_system()),
           pg_wal_lsn_diff(%s::pg_lsn, coalesce(pg_last_wal_replay_lsn(), '0/0'))::float8,
           EXISTS (SELECT FROM pg_stat_wal_receiver)
"""


async def replicas(conn: AsyncConnection[Any], shard: Shard, view: View) -> list[Finding]:
    """Whether each replica that the catalog knows is there, follows this primary, and is not far behind."""
    if not shard.replicas:
        return []
    row = await (await conn.execute(_PRIMARY)).fetchone()
    if row is None:
        return []
    found = await asyncio.gather(*(_one(shard, replica, view, str(row[0]), str(row[1])) for replica in shard.replicas))
    return [finding for finding in found if finding is not None]


async def _one(shard: Shard, replica: Dsn, view: View, system: str, lsn: str) -> Finding | None:
    where = f"replica {replica} of shard {shard.name!r}"

    def finding(severity: Severity, what: str, todo: str) -> Finding:
        return Finding(severity, "replicas", where, what, todo)

    gone = f"start it, or `shard remove-replica {shard.name} {replica.host}:{replica.port}`: changes wait for it"
    try:
        async with (
            asyncio.timeout(_REPLICA_S),
            await connect(replica, shard=shard.name, application="shardlib doctor") as conn,
        ):
            row = await (await conn.execute(_REPLICA, (lsn,))).fetchone()
    except TimeoutError:
        return finding(Severity.ERROR, f"no answer within {_REPLICA_S:g} s", gone)
    except (psycopg.Error, ShardlibError) as error:
        return finding(Severity.ERROR, scrub(" ".join(str(error).split()), replica.reveal()), gone)
    wrong: tuple[Severity, str, str] | None = None
    if row is None or row[1] != system:
        wrong = (Severity.ERROR, "it is no copy of the primary", "correct its DSN in the catalog")
    elif not row[0]:
        todo = "two servers take writes: stop one at once, and rebuild it as a replica of the other"
        wrong = (Severity.ERROR, "it is a primary itself", todo)
    elif row[2] > view.limits.lag_bytes:
        todo = "look at its load and its network; a promotion waits until it has caught up"
        wrong = (Severity.WARNING, f"it is {row[2] / 2**20:,.1f} MiB of WAL behind its primary", todo)
    elif not row[3]:
        todo = "look at its log, at primary_conninfo and at pg_hba.conf of the primary"
        wrong = (Severity.WARNING, "it does not stream from a primary", todo)
    return None if wrong is None else finding(*wrong)
