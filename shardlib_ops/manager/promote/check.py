"""What stands in the way of a promotion, found before anything is done: all of it at once, each with its way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row

from shardlib.dsn import Dsn, scrub
from shardlib.errors import InvalidArgument, InvalidTopology, ShardUnavailable
from shardlib.topology import Shard
from shardlib_ops.manager.promote.server import Node, arrives
from shardlib_ops.reshard.check import Fault
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.together import together

__all__ = ["Look", "Wanted", "choose", "look"]

_REPLAY_S: Final = 2.0
_MINE: Final = Runner(0, 0)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a promotion asks for.

    Attributes:
        replica: the replica that is to take over; None for the one that is the least behind.
        budget_s: seconds that the shard may be closed until the replica is promoted; then it is opened again.
        max_lag_bytes: WAL that the replica may be behind when the promotion begins.
    """

    replica: Dsn | None = None
    budget_s: float = 5.0
    max_lag_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        if not 0.1 <= self.budget_s <= 60:
            raise InvalidArgument("budget_s", self.budget_s, "0.1 to 60 seconds: the shard is closed for that time")
        if self.max_lag_bytes < 0:
            raise InvalidArgument("max_lag_bytes", self.max_lag_bytes, "0 or more bytes")


@dataclass(frozen=True)
class Look:
    """A shard that may be promoted.

    Attributes:
        new: the replica that takes over.
        others: the other replicas.
        upstreams: `primary_conninfo` of each of them.
        slots: `primary_slot_name` of each of them, empty if it has none.
        synchronous: what `synchronous_standby_names` is to be on the new primary; empty to leave it.
    """

    new: Dsn
    others: tuple[Dsn, ...]
    upstreams: tuple[Dsn, ...]
    slots: tuple[str, ...]
    synchronous: str


def choose(shard: Shard, endpoint: str | None) -> Dsn | None:
    """The replica of a shard that an operator names, by its DSN or by `host:port`.

    Raises:
        InvalidTopology: it is no replica of the shard, or the shard has none.
    """
    known = ", ".join(f"{one.host}:{one.port}" for one in shard.replicas)
    if not shard.replicas:
        raise InvalidTopology(
            f"shard {shard.name!r} has no replica", "add one (`shard add-replica`) before its primary can step down"
        )
    if endpoint is None:
        return None
    if re.fullmatch(r"[^\s/=@]+:[0-9]+", endpoint):
        host, _, port = endpoint.rpartition(":")
    else:
        given = Dsn(endpoint)
        host, port = given.host, given.port
    for one in shard.replicas:
        if (one.host, one.port) == (host, port):
            return one
    if (shard.primary.host, shard.primary.port) == (host, port):
        raise InvalidTopology(f"{host}:{port} is the primary of shard {shard.name!r} already", "nothing is to be done")
    raise InvalidTopology(f"{host}:{port} is no replica of shard {shard.name!r}", f"its replicas are: {known}")


async def look(shard: Shard, wanted: Wanted) -> tuple[Look | None, list[Fault]]:
    """Ask every server of the shard.

    Returns:
        the shard as it is to be promoted, or None; and everything that stands in the way.
    """
    primary, *replicas = await together(_facts(dsn, shard) for dsn in (shard.primary, *shard.replicas))
    faults = [_away(shard, dsn, found) for dsn, found in zip((shard.primary, *shard.replicas), [primary, *replicas],
              strict=True) if isinstance(found, str)]  # fmt: skip
    if isinstance(primary, str):
        return None, faults
    faults += _of_primary(shard, primary)
    seen = {dsn: found for dsn, found in zip(shard.replicas, replicas, strict=True) if isinstance(found, dict)}
    for dsn, found in seen.items():
        faults += _of_replica(shard, dsn, found, primary)
    if primary["standby"] or not seen:
        return None, faults
    new = wanted.replica or min(seen, key=lambda dsn: (seen[dsn]["behind"] is None, seen[dsn]["behind"] or 0))
    if new not in seen:
        return None, faults
    faults += _of_new(shard, new, seen[new], primary, wanted)
    if not faults:
        faults += await _proved(shard, new, seen[new], primary)
    others = tuple(dsn for dsn in shard.replicas if dsn != new and dsn in seen)
    synchronous, more = _synchronous(shard, primary, seen[new], len(others))
    return Look(
        new,
        others,
        tuple(Dsn(seen[dsn]["conninfo"]) for dsn in others if seen[dsn]["conninfo"]),
        tuple(seen[dsn]["slot"] for dsn in others),
        synchronous,
    ), [*faults, *more]


