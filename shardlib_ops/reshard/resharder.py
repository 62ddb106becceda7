"""Runs jobs: takes a job's lease, gives the job a world, and drives it until it rests."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from os import getpid
from types import TracebackType
from typing import Final, Self

from shardlib.catalog import Catalog, Conflict, Lease, open_catalog
from shardlib.errors import CatalogUnavailable, InvalidArgument, InvalidTopology
from shardlib_ops.reshard.cutover import Limits
from shardlib_ops.reshard.job import Job, Status
from shardlib_ops.reshard.orphan import end_without, gone
from shardlib_ops.reshard.progress import JobProgress, Observer, metrics_text, reported
from shardlib_ops.reshard.runner import JobRunner
from shardlib_ops.reshard.servers import Servers
from shardlib_ops.reshard.store import JobStore
from shardlib_ops.reshard.stream import MAX_SLOT_WAL
from shardlib_ops.reshard.world import Lost, Superseded

__all__ = ["Resharder"]

_log = logging.getLogger("shardlib.reshard")
_LEASE_WAIT_S: Final = 1.0
_LOOK_S: Final = 1.0
_BACK_OFF_S: Final = (0.2, 0.5, 1.0, 3.0)
_BROKEN_S: Final = (1.0, 3.0, 10.0, 30.0)
_TOLD_MAX: Final = 100
_PHASES: Final = frozenset(status.value for status in Status if not status.over)


async def _unheard(step: str) -> None:
    """The step callback of who does not want to know."""


def _say_rests(job: Job) -> None:
    """The last line of a job in the log of the resharder that has run it."""
    level = logging.WARNING if job.status is Status.FAILED else logging.INFO
    what = "over" if job.status.over else "at rest"
    _log.log(level, "job %d: %s, %s%s", job.id, what, job.status.value, f": {job.error}" if job.error else "")


def _note(job_id: int, store: JobStore, lease: Lease, error: Exception) -> None:
    """Write into a job's record what has broken its runner, if that can be done now; the log tells it in any case."""
    with suppress(CatalogUnavailable, Conflict, InvalidTopology):
        job = store.load(job_id)
        if not job.status.over and job.outcome is not Status.FAILED:  # why it failed stays there
            told = str(error) if isinstance(error, InvalidTopology) else f"{type(error).__name__}: {error}"
            store.save(job.changed(error=f"its runner has broken off, and tries again: {told}"), lease)


