"""The manager for scripts, and what its blocking twin has in common with others: coroutines, run to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from shardlib.errors import UnsupportedOperation
from shardlib.topology import Shard, Topology
from shardlib_ops.manager.base import Base
from shardlib_ops.reshard.job import Job

if TYPE_CHECKING:
    from shardlib_ops.manager.manager import Manager, Target  # noqa: F401 - of `Blocking["Manager"]`
    from shardlib_ops.manager.promote import Promotion, Rejoin
    from shardlib_ops.manager.promotions import Told
    from shardlib_ops.reshard.check import Fault
    from shardlib_ops.reshard.plan import Plan

__all__ = ["Blocking", "BlockingManager"]

T = TypeVar("T")
M = TypeVar("M", bound=Base)


class Blocking(Generic[M]):
    """What every blocking twin does: it owns a manager, and an event loop to run its coroutines in.

    Args:
        manager: closed with it.
    """

    def __init__(self, manager: M) -> None:
        self._manager = manager
        self._runner: asyncio.Runner | None = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        if self._runner is None:
            call.close()
            raise UnsupportedOperation("a manager that was closed", "make another one")
        return self._runner.run(call)

    def close(self) -> None:
        """Close the catalog; idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            with runner:
                runner.run(self._manager.close())

    def topology(self) -> Topology:
        """The topology as it is now."""
        return self._run(self._manager.topology())


class BlockingManager(Blocking["Manager"]):
    """`Manager`, without `await`: `Manager.sync(url)` makes one. Arguments, answers and errors are those of `Manager`.

    Use it as a context manager, or `close()` it. Not for code that runs in an event loop.
    """

    def list_shards(self) -> list[Shard]:
        """As `Manager.list_shards`."""
        return self._run(self._manager.list_shards())

    def get_shard(self, shard: str) -> Shard:
        """As `Manager.get_shard`."""
        return self._run(self._manager.get_shard(shard))

    def create_shard(
        self, name: str, *, primary_endpoint: str, replicas: Sequence[str] = (), vnode_count: int = 256
    ) -> Shard:
        """As `Manager.create_shard`."""
        return self._run(
            self._manager.create_shard(
                name, primary_endpoint=primary_endpoint, replicas=replicas, vnode_count=vnode_count
            )
        )

    def delete_shard(self, shard: str) -> None:
        """As `Manager.delete_shard`."""
        self._run(self._manager.delete_shard(shard))

    def promote_replica(
        self,
        shard: str,
        replica_endpoint: str | None = None,
        *,
        budget_s: float = 5.0,
        max_lag_bytes: int = 16 * 2**20,
        rejoin: Rejoin | None = None,
        on_step: Told | None = None,
        lease_ttl_s: float = 10.0,
    ) -> Shard:
        """As `Manager.promote_replica`; `rejoin` and `on_step` are coroutine functions here too."""
        return self._run(
            self._manager.promote_replica(
                shard,
                replica_endpoint,
                budget_s=budget_s,
                max_lag_bytes=max_lag_bytes,
                rejoin=rejoin,
                on_step=on_step,
                lease_ttl_s=lease_ttl_s,
            )
        )

    def check_promotion(
        self, shard: str, replica_endpoint: str | None = None, *, max_lag_bytes: int = 16 * 2**20
    ) -> list[Fault]:
        """As `Manager.check_promotion`."""
        return self._run(self._manager.check_promotion(shard, replica_endpoint, max_lag_bytes=max_lag_bytes))

    def resume_promotion(self, shard: str, *, rejoin: Rejoin | None = None, on_step: Told | None = None) -> Promotion:
        """As `Manager.resume_promotion`."""
        return self._run(self._manager.resume_promotion(shard, rejoin=rejoin, on_step=on_step))

    def get_promotion(self, shard: str) -> Promotion | None:
        """As `Manager.get_promotion`."""
        return self._run(self._manager.get_promotion(shard))

    def add_replica(self, shard: str, endpoint: str) -> Shard:
        """As `Manager.add_replica`."""
        return self._run(self._manager.add_replica(shard, endpoint))

    def remove_replica(self, shard: str, endpoint: str) -> Shard:
        """As `Manager.remove_replica`."""
        return self._run(self._manager.remove_replica(shard, endpoint))

    def split(
        self, source: str, *, targets: Sequence[Target], keep: int | None = None, retention_s: float | None = None
    ) -> Job:
        """As `Manager.split`."""
        return self._run(self._manager.split(source, targets=targets, keep=keep, retention_s=retention_s))

    def merge(self, sources: Sequence[str], *, target: Target, retention_s: float | None = None) -> Job:
        """As `Manager.merge`."""
        return self._run(self._manager.merge(sources, target=target, retention_s=retention_s))

    def rebalance(self, *, target: Target, retention_s: float | None = None) -> Job:
        """As `Manager.rebalance`."""
        return self._run(self._manager.rebalance(target=target, retention_s=retention_s))

    def drain(self, shard: str, *, retention_s: float | None = None) -> Job:
        """As `Manager.drain`."""
        return self._run(self._manager.drain(shard, retention_s=retention_s))

    def move_keys(self, keys: Sequence[object], *, target: Target, retention_s: float | None = None) -> Job:
        """As `Manager.move_keys`."""
        return self._run(self._manager.move_keys(keys, target=target, retention_s=retention_s))

    def keys_without_rows(self, keys: Sequence[object]) -> list[object]:
        """As `Manager.keys_without_rows`."""
        return self._run(self._manager.keys_without_rows(keys))

    def plan(self, kind: str, **arguments: Any) -> Plan:
        """The plan of a job: the method `kind` of `Manager` with `dry_run=True`, as in `plan("drain", shard="a")`."""
        planned: Plan = self._run(getattr(self._manager, kind)(**arguments, dry_run=True))
        return planned

    def list_jobs(self) -> list[Job]:
        """As `Manager.list_jobs`."""
        return self._run(self._manager.list_jobs())

    def get_job(self, job_id: int) -> Job:
        """As `Manager.get_job`."""
        return self._run(self._manager.get_job(job_id))

    def pause(self, job_id: int) -> Job:
        """As `Manager.pause`."""
        return self._run(self._manager.pause(job_id))

    def resume(self, job_id: int) -> Job:
        """As `Manager.resume`."""
        return self._run(self._manager.resume(job_id))

    def cancel(self, job_id: int) -> Job:
        """As `Manager.cancel`."""
        return self._run(self._manager.cancel(job_id))

    def rollback(self, job_id: int) -> Job:
        """As `Manager.rollback`."""
        return self._run(self._manager.rollback(job_id))

    def complete(self, job_id: int) -> Job:
        """As `Manager.complete`."""
        return self._run(self._manager.complete(job_id))