def _away(shard: Shard, dsn: Dsn, reason: str) -> Fault:
    what = "primary" if dsn == shard.primary else "replica"
    return Fault(
        shard.name,
        f"{what} {dsn.host}:{dsn.port} does not answer: {reason}",
        f"start it, or take it off the shard (`shard remove-replica {shard.name} {dsn.host}:{dsn.port}`)"
        if what == "replica"
        else "a planned promotion needs the primary: start it",
    )


async def _facts(dsn: Dsn, shard: Shard) -> dict[str, Any] | str:
    """What a server says, or why it says nothing."""
    node = Node(dsn, shard.name, _MINE)
    try:
        conn = await node.conn()
        async with conn.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(_FACTS.encode())
            row = await cursor.fetchone()
        return row or "no row"
    except ShardUnavailable as error:
        return " ".join(error.reason.split())
    except psycopg.Error as error:
        return scrub(" ".join(str(error).split()), dsn.reveal())
    finally:
        await node.close()


def _of_primary(shard: Shard, facts: Mapping[str, Any]) -> Iterator[Fault]:
    where = f"primary {shard.primary.host}:{shard.primary.port}"

    def fault(problem: str, way_out: str) -> Fault:
        return Fault(shard.name, f"{where} {problem}", way_out)

    if facts["standby"]:
        yield fault("is a replica itself", "the catalog has a wrong primary; something else may have promoted another")
    if facts["read_only"]:
        yield fault(
            "begins its sessions read-only (default_transaction_read_only is on)",
            "ALTER SYSTEM RESET default_transaction_read_only; SELECT pg_reload_conf()",
        )
    for gid, owner, age_s in facts["prepared"] or []:
        yield fault(
            f"holds prepared transaction {gid!r} of {owner}, prepared {float(age_s):.0f} s ago",
            "let whoever coordinates it decide (`engine.settle()`), or COMMIT PREPARED or ROLLBACK PREPARED it",
        )
    for name in facts["logical_slots"] or []:
        yield fault(
            f"has the logical replication slot {name!r}, which the new primary will not have",
            "let its reader finish and drop it; make it again on the new primary",
        )
    yield from _rights(shard, where, facts)


def _rights(shard: Shard, where: str, facts: Mapping[str, Any]) -> Iterator[Fault]:
    for right in facts["lacking"] or []:
        yield Fault(
            shard.name,
            f"role {facts['role']!r} may not {right} on {where}",
            "promote with a superuser's DSN in the catalog, or grant it",
        )


def _of_replica(shard: Shard, dsn: Dsn, facts: Mapping[str, Any], primary: Mapping[str, Any]) -> Iterator[Fault]:
    where = f"replica {dsn.host}:{dsn.port}"

    def fault(problem: str, way_out: str) -> Fault:
        return Fault(shard.name, f"{where} {problem}", way_out)

    if facts["system"] != primary["system"]:
        yield fault(
            f"is no copy of the primary (system identifier {facts['system']}, not {primary['system']})",
            "the catalog has a wrong endpoint; make the replica by a base backup of the primary",
        )
        return
    if not facts["standby"]:
        yield fault("is no replica: it takes writes", "stop it, and make it a replica of the primary again")
        return
    if facts["receiver"] != "streaming":
        yield fault(
            f"does not stream (its WAL receiver is {facts['receiver'] or 'not running'})",
            "look at its log; primary_conninfo has to lead to the primary",
        )
    if not facts["conninfo"]:
        yield fault("hides its primary_conninfo from this role", "GRANT pg_read_all_settings to the role")


def _of_new(
    shard: Shard, dsn: Dsn, facts: Mapping[str, Any], primary: Mapping[str, Any], wanted: Wanted
) -> Iterator[Fault]:
    where = f"replica {dsn.host}:{dsn.port}"

    def fault(problem: str, way_out: str) -> Fault:
        return Fault(shard.name, f"{where} {problem}", way_out)

    behind = None if facts["replayed"] is None else max(0, primary["position"] - facts["replayed"])
    if behind is None or behind > wanted.max_lag_bytes:
        yield fault(
            f"is {'an unknown number of' if behind is None else behind} bytes behind, {wanted.max_lag_bytes} may be",
            "wait until it has caught up, or raise max_lag_bytes",
        )
    if facts["paused"]:
        yield fault("has its replay paused", "SELECT pg_wal_replay_resume()")
    if facts["delay"] not in ("0", "0ms"):
        yield fault(f"replays late on purpose (recovery_min_apply_delay = {facts['delay']})", "set it to 0, or choose "
                    "another replica")  # fmt: skip
    if facts["read_only"]:
        yield fault(
            "begins its sessions read-only (default_transaction_read_only is on)",
            "ALTER SYSTEM RESET default_transaction_read_only; SELECT pg_reload_conf()",
        )
    if facts["wal_level"] != primary["wal_level"]:
        yield fault(
            f"has wal_level {facts['wal_level']!r}, the primary {primary['wal_level']!r}",
            "set it as on the primary, and restart the replica",
        )
    for name in ("max_prepared_transactions", "max_wal_senders", "max_replication_slots"):
        if facts[name] < primary[name]:
            yield fault(f"has {name} {facts[name]}, the primary {primary[name]}", f"raise {name}, and restart it")
    yield from _rights(shard, where, facts)