class Resharder:
    """Runs resharding jobs of one cluster. Any number of resharders may run: each job has one runner at a time.

    Args:
        url: the catalog, such as `etcd://127.0.0.1:2379/shop`.
        limits: of the cutover: how long the moving ranges may be closed, and when to try.
        workers: connections that copy rows side by side, for each leg.
        purge_rows_per_s: rows that the cleanup deletes in a second, at most.
        max_slot_wal: bytes of WAL that a server may keep for a slot of a job. A job whose slot keeps more is undone
            before the switch, and gives up its way back after it, rather than fill the disk. None: any number.
        lease_ttl_s: seconds after which a runner that does not answer is replaced, 2 to 120.
        on_step: awaited with the name of each step of a job when it is done.
        on_progress: called about once a second, for each job that runs, with how far it is; must be quick.
        trend_s: seconds for which the writers have to outrun a stream before that is told and logged.
    """

    def __init__(
        self,
        url: str,
        *,
        limits: Limits | None = None,
        workers: int = 2,
        purge_rows_per_s: int = 20_000,
        max_slot_wal: int | None = MAX_SLOT_WAL,
        lease_ttl_s: float = 10.0,
        on_step: Callable[[str], Awaitable[None]] | None = None,
        on_progress: Callable[[JobProgress], None] | None = None,
        trend_s: float = 60.0,
    ) -> None:
        if max_slot_wal is not None and max_slot_wal < 1:
            raise InvalidArgument("max_slot_wal", max_slot_wal, "bytes, at least 1, or None for any number")
        self._catalog: Catalog = open_catalog(url)
        self._limits = limits or Limits()
        self._workers, self._purge_rows_per_s, self._lease_ttl_s = workers, purge_rows_per_s, lease_ttl_s
        self._max_slot_wal = max_slot_wal
        self._step = on_step or _unheard
        self._on_progress = on_progress
        self._trend_s = trend_s
        self._progress: dict[int, JobProgress] = {}
        self._holder = f"{socket.gethostname()}/{getpid()}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give leases up and close the catalog; idempotent."""
        await asyncio.to_thread(self._catalog.close)

    def metrics(self) -> str:
        """How far the jobs are that this resharder runs, or ran last, in Prometheus' text format.

        What is not known is left out. It waits for nothing, and may be called from any thread.
        """
        return metrics_text(list(self._progress.values()))

    def _tell(self, progress: JobProgress) -> None:
        self._progress.pop(progress.job, None)
        self._progress[progress.job] = progress
        if len(self._progress) > _TOLD_MAX:
            del self._progress[next(iter(self._progress))]
        if self._on_progress is not None:
            self._on_progress(progress)

    async def run(self, job_id: int, *, complete: bool = False) -> Job:
        """Run a job until it rests: it is over, or waits in `validation` for `complete` or `rollback`.

        While another runner has the job, this one waits and takes over when that one is gone. Servers and a catalog
        that are away are waited for.

        Args:
            job_id: which job.
            complete: do not rest in `validation`, complete at once.

        Raises:
            InvalidTopology: there is no such job.
        """
        return await self._run(job_id, complete=complete, stay=False)

    async def serve(self) -> None:
        """Take whatever job is open, side by side, until cancelled.

        Jobs in `validation` are kept in step until the operator decides or their retention is over.
        """
        running: dict[int, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                running = {job_id: task for job_id, task in running.items() if not task.done()}
                try:
                    jobs = await asyncio.to_thread(JobStore(self._catalog).open)
                except CatalogUnavailable as error:
                    _log.warning("the jobs cannot be listed now: %s", error)
                    jobs = []
                for job_id in jobs:
                    if job_id not in running:
                        running[job_id] = group.create_task(self._keep_running(job_id))
                await asyncio.sleep(_LOOK_S * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def _keep_running(self, job_id: int) -> None:
        """Run a job, and again after whatever has broken its runner: the other jobs go on meanwhile."""
        failures = 0
        while True:
            try:
                await self._run(job_id, complete=False, stay=True)
            except Exception as error:  # noqa: BLE001 - it is told, and the same is tried again
                pause_s = _BROKEN_S[min(failures, len(_BROKEN_S) - 1)] * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
                failures += 1
                # What is wrong with a record or a topology is said by its message; the rest is not expected here.
                told = str(error) if isinstance(error, InvalidTopology) else "".join(traceback.format_exception(error))
                _log.error("job %d has broken off and is tried again in %.0f s: %s", job_id, pause_s, told)
                await asyncio.sleep(pause_s)
            else:
                return

    async def _run(self, job_id: int, *, complete: bool, stay: bool) -> Job:
        failures = 0
        while True:
            try:
                job = await asyncio.to_thread(JobStore(self._catalog).load, job_id)
                if job.status.over:
                    return job
                lease = await asyncio.to_thread(
                    self._catalog.acquire,
                    f"job-{job_id}",
                    ttl_s=self._lease_ttl_s,
                    holder=self._holder,
                    wait_s=_LEASE_WAIT_S,
                )
                if lease is None:
                    continue
                try:
                    return await self._drive(job_id, lease, complete=complete, stay=stay)
                finally:
                    await asyncio.to_thread(lease.release)
            except (CatalogUnavailable, Superseded, Lost) as error:
                _log.warning("job %d: %s", job_id, error)
                pause_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)]
                failures += 1
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter

    async def _drive(self, job_id: int, lease: Lease, *, complete: bool, stay: bool) -> Job:
        store = JobStore(self._catalog)
        try:
            return await self._drive_held(job_id, store, lease, complete=complete, stay=stay)
        except (CatalogUnavailable, Superseded, Lost):
            raise
        except Exception as error:
            if stay:  # else the caller hears of it
                await asyncio.to_thread(_note, job_id, store, lease, error)
            raise

    async def _drive_held(self, job_id: int, store: JobStore, lease: Lease, *, complete: bool, stay: bool) -> Job:
        job = await asyncio.to_thread(store.load, job_id)  # as it is now that nobody else writes it
        topology = await asyncio.to_thread(self._catalog.load)
        if job.status is Status.PENDING and gone(job, topology):
            ended = await end_without(job, topology, lease, await asyncio.to_thread(store.wish, job_id))
            await asyncio.to_thread(store.save, ended, lease)
            if not ended.status.over:
                raise Lost(ended.error)
            _say_rests(ended)
            return ended
        world = Servers(
            self._catalog,
            lease,
            job,
            topology,
            store=store,
            workers=self._workers,
            purge_rows_per_s=self._purge_rows_per_s,
            max_slot_wal=self._max_slot_wal,
            trend_s=self._trend_s,
        )
        beside = JobStore(self._catalog)  # of its own: it is written from another thread than the record
        observer = Observer(job, lambda: world.latest, world.progress)
        try:
            with suppress(InvalidTopology):  # of another version, say: a job does not fail for its figures
                world.progress.goes_on(await asyncio.to_thread(beside.progress, job_id))
            runner = JobRunner(world, job, limits=self._limits, complete=complete, stay=stay, step=self._told(job_id))
            _log.info("job %d (%s): taken, it is in %s", job_id, job.kind.value, job.status.value)
            async with reported(
                world.progress, observer, lambda one: beside.save_progress(one, lease), on_progress=self._tell
            ):
                job = await runner.go()
            _say_rests(job)
            return job
        finally:
            await world.close()

    def _told(self, job_id: int) -> Callable[[str], Awaitable[None]]:
        async def told(step: str) -> None:
            _log.debug("job %d: %s", job_id, step)
            if (status := step.removeprefix("status_")) in _PHASES:
                _log.info("job %d: now in %s", job_id, status)
            await self._step(step)

        return told
