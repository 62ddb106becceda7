"""The control plane as coroutines: shards and jobs are made, listed and steered here, by the API, the CLI and tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Literal, Self, overload
from uuid import uuid4

from shardlib.catalog import Catalog, open_catalog, publish_change
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.fence.gate import install, open_gate
from shardlib.key.encode import encode_key
from shardlib.token import hash_of
from shardlib.topology import Shard, Topology
from shardlib.topology.change import with_shard, without_shard
from shardlib_ops.manager.blocking import BlockingManager
from shardlib_ops.manager.bootstrap import NewShard, reached
from shardlib_ops.reshard.check import Fault, check_job
from shardlib_ops.reshard.job import Job, Status, Wish
from shardlib_ops.reshard.plan import (
    Plan,
    plan_drain,
    plan_merge,
    plan_move_keys,
    plan_rebalance,
    plan_split,
)
from shardlib_ops.reshard.store import JobStore

__all__ = ["Manager", "Target"]

_CONNECT_S: Final = 10

Target = Mapping[str, Any]
"""`{"shard_id": name or id}`, or `{"name": …, "primary_endpoint": dsn, "replicas": [dsn], "vnode_count": 256}`."""


@dataclass(frozen=True, slots=True)
class _Parties:
    """Shards as they are, or as they will be when the job begins."""

    topology: Topology
    targets: tuple[Shard, ...]


class Manager:
    """The control plane of one cluster; several may work at once, since every change is a compare-and-swap.

    Shards are named by name or id everywhere.

    Args:
        url: the catalog, such as `etcd://127.0.0.1:2379/shop`.
        timeout_s: limit for one answer of the catalog, in seconds.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        self._catalog: Catalog = open_catalog(url, timeout_s=timeout_s)
        self._jobs = JobStore(self._catalog)

    @classmethod
    def sync(cls, url: str, *, timeout_s: float = 5.0) -> BlockingManager:
        """The blocking twin, for scripts."""
        return BlockingManager(cls(url, timeout_s=timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the catalog; idempotent."""
        await asyncio.to_thread(self._catalog.close)

    async def topology(self) -> Topology:
        """The topology as it is now.

        Raises:
            CatalogUnavailable: no answer.
        """
        return await asyncio.to_thread(self._catalog.load)

    # Shards

    async def list_shards(self) -> list[Shard]:
        """Every shard, in the order in which they were made."""
        return list((await self.topology()).shards)

    async def get_shard(self, shard: str) -> Shard:
        """One shard.

        Raises:
            InvalidTopology: there is none of that name or id.
        """
        return (await self.topology()).shard(shard)

    async def create_shard(
        self, name: str, *, primary_endpoint: str, replicas: Sequence[str] = (), vnode_count: int = 256
    ) -> Shard:
        """Add a shard that owns nothing yet: `split`, `rebalance` and others give it ranges.

        Its database gets the schema `shardlib`; tables come with the first job that moves rows there.

        Args:
            name: unique in the cluster; a letter, then letters, digits, `_`, `.` or `-`, 63 characters at most.
            primary_endpoint: DSN of its primary, with a role that may create the schema `shardlib`.
            replicas: DSNs of its replicas.
            vnode_count: virtual nodes, which is its weight when ranges are dealt.

        Raises:
            InvalidArgument: a value that is not allowed, a name or endpoint that is taken.
            InvalidTopology: the database belongs to a cluster already.
            ShardUnavailable: the primary cannot be reached.
            UnsupportedOperation: it is a replica, or too old.
        """
        new = NewShard(name, Dsn(primary_endpoint), [Dsn(text) for text in replicas], vnode_count)
        return await asyncio.to_thread(self._create_shard, new)

    def _create_shard(self, new: NewShard) -> Shard:
        def change(topology: Topology) -> Topology:
            shard = _planned(topology, new)
            after = with_shard(topology, shard, nonce=uuid4().hex)
            with reached(shard, _CONNECT_S) as connection:
                _free(connection, topology)  # also what this change left there if another has overtaken it
                roles = _app_roles(topology)
                install(connection, cluster_id=topology.cluster_id, shard_id=shard.id, roles=roles)
                open_gate(connection, after.default_gate(shard.id))
            return after

        return publish_change(self._catalog, change).shard(new.name)

    async def delete_shard(self, shard: str) -> None:
        """Take a shard that owns nothing out of the cluster. Its rows and its server are left as they are.

        Raises:
            InvalidTopology: it owns ranges, or a job that is not over uses it, or there is none.
        """
        await asyncio.to_thread(self._delete_shard, shard)

    def _delete_shard(self, name: str) -> None:
        def change(topology: Topology) -> Topology:
            shard = topology.shard(name)
            _refuse_busy(self._jobs.all(), [shard], topology)
            return without_shard(topology, shard.id, nonce=uuid4().hex)

        publish_change(self._catalog, change)

    # Jobs

    @overload
    async def split(
        self,
        source: str,
        *,
        targets: Sequence[Target],
        keep: int | None = None,
        retention_s: float | None = None,
        dry_run: Literal[False] = False,
    ) -> Job: ...
    @overload
    async def split(
        self,
        source: str,
        *,
        targets: Sequence[Target],
        keep: int | None = None,
        retention_s: float | None = None,
        dry_run: Literal[True],
    ) -> Plan: ...
    async def split(
        self,
        source: str,
        *,
        targets: Sequence[Target],
        keep: int | None = None,
        retention_s: float | None = None,
        dry_run: bool = False,
    ) -> Job | Plan:
        """Give a part of a shard's ranges to others, new or not.

        Args:
            source: the shard that is split.
            targets: who gets a part, each by its weight (`vnode_count`).
            keep: weight of what stays on the source; None: its own `vnode_count`; 0: nothing stays.
            retention_s: seconds after the switch until the job completes by itself; None: when `complete` is called.
            dry_run: only tell the plan.

        Returns:
            Job, or Plan for a dry run.

        Raises:
            InvalidArgument: a value that is not allowed.
            InvalidTopology: a shard that is unknown, busy, or not fit.
        """

        def plan(parties: _Parties) -> Plan:
            weights = {shard.id: shard.vnode_count for shard in parties.targets}
            return plan_split(parties.topology, parties.topology.shard(source), weights, keep=keep)

        return await self._begin(targets, plan, retention_s, dry_run)

    @overload
    async def merge(
        self,
        sources: Sequence[str],
        *,
        target: Target,
        retention_s: float | None = None,
        dry_run: Literal[False] = False,
    ) -> Job: ...
    @overload
    async def merge(
        self, sources: Sequence[str], *, target: Target, retention_s: float | None = None, dry_run: Literal[True]
    ) -> Plan: ...
    async def merge(
        self, sources: Sequence[str], *, target: Target, retention_s: float | None = None, dry_run: bool = False
    ) -> Job | Plan:
        """Give everything that some shards own to one; see `split` for the arguments, answer and errors."""

        def plan(parties: _Parties) -> Plan:
            topology = parties.topology
            return plan_merge(topology, [topology.shard(source) for source in sources], parties.targets[0])

        return await self._begin([target], plan, retention_s, dry_run)

    @overload
    async def rebalance(
        self, *, target: Target, retention_s: float | None = None, dry_run: Literal[False] = False
    ) -> Job: ...
    @overload
    async def rebalance(self, *, target: Target, retention_s: float | None = None, dry_run: Literal[True]) -> Plan: ...
    async def rebalance(self, *, target: Target, retention_s: float | None = None, dry_run: bool = False) -> Job | Plan:
        """Give a shard that owns nothing its fair part of everything; see `split`."""
        return await self._begin(
            [target], lambda parties: plan_rebalance(parties.topology, parties.targets[0]), retention_s, dry_run
        )

    @overload
    async def drain(self, shard: str, *, retention_s: float | None = None, dry_run: Literal[False] = False) -> Job: ...
    @overload
    async def drain(self, shard: str, *, retention_s: float | None = None, dry_run: Literal[True]) -> Plan: ...
    async def drain(self, shard: str, *, retention_s: float | None = None, dry_run: bool = False) -> Job | Plan:
        """Give everything that a shard owns to the others, evenly; see `split`."""
        return await self._begin(
            [], lambda parties: plan_drain(parties.topology, parties.topology.shard(shard)), retention_s, dry_run
        )

    @overload
    async def move_keys(
        self,
        keys: Sequence[object],
        *,
        target: Target,
        retention_s: float | None = None,
        dry_run: Literal[False] = False,
    ) -> Job: ...
    @overload
    async def move_keys(
        self, keys: Sequence[object], *, target: Target, retention_s: float | None = None, dry_run: Literal[True]
    ) -> Plan: ...
    async def move_keys(
        self, keys: Sequence[object], *, target: Target, retention_s: float | None = None, dry_run: bool = False
    ) -> Job | Plan:
        """Give some keys, such as one large tenant, to a shard; see `split`.

        Raises:
            InvalidShardKey: a value that cannot be a shard key.
        """
        encoded = [encode_key(key) for key in keys]

        def plan(parties: _Parties) -> Plan:
            token = hash_of(parties.topology.hash_function)
            return plan_move_keys(parties.topology, [token(key) for key in encoded], parties.targets[0])

        return await self._begin([target], plan, retention_s, dry_run)

    async def _begin(
        self,
        targets: Sequence[Target],
        plan: Callable[[_Parties], Plan],
        retention_s: float | None,
        dry_run: bool,
    ) -> Job | Plan:
        if retention_s is not None and not 0 <= retention_s <= 365 * 86400:
            raise InvalidArgument("retention_s", retention_s, "0 seconds to a year")
        topology = await self.topology()
        parties = _with_targets(topology, targets)
        planned = plan(parties)
        jobs = await asyncio.to_thread(self._jobs.all)
        _refuse_busy(jobs, [parties.topology.shard(s) for leg in planned.job_legs for s in (leg.source, leg.target)],
                     topology, moving=True)  # fmt: skip
        if dry_run:
            return planned
        for target, shard in zip(targets, parties.targets, strict=True):
            if "shard_id" not in target:
                made = await self.create_shard(
                    shard.name,
                    primary_endpoint=shard.primary.reveal(),
                    replicas=[replica.reveal() for replica in shard.replicas],
                    vnode_count=shard.vnode_count,
                )
                if made.id != shard.id:
                    return await self._begin(
                        [*({"shard_id": one.name} for one in parties.targets)], plan, retention_s, dry_run
                    )
        job = Job(
            id=0,
            kind=planned.kind,
            legs=planned.job_legs,
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            retention_s=retention_s,
        ).checked()
        _refuse_faults(await check_job(await self.topology(), job))
        return await asyncio.to_thread(self._jobs.create, job)

    async def list_jobs(self) -> list[Job]:
        """Every job, oldest first."""
        return await asyncio.to_thread(self._jobs.all)

    async def get_job(self, job_id: int) -> Job:
        """One job.

        Raises:
            InvalidTopology: there is none with this id.
        """
        return await asyncio.to_thread(self._jobs.load, _job_id(job_id))

    async def pause(self, job_id: int) -> Job:
        """Let a job stand still between two pieces of its work; streams go on, so that nothing piles up.

        Raises:
            InvalidTopology: no such job, or it is over.
        """
        return await self._ask(job_id, Wish.PAUSE, {status for status in Status if not status.over}, "it is over")

    async def resume(self, job_id: int) -> Job:
        """Let a paused job go on.

        Raises:
            InvalidTopology: no such job, or it is over.
        """
        return await self._ask(job_id, Wish.RUN, {status for status in Status if not status.over}, "it is over")

    async def cancel(self, job_id: int) -> Job:
        """Undo a job that has not switched: what was copied is deleted from the targets.

        Raises:
            InvalidTopology: no such job, it is over, or it has switched.
        """
        way_out = "it has switched already: `rollback` takes it back, `complete` ends it"
        return await self._ask(job_id, Wish.CANCEL, _BEFORE, way_out)

    async def rollback(self, job_id: int) -> Job:
        """Take a switched job back: the sources serve the ranges again, with all that was written since.

        Raises:
            InvalidTopology: no such job, it has not switched, or its old copies are being deleted.
        """
        way_out = "only a job in `validation` can: before it, `cancel`; after it, the old copies are being deleted"
        return await self._ask(job_id, Wish.ROLLBACK, {Status.VALIDATION}, way_out)

    async def complete(self, job_id: int) -> Job:
        """End the window in which a switched job can be rolled back: the old copies are deleted.

        Raises:
            InvalidTopology: no such job, or it has not switched.
        """
        return await self._ask(
            job_id, Wish.COMPLETE, {Status.VALIDATION}, "only a job in `validation` can be completed"
        )

    async def _ask(self, job_id: int, wish: Wish, allowed: set[Status] | frozenset[Status], way_out: str) -> Job:
        job = await self.get_job(job_id)
        if job.status not in allowed:
            raise InvalidTopology(f"job {job.id} is {job.status.value!r}, so it cannot {_VERBS[wish]}", way_out)
        await asyncio.to_thread(self._jobs.ask, job.id, wish)
        return job


_BEFORE: Final = frozenset({Status.PENDING, Status.PRECOPY, Status.DELTASYNC, Status.CUTOVER})
_VERBS: Final = {
    Wish.RUN: "be resumed",
    Wish.PAUSE: "be paused",
    Wish.CANCEL: "be cancelled",
    Wish.ROLLBACK: "be rolled back",
    Wish.COMPLETE: "be completed",
}


def _job_id(given: int | str) -> int:
    try:
        return int(given)
    except (TypeError, ValueError):
        raise InvalidArgument("job_id", given, "a job's number") from None


def _planned(topology: Topology, new: NewShard) -> Shard:
    """The shard that `new` becomes, if nothing of it is taken."""
    for shard in topology.shards:
        if shard.name == new.name:
            raise InvalidArgument("name", new.name, "another shard has it")
        for endpoint in (new.primary, *new.replicas):
            if any(_same_server(endpoint, known) for known in (shard.primary, *shard.replicas)):
                raise InvalidArgument("primary_endpoint", str(endpoint), f"it is a server of shard {shard.name!r}")
    return Shard(f"s{topology.next_shard}", new.name, new.primary, tuple(new.replicas), vnode_count=new.vnode_count)


def _same_server(one: Dsn, other: Dsn) -> bool:
    return (one.host, one.port, one.dbname) == (other.host, other.port, other.dbname)


def _with_targets(topology: Topology, targets: Sequence[Target]) -> _Parties:
    """The topology as it will be when the new ones among the targets are made, and the targets in it."""
    found: list[Shard] = []
    for target in targets:
        if not isinstance(target, Mapping):
            raise InvalidArgument("target", target, 'a mapping: {"shard_id": …} or {"name": …, "primary_endpoint": …}')
        unknown = set(target) - {"shard_id", "name", "primary_endpoint", "replicas", "vnode_count"}
        if unknown or ("shard_id" in target) == ("primary_endpoint" in target):
            raise InvalidArgument(
                "target",
                sorted(unknown or target),
                'either {"shard_id": …} or {"name": …, "primary_endpoint": …, "replicas": …, "vnode_count": …}',
            )
        if "shard_id" in target:
            found.append(topology.shard(target["shard_id"]))
            continue
        new = NewShard(
            target.get("name", ""),
            Dsn(target["primary_endpoint"]),
            [Dsn(text) for text in target.get("replicas", ())],
            target.get("vnode_count", 256),
        )
        shard = _planned(topology, new)
        topology = with_shard(topology, shard, nonce=uuid4().hex)
        found.append(shard)
    if len({shard.id for shard in found}) != len(found):
        raise InvalidArgument("targets", [shard.name for shard in found], "each shard once")
    return _Parties(topology, tuple(found))


def _refuse_busy(jobs: Sequence[Job], shards: Sequence[Shard], topology: Topology, *, moving: bool = False) -> None:
    """No job that is not over works on any of these; and what is not moving owns nothing."""
    for job in jobs:
        for shard in shards:
            if not job.status.over and shard.id in job.shards:
                raise InvalidTopology(
                    f"shard {shard.name!r} takes part in job {job.id}, which is {job.status.value!r}",
                    "wait for it, complete it, cancel it or roll it back",
                )
    for shard in () if moving else shards:
        if shard.id in topology.ring.shard_ids:
            raise InvalidTopology(f"shard {shard.name!r} owns ranges", "drain it first")


def _refuse_faults(faults: Sequence[Fault]) -> None:
    """Everything that stands in the way, in one error."""
    if found := [fault for fault in faults if not fault.note]:
        raise InvalidTopology(
            "; ".join(f"{fault.where}: {fault.problem}" for fault in found),
            "; ".join(dict.fromkeys(fault.way_out for fault in found)),
        )


def _free(connection: Any, topology: Topology) -> None:
    """Take out what a `create_shard` of this cluster that came to nothing has left in the database."""
    row = connection.execute("SELECT to_regclass('shardlib.control') IS NOT NULL").fetchone()
    if row is None or not row[0]:
        return
    cluster_id, shard_id = connection.execute("SELECT cluster_id, shard_id FROM shardlib.control").fetchone()
    if cluster_id != topology.cluster_id:
        return  # `install` says whose it is
    if any(shard.id == shard_id for shard in topology.shards):
        raise InvalidArgument("primary_endpoint", shard_id, "this database is that shard already")
    connection.execute("DROP SCHEMA shardlib CASCADE")


def _app_roles(topology: Topology) -> tuple[str, ...]:
    """The applications' roles, as the first shard that answers has them."""
    for shard in topology.shards:
        with reached(shard, _CONNECT_S) as connection:
            row = connection.execute("SELECT app_roles FROM shardlib.control").fetchone()
            if row is not None:
                return tuple(row[0])
    return ()
