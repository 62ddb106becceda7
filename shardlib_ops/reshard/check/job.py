"""Everything that stands in a job's way, found before it does anything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations
from typing import Final

import psycopg

from shardlib.dsn import Dsn, scrub
from shardlib.errors import ShardlibError
from shardlib.ring import merge_ranges
from shardlib.ring.ranges import ranges_contain
from shardlib.token import hash_of
from shardlib.topology import Table, Topology
from shardlib_ops.reshard.check.fault import Fault
from shardlib_ops.reshard.check.server import Needs
from shardlib_ops.reshard.check.shard import LOOK_S, Look, look, open_checking
from shardlib_ops.reshard.check.tables import arriving_faults, key_faults
from shardlib_ops.reshard.job import Job, Leg
from shardlib_ops.reshard.together import together

__all__ = ["check_job"]

_CLOCKS_S: Final = 5.0
_KEYS_S: Final = 120.0
_BIG_BYTES: Final = 1 << 30


async def check_job(topology: Topology, job: Job) -> list[Fault]:
    """What would stop a job, and what its operator should know: all of it at once.

    Changes nothing. Each shard is looked at side by side with the others and within a limit of time of its own, so a
    server that hangs is one fault among the others.

    Args:
        topology: the present one.
        job: what is to move. It may have begun: what it has made itself is no fault.

    Returns:
        faults and notes, in the order of the job's shards and legs; empty if there is nothing.
    """
    shards = [topology.shard(shard_id) for shard_id in job.shards]
    seen = await together(
        look(shard.primary, shard.name, tables=topology.tables, needs=_needs(job, shard.id)) for shard in shards
    )
    looks = dict(zip(job.shards, seen, strict=True))
    faults = [fault for one in seen for fault in one.faults]
    for shard_id, one in looks.items():
        faults += _identity(topology, shard_id, one, gives=shard_id in job.sources)
        if shard_id in job.sources:
            faults += _gives(one, topology.tables)
    faults += _between(seen)
    found = await together(
        _replica(replica, shard.name, one)
        for shard, one in zip(shards, seen, strict=True)
        for replica in shard.replicas
    )
    found += await together(_leg(topology, job, leg, looks) for leg in job.legs)
    if all(table.reference for table in topology.tables):
        faults.append(
            Fault(
                "the cluster",
                "it has no sharded table yet, so that there is nothing to move",
                "create the tables first: engine.create_all(metadata)",
            )
        )
    return list(dict.fromkeys([*faults, *chain.from_iterable(found)]))


def _needs(job: Job, shard_id: str) -> Needs:
    legs = sum(shard_id in (leg.source, leg.target) for leg in job.legs)
    # One more at a time: for the snapshot of a copy, or of a comparison.
    return Needs(slots=legs + 1, own=f"shardlib_job_{job.id}_", gives=shard_id in job.sources)


def _identity(topology: Topology, shard_id: str, seen: Look, *, gives: bool) -> Iterable[Fault]:
    if seen.server is None:
        return
    control = seen.server.control
    if control is None:
        if gives:  # a target becomes a shard when the job begins
            yield Fault(
                seen.where,
                "its database has no table shardlib.control that the role can read, so it is no shard of a cluster",
                "correct the shard's DSN, or let its role be the one that owns the schema shardlib",
            )
    elif control != (topology.cluster_id, shard_id):
        yield Fault(
            seen.where,
            f"its database is shard {control[1]!r} of cluster {control[0]}, not {shard_id!r} of {topology.cluster_id}",
            "correct the shard's DSN",
        )


def _gives(seen: Look, tables: Sequence[Table]) -> Iterable[Fault]:
    """A source must have every table."""
    if seen.server is None:
        return
    missing = [table.fullname for table in tables if table not in seen.tables]
    if missing:
        yield Fault(
            seen.where,
            f"it lacks the tables {', '.join(missing)}, which the catalog has recorded",
            "run engine.create_all(metadata), which makes them on every shard",
        )


def _between(looks: Sequence[Look]) -> Iterable[Fault]:
    """What two servers must not have in common, and should."""
    known = [(seen, seen.server) for seen in looks if seen.server is not None]
    for (one, here), (other, there) in combinations(known, 2):
        both = f"{one.where}, {other.where}"
        if here.identity == there.identity:
            yield Fault(both, "both are the same database", "correct the DSN of one of them")
        apart = abs(here.clock_offset_s - there.clock_offset_s)
        if apart > _CLOCKS_S:
            yield Fault(
                both,
                f"their clocks are {apart:.1f} s apart",
                "let both servers take the time from one place; the job itself does not rely on it",
                note=True,
            )


async def _replica(replica: Dsn, where: str, seen: Look) -> list[Fault]:
    """A replica that may be promoted must have followed before a job switches, so it has to be there."""
    if seen.server is None:
        return []
    way_out = "start it, or take it out of the topology: the switch waits for it"
    try:
        async with asyncio.timeout(LOOK_S), await open_checking(replica, where) as conn:
            found = await conn.execute(
                "SELECT pg_is_in_recovery(), (SELECT system_identifier::text FROM pg_control_system())"
            )
            row = await found.fetchone()
    except TimeoutError:
        return [Fault(where, f"replica {replica} did not answer within {LOOK_S:g} s", way_out)]
    except (psycopg.Error, ShardlibError) as error:
        return [Fault(where, f"replica {replica}: {scrub(str(error).strip(), replica.reveal())}", way_out)]
    if row is None or row[1] != seen.server.identity[0]:
        return [Fault(where, f"replica {replica} is not a copy of the primary", "correct its DSN")]
    return []


async def _leg(topology: Topology, job: Job, leg: Leg, looks: Mapping[str, Look]) -> list[Fault]:
    """What stands between two shards."""
    source, target = looks[leg.source], looks[leg.target]
    if source.server is None or target.server is None:
        return []
    where = f"{source.where} -> {target.where}"
    giver, taker = topology.shard(leg.source).primary, topology.shard(leg.target).primary
    faults = [*_loose(where, job, leg, source, target), *_room(where, leg, topology, source)]
    token, ranges = hash_of(topology.hash_function), merge_ranges(leg.ranges)
    try:
        async with (
            asyncio.timeout(_KEYS_S),
            await open_checking(giver, source.where) as here,
            await open_checking(taker, target.where) as there,
        ):
            faults += [
                fault
                async for fault in arriving_faults(
                    where, (here, source.server), (there, target.server), topology.tables, target.tables
                )
            ]
            faults += await key_faults(
                where, there, target.shapes, lambda key: ranges_contain(ranges, token(key)), job.id
            )
    except TimeoutError:
        faults.append(
            Fault(
                where,
                f"whether rows of the ranges are on the target already was not known within {_KEYS_S:g} s",
                "nothing: the job looks again before it copies",
                note=True,
            )
        )
    except (psycopg.Error, ShardlibError) as error:
        problem = scrub(scrub(str(error).strip(), giver.reveal()), taker.reveal())
        faults.append(Fault(where, problem, "see the server's message"))
    return faults


def _loose(where: str, job: Job, leg: Leg, source: Look, target: Look) -> Iterable[Fault]:
    """Unique values that hold in one shard alone collide where rows of two shards come together."""
    sources = sum(other.target == leg.target for other in job.legs)
    for table, facts in source.tables.items():
        there = target.tables.get(table)
        for name in facts.loose:
            met = sources > 1 or (there is not None and there.filled)
            yield Fault(
                where,
                f"unique index {name!r} of table {table.fullname!r} does not hold the shard key "
                f"({', '.join(table.key)}): rows of two shards may have the same value"
                + (", and come together on the target" if met else ""),
                "add the shard key to the index, or drop it",
                note=not met,
            )


def _room(where: str, leg: Leg, topology: Topology, source: Look) -> Iterable[Fault]:
    owned = sum(part.last - part.first + 1 for part in topology.ring.ranges_of(leg.source))
    moved = sum(part.last - part.first + 1 for part in leg.ranges)
    arriving = sum(facts.bytes for facts in source.tables.values()) * min(moved, owned) // max(owned, 1)
    if arriving >= _BIG_BYTES:
        yield Fault(
            where,
            f"about {arriving / _BIG_BYTES:.1f} GiB will come to the target",
            "see that its disk has room for twice as much, and the source's for the WAL of the time of the copy",
            note=True,
        )
