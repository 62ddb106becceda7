"""As whom the gateway comes to a shard: a role that may read and write rows, and no more.

Whoever may send SQL may do whatever the role may: a superuser, or a member of `pg_execute_server_program`, runs
programs on the server; `pg_read_server_files` reads its keys; and row-level security does not hold for those that
bypass it. What a role could become by SET ROLE counts, since a function can do that in the middle of a statement.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy.exc import SQLAlchemyError

from shardlib import AsyncShardedEngine
from shardlib.errors import ShardlibError
from shardlib.topology import Shard
from shardlib_ops.audit.text import cleaned

__all__ = ["RoleTooStrong", "Vetting", "check_roles"]

_LOG = logging.getLogger("shardlib.ops.gateway")

_KEY: Final = "shardlib_ops.gateway"
_AT_ONCE: Final = 8
_TRIES_A_SHARD: Final = 1_000

# Runs in the first transaction of each connection. With a superuser, everything is true: its own row stands first.
_SQL: Final = """
    SELECT set_config('statement_timeout', '{timeout_ms}', {local}),
           (SELECT rolname || CASE WHEN rolsuper THEN ' is a superuser' WHEN rolbypassrls THEN ' bypasses row security'
                                   ELSE ' reaches files or programs of the server' END
              FROM pg_catalog.pg_roles
             WHERE (rolsuper OR rolbypassrls OR rolname IN ('pg_execute_server_program', 'pg_read_server_files',
                                                            'pg_write_server_files'))
               AND (pg_has_role(session_user, oid, 'MEMBER') OR pg_has_role(current_user, oid, 'MEMBER'))
             ORDER BY rolname IN (session_user, current_user) DESC, rolsuper DESC, rolname LIMIT 1),
           session_user"""


class RoleTooStrong(ShardlibError):  # noqa: N818 - named like those of shardlib.errors
    """The gateway's role on a shard may do more than read and write rows.

    Attributes:
        shard: name of the shard.
        role: the role.
        why: what it may, or which role it may become that may.
    """

    def __init__(self, shard: str, role: str, why: str) -> None:
        super().__init__(shard, role, why)
        self.shard, self.role, self.why = shard, role, why

    def __str__(self) -> str:
        return (
            f"the gateway comes to shard {self.shard!r} as {self.role!r}, and {self.why}: whoever may send a statement "
            "could do as much; let it log in as another role (PGUSER, if the DSNs name none), or, for trials on this "
            "machine only, start it with --dev"
        )


class Vetting:
    """Looks at the role of each new connection, and bounds its statements at the server too.

    The server's own bound is for a gateway that dies or freezes in the middle of a statement, which holds a gate.

    Args:
        timeout_s: PostgreSQL ends statements after so long.
        any_role: whether every role may pass.
    """

    def __init__(self, timeout_s: float, *, any_role: bool) -> None:
        self._timeout_ms, self._any_role = max(1, round(timeout_s * 1_000)), any_role

    async def vet(self, driver: Any, info: Mapping[Any, Any], shard: str) -> dict[str, object] | None:
        """Look at a connection that was not looked at before, in the transaction that has begun on it.

        Args:
            driver: psycopg's connection.
            info: what is kept with the physical connection.
            shard: name of the shard that it leads to.

        Returns:
            What to keep with it once the transaction is committed; None if there is nothing new.

        Raises:
            RoleTooStrong: nobody may send SQL by it.
        """
        if _KEY in info:
            return None
        # Behind PgBouncer, the next transaction may be on another connection of the server.
        pooled = bool(driver.pooled)
        sql = _SQL.format(timeout_ms=self._timeout_ms, local="true" if pooled else "false")
        _, why, role = await driver.wait(driver.one_row(sql.encode()))
        if why and not self._any_role:
            raise RoleTooStrong(shard, role, why)
        return None if pooled else {_KEY: True}


async def check_roles(engine: AsyncShardedEngine, vetting: Vetting) -> None:
    """Look at the gateway's role on every shard that can be reached. The others are looked at as they come.

    Raises:
        RoleTooStrong: on one of them it may do too much.
    """
    limit = asyncio.Semaphore(_AT_ONCE)

    async def check(shard: Shard, key: str) -> RoleTooStrong | None:
        async with limit:
            try:
                async with engine.begin(key) as conn:
                    raw = await conn.get_raw_connection()
                    await vetting.vet(raw.driver_connection, {}, shard.name)
            except RoleTooStrong as error:
                return error
            except (ShardlibError, SQLAlchemyError) as error:
                _LOG.warning("the gateway's role on shard %r is not known yet: %s", shard.name, cleaned(error))
        return None

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(check(shard, key)) for shard, key in _key_of_each(engine)]
    for task in tasks:
        if (error := task.result()) is not None:
            raise error


def _key_of_each(engine: AsyncShardedEngine) -> list[tuple[Shard, str]]:
    """For each shard that owns keys, one of them."""
    left = {shard.id: shard for shard in engine.topology.owners()}
    found = []
    for number in itertools.islice(itertools.count(), len(left) * _TRIES_A_SHARD):
        if not left:
            break
        key = f"gateway-{number}"
        shard = left.pop(engine.shard_for(key).id, None)
        if shard is not None:
            found.append((shard, key))
    return found
