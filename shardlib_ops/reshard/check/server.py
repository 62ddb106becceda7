"""Whether a server, and the role that a DSN names, can do what a job asks of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from shardlib_ops.reshard.check.facts import NEWEST, OLDEST, Server
from shardlib_ops.reshard.check.fault import Fault

__all__ = ["Needs", "server_faults", "version_fault"]

_PREPARED_S: Final = 5.0
_KILLERS: Final = ("idle_session_timeout",)
_OVERRIDDEN: Final = (
    "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Needs:
    """What a job will make on a server.

    Attributes:
        slots: replication slots, each read by a WAL sender, beside those it has made already.
        own: what the names of the job's own slots begin with.
        gives: whether rows leave it.
    """

    slots: int = 2
    own: str | None = None
    gives: bool = False


def version_fault(where: str, version: int) -> Fault | None:
    """Whether the server's version (such as 180006) is one that jobs work with."""
    if OLDEST <= version // 10_000 <= NEWEST:
        return None
    return Fault(
        where,
        f"its server is PostgreSQL {version // 10_000}",
        f"jobs work with PostgreSQL {OLDEST} to {NEWEST}: upgrade the server",
    )


def server_faults(where: str, server: Server, needs: Needs) -> Iterator[Fault]:
    """What of the server stands in the way of a job with these needs."""

    def fault(problem: str, way_out: str, *, note: bool = False) -> Fault:
        return Fault(where, problem, way_out, note)

    if server.standby:
        yield fault("its server is a standby, which takes no writes", "put the primary's address into the DSN")
    if server.read_only:
        yield fault(
            "sessions of this role are read-only (default_transaction_read_only is on)",
            f"ALTER ROLE {server.role} SET default_transaction_read_only = off",
        )
    yield from _replication(server, needs, fault)
    yield from _rights(server, fault)
    yield from _transactions(server, needs, fault)
    for setting in server.settings:
        name = setting.partition("=")[0]
        if name in _OVERRIDDEN and not setting.endswith("=0"):
            yield fault(
                f"the role or the database sets {setting}", "nothing: a job's own connections set it to 0", note=True
            )
        elif name in _KILLERS and not setting.endswith("=0"):
            yield fault(
                f"the role or the database sets {setting}, which ends idle connections",
                "give the role of the shard's DSN a longer one: a job opens its connections again, which takes time",
                note=True,
            )


def _replication(server: Server, needs: Needs, fault: Callable[..., Fault]) -> Iterator[Fault]:
    if server.wal_level != "logical":
        yield fault(
            f"wal_level is {server.wal_level!r}", "ALTER SYSTEM SET wal_level = logical, and restart the server"
        )
    own = [name for name in server.slots if needs.own is not None and name.startswith(needs.own)]
    for name, most, used in (
        ("max_replication_slots", server.max_replication_slots, len(server.slots)),
        ("max_wal_senders", server.max_wal_senders, server.senders),
    ):
        wanted = needs.slots - len(own)
        if most - used < wanted:
            yield fault(
                f"{name} is {most}, of which {used} are in use, and the job needs {wanted} more",
                f"ALTER SYSTEM SET {name} = {used + wanted + 4}, and restart the server; or drop slots that nobody "
                "reads any more (pg_replication_slots)",
            )
    if server.max_slot_wal_keep_size != "-1":
        yield fault(
            f"max_slot_wal_keep_size is {server.max_slot_wal_keep_size}: a slot that falls further behind is lost, "
            "and the copy begins again",
            "raise it if the shard writes so much within some minutes",
            note=True,
        )
    if server.idle_replication_slot_timeout not in (None, "0"):
        yield fault(
            f"idle_replication_slot_timeout is {server.idle_replication_slot_timeout}: a job that is paused for longer "
            "copies again, or loses its way back",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0",
            note=True,
        )


def _rights(server: Server, fault: Callable[..., Fault]) -> Iterator[Fault]:
    if not (server.superuser or server.replication):
        yield fault(f"role {server.role!r} has no REPLICATION", f'ALTER ROLE "{server.role}" REPLICATION')
    if not server.may_create:
        yield fault(
            f"role {server.role!r} may not create in database {server.database!r}",
            f'GRANT CREATE ON DATABASE "{server.database}" TO "{server.role}"',
        )
    if not server.may_set_role:
        yield fault(
            f"role {server.role!r} may not set session_replication_role",
            f'GRANT SET ON PARAMETER session_replication_role TO "{server.role}"',
        )
    if not server.owns_shardlib:
        yield fault(
            f"role {server.role!r} does not own the schema shardlib", f'ALTER SCHEMA shardlib OWNER TO "{server.role}"'
        )


def _transactions(server: Server, needs: Needs, fault: Callable[..., Fault]) -> Iterator[Fault]:
    if server.max_prepared_transactions == 0:
        yield fault(
            "max_prepared_transactions is 0: transactions over several shards with two-phase commit are refused here",
            "ALTER SYSTEM SET max_prepared_transactions = 100, and restart the server, if the application uses them",
            note=True,
        )
    for prepared in server.prepared:
        # Younger ones are on their way to their end.
        if needs.gives and prepared.age_s > _PREPARED_S:
            yield fault(
                f"prepared transaction {prepared.gid!r} of {prepared.owner} is in doubt for {prepared.age_s:.0f} s, "
                "and the job waits for it",
                "let whoever coordinates it decide, or COMMIT PREPARED or ROLLBACK PREPARED it",
            )
