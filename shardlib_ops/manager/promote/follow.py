"""Replicas are told which server to follow, by SQL alone: `primary_conninfo` takes effect without a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardlib.errors import ShardUnavailable
from shardlib_ops.manager.promote.server import Node, until

__all__ = ["drop_slots", "repoint"]

_STREAM_S: Final = 20.0


async def repoint(replica: Node, upstream: Node, *, host: str, port: str, slot: str) -> None:
    """Let a replica stream from another server, with the role and the options that it has; idempotent.

    Args:
        replica: which one.
        upstream: the server that it is to follow, a replica or a primary.
        host: how the replica is to call it.
        port: of that.
        slot: the physical slot that the replica reads; made there if it is missing. Empty for none.

    Raises:
        ShardUnavailable: it does not stream from there in time.
    """
    if slot:
        await upstream.rows(
            "SELECT pg_create_physical_replication_slot(%s, true)"
            " WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = %s)",
            slot,
            slot,
        )
    before = str(await replica.value("SELECT setting FROM pg_settings WHERE name = 'primary_conninfo'"))
    params = conninfo_to_dict(before)
    if (params.get("host"), str(params.get("port", "5432"))) != (host, port):
        params.pop("hostaddr", None)
        after = make_conninfo("", **{**params, "host": host, "port": port})
        await replica.set("primary_conninfo", after, shows=after)
    if not await until(lambda: replica.streams_from(host, port), _STREAM_S):
        raise ShardUnavailable(
            upstream.dsn.safe(),
            f"replica {replica.dsn.host}:{replica.dsn.port} does not stream from {host}:{port} within {_STREAM_S:g} s: "
            "look at its log; pg_hba.conf there has to allow replication",
        )


async def drop_slots(server: Node, names: Sequence[str]) -> None:
    """Drop the physical slots that nobody reads here any more."""
    for name in names:
        if not name:
            continue

        async def gone(name: str = name) -> bool:
            await server.rows(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                " WHERE slot_name = %s AND slot_type = 'physical' AND NOT active",
                name,
            )
            return await server.value("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", name) is None

        await until(gone, _STREAM_S)
