"""Looking at one shard's server, within a limit of time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection

from shardlib.dsn import Dsn, scrub
from shardlib.errors import ShardlibError, ShardUnavailable
from shardlib.topology import Table, Topology
from shardlib_ops.reshard.check.facts import OLDEST, Server, TableFacts, read_server, read_tables
from shardlib_ops.reshard.check.fault import Fault
from shardlib_ops.reshard.check.server import Needs, server_faults, version_fault
from shardlib_ops.reshard.check.tables import shapes_of, table_faults
from shardlib_ops.reshard.connect import connect
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.together import together

__all__ = ["Look", "check_shard", "look", "open_checking"]

LOOK_S: Final = 20.0


@dataclass
class Look:
    """What was seen of a shard.

    Attributes:
        where: its name.
        server: None if it could not be looked at.
        tables: those of the cluster's that are there.
        shapes: of the sharded ones among them.
        faults: what is wrong.
    """

    where: str
    server: Server | None = None
    tables: dict[Table, TableFacts] = field(default_factory=dict)
    shapes: list[TableShape] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


async def open_checking(dsn: Dsn, where: str, *, replication: bool = False) -> AsyncConnection[Any]:
    """A connection of the check; the caller closes it."""
    return await connect(dsn, shard=where, application="shardlib check", replication=replication)


async def look(dsn: Dsn, where: str, *, tables: Sequence[Table], needs: Needs) -> Look:
    """Look at a shard's primary. What goes wrong is among the faults."""
    seen = Look(where)
    try:
        async with asyncio.timeout(LOOK_S):
            await _look(seen, dsn, tables, needs)
    except TimeoutError:
        seen.faults.append(Fault(where, f"its server did not answer within {LOOK_S:g} s", "look at its load"))
    except ShardUnavailable as error:
        seen.faults.append(Fault(where, str(error), "start the server, or correct the shard's DSN"))
    except (psycopg.Error, ShardlibError) as error:
        seen.faults.append(Fault(where, scrub(str(error).strip(), dsn.reveal()), "see the server's message"))
    return seen


async def _look(seen: Look, dsn: Dsn, tables: Sequence[Table], needs: Needs) -> None:
    async with await open_checking(dsn, seen.where) as conn:
        if (wrong := version_fault(seen.where, conn.info.server_version)) is not None:
            seen.faults.append(wrong)
        if conn.info.server_version // 10_000 < OLDEST:
            return
        seen.server = await read_server(conn)
        seen.tables = await read_tables(conn, tables)
        seen.shapes, faults = await shapes_of(conn, seen.where, seen.tables)
        faults += await _sequences_cached(conn, seen)
    seen.faults += server_faults(seen.where, seen.server, needs)
    seen.faults += table_faults(seen.where, seen.server, seen.tables)
    if needs.gives:
        # A target may have its tables without indexes yet; in the end they must be like the source's.
        seen.faults += faults
    if (seen.server.superuser or seen.server.replication) and seen.server.max_wal_senders > seen.server.senders:
        await _replicates(seen, dsn)


async def _replicates(seen: Look, dsn: Dsn) -> None:
    """pg_hba.conf, or a proxy in between, may let statements pass and not the replication protocol."""
    try:
        async with await open_checking(dsn, seen.where, replication=True) as conn:
            await conn.execute("IDENTIFY_SYSTEM")
    except (psycopg.Error, ShardlibError) as error:
        seen.faults.append(
            Fault(
                seen.where,
                f"it takes no replication connection: {scrub(str(error).strip(), dsn.reveal())}",
                "let the DSN lead to the server itself, not to a proxy, and pg_hba.conf allow it",
            )
        )


async def _sequences_cached(conn: AsyncConnection[Any], seen: Look) -> list[Fault]:
    found = await conn.execute(
        "SELECT DISTINCT q.seqrelid::regclass::text, q.seqcache FROM pg_depend d"
        " JOIN pg_sequence q ON q.seqrelid = d.objid WHERE d.classid = 'pg_class'::regclass"
        " AND d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY (%s::oid[]) AND q.seqcache > 1 ORDER BY 1",
        ([facts.oid for facts in seen.tables.values()],),
    )
    return [
        Fault(
            seen.where,
            f"sequence {name} has CACHE {cache}: sessions keep numbers, which a sequence that is set ahead "
            "does not take from them",
            f"ALTER SEQUENCE {name} CACHE 1 before the job, if numbers must be unique over a shard's life",
            note=True,
        )
        for name, cache in await found.fetchall()
    ]


async def check_shard(dsn: Dsn, *, topology: Topology | None, name: str) -> list[Fault]:
    """Whether a database can be a shard whose rows come and go by jobs.

    Args:
        dsn: of its primary.
        topology: the cluster that it is for, whose shards are asked whether one of them is this same database; None to
            look at the server alone.
        name: what the shard is, or will be, called.

    Returns:
        everything that was found at once, notes included; empty if there is nothing.
    """
    tables = topology.tables if topology is not None else ()
    others = [shard for shard in topology.shards if shard.name != name] if topology is not None else []
    seen, *rest = await together(
        [look(dsn, name, tables=tables, needs=Needs())]
        + [look(shard.primary, shard.name, tables=(), needs=Needs()) for shard in others]
    )
    faults = list(seen.faults)
    if topology is None or seen.server is None:
        return faults
    control = seen.server.control
    known = next((shard.id for shard in topology.shards if shard.name == name), None)
    if control is not None and control[0] != topology.cluster_id:
        faults.append(
            Fault(
                name,
                f"the database belongs to another cluster ({control[0]}, where it is shard {control[1]!r})",
                "name another database, or DROP SCHEMA shardlib CASCADE there if that cluster is no more",
            )
        )
    elif control is not None and control[1] != known:
        faults.append(
            Fault(
                name,
                f"the database was shard {control[1]!r} of this cluster",
                "name another database; or DROP SCHEMA shardlib CASCADE there, if that shard is no more",
            )
        )
    for other in rest:
        if other.server is None:
            faults.append(
                Fault(name, f"shard {other.where!r} does not answer, so it cannot be told apart from this one",
                      "start its server and check again", note=True)
            )  # fmt: skip
        elif other.server.identity == seen.server.identity:
            faults.append(
                Fault(name, f"its database is that of shard {other.where!r}", "each shard needs a database of its own")
            )
    return faults