async def _proved(shard: Shard, dsn: Dsn, facts: Mapping[str, Any], primary: Mapping[str, Any]) -> list[Fault]:
    """What the primary writes now arrives at the replica: it is this primary's, whatever the addresses say."""
    here, there = Node(shard.primary, shard.name, _MINE), Node(dsn, shard.name, _MINE)
    try:
        if await arrives(here, there, _REPLAY_S):
            return []
    finally:
        await here.close()
        await there.close()
    return [
        Fault(
            shard.name,
            f"replica {dsn.host}:{dsn.port} does not replay what the primary writes within {_REPLAY_S:g} s "
            f"(it streams from {facts['sender'] or 'an unknown server'})",
            "let it stream from the primary itself, and wait until it has caught up",
        )
    ]


def _synchronous(
    shard: Shard, primary: Mapping[str, Any], new: Mapping[str, Any], others: int
) -> tuple[str, Sequence[Fault]]:
    """`synchronous_standby_names` of the new primary: the old one takes the new one's place in it."""
    names = primary["synchronous"].strip()
    mine = new["synchronous"].strip()
    if not names or (mine and not (new["cluster_name"] and new["cluster_name"] in mine)):
        return "", ()
    counted = re.match(r"(?:FIRST|ANY)?\s*(\d+)\s*\(", names, re.IGNORECASE)
    if counted is not None and int(counted[1]) > 1:
        return "", [
            Fault(
                shard.name,
                f"the primary waits for {counted[1]} synchronous replicas ({names}), and the replica has no "
                "synchronous_standby_names of its own",
                "set synchronous_standby_names on the replica as it is to be when it is the primary",
            )
        ]
    if new["cluster_name"] and primary["cluster_name"]:
        pattern = rf'(?<![\w-])"?{re.escape(new["cluster_name"])}"?(?![\w-])'
        names = re.sub(pattern, lambda _: '"' + primary["cluster_name"] + '"', names)
    return names, ()


_FACTS: Final = """
SELECT current_user::text AS role, pg_is_in_recovery() AS standby,
       (SELECT system_identifier::text FROM pg_control_system()) AS system,
       (SELECT r.status FROM pg_stat_wal_receiver r) AS receiver,
       (SELECT r.sender_host || ':' || r.sender_port FROM pg_stat_wal_receiver r) AS sender,
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() - '0/0'::pg_lsn END::numeric AS replayed,
       CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_insert_lsn() - '0/0'::pg_lsn END::numeric AS position,
       CASE WHEN pg_is_in_recovery() THEN -(pg_last_wal_replay_lsn() - '0/0'::pg_lsn) END::numeric AS behind,
       CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() ELSE false END AS paused,
       current_setting('recovery_min_apply_delay') AS delay,
       (SELECT setting FROM pg_settings WHERE name = 'primary_conninfo') AS conninfo,
       current_setting('primary_slot_name') AS slot,
       (SELECT reset_val FROM pg_settings WHERE name = 'default_transaction_read_only') = 'on' AS read_only,
       current_setting('wal_level') AS wal_level,
       current_setting('max_prepared_transactions')::int AS max_prepared_transactions,
       current_setting('max_wal_senders')::int AS max_wal_senders,
       current_setting('max_replication_slots')::int AS max_replication_slots,
       current_setting('synchronous_standby_names') AS synchronous,
       current_setting('cluster_name') AS cluster_name,
       (SELECT json_agg(json_build_array(gid, owner, extract(epoch FROM clock_timestamp() - prepared)))
          FROM pg_prepared_xacts) AS prepared,
       (SELECT json_agg(slot_name) FROM pg_replication_slots WHERE slot_type = 'logical') AS logical_slots,
       (SELECT json_agg(what) FROM (VALUES
           ('run ALTER SYSTEM SET default_transaction_read_only',
            has_parameter_privilege('default_transaction_read_only', 'ALTER SYSTEM')),
           ('run ALTER SYSTEM SET primary_conninfo', has_parameter_privilege('primary_conninfo', 'ALTER SYSTEM')),
           ('run pg_reload_conf()', has_function_privilege('pg_reload_conf()', 'EXECUTE')),
           ('run pg_promote()', has_function_privilege('pg_promote(boolean, integer)', 'EXECUTE')),
           ('end other sessions (pg_signal_backend)',
            (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
            OR pg_has_role('pg_signal_backend', 'USAGE'))) AS rights(what, held) WHERE NOT held) AS lacking
"""
