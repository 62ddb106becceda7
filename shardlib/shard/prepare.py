"""A shard's database made ready for its cluster, and what a server refuses meanwhile in our own words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import errors

from shardlib.errors import InvalidArgument, LockTimeout, ShardUnavailable, UnsupportedOperation
from shardlib.fence.gate import install, open_gate
from shardlib.shard.connect import explain, hopeless, lost
from shardlib.topology import Shard

__all__ = ["prepare_shard", "unavailable"]

_LOCK_S: Final = 10.0
"""How long `install` and `open_gate` wait for a lock."""


def prepare_shard(
    conn: psycopg.Connection[Any], shard: Shard, *, cluster_id: str, gates: Iterable[int], app_roles: Sequence[str] = ()
) -> None:
    """Install the schema `shardlib` in a shard's database, and open these gates; idempotent.

    Args:
        conn: autocommit connection to the shard's primary.
        shard: which one it is.
        cluster_id: identity of its cluster.
        gates: their numbers.
        app_roles: roles of applications, which get what the fence asks of them.

    Raises:
        InvalidArgument: an application's role that the server does not know.
        InvalidTopology: the database belongs to another cluster or shard, or its schema is newer than this library.
        LockTimeout: somebody else changes the schema.
        ShardUnavailable: the connection broke.
        UnsupportedOperation: the role of the connection may not do it.
    """
    with _explained(conn, shard, app_roles):
        install(conn, cluster_id=cluster_id, shard_id=shard.id, roles=tuple(app_roles))
        for number in gates:
            open_gate(conn, number)


@contextmanager
def _explained(conn: psycopg.Connection[Any], shard: Shard, app_roles: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except errors.InsufficientPrivilege as error:
        info, said = conn.info, str(error.diag.message_primary)
        raise UnsupportedOperation(
            f"the role {info.user!r} may not prepare shard {shard.name!r}: {said}",
            f'let it: GRANT CREATE ON DATABASE "{info.dbname}" TO "{info.user}"'
            if "for database" in said
            else "run it as the role that owns the schema shardlib there",
        ) from None
    except errors.UndefinedObject as error:
        raise InvalidArgument(
            "app_roles", list(app_roles), f"roles that exist on shard {shard.name!r}: {error.diag.message_primary}"
        ) from None
    except errors.LockNotAvailable:
        raise LockTimeout(shard.name, _LOCK_S, "somebody else changes its schema shardlib") from None
    except psycopg.OperationalError as error:
        if not lost(error):
            raise
        raise unavailable(shard, error) from None


def unavailable(shard: Shard, error: BaseException) -> ShardUnavailable:
    """The error for a caller whose connection to a shard's primary could not be had, or broke."""
    return ShardUnavailable(shard.name, explain(error, shard.primary)[0], hopeless(error))
