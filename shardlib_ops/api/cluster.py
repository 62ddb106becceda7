"""The cluster as the API sees it: its manager, and what is looked up beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shardlib.catalog import Catalog
from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument
from shardlib.topology import Topology
from shardlib_ops.api.answers import JobAnswer, job_answer
from shardlib_ops.manager.manager import Manager
from shardlib_ops.manager.passwords import kept
from shardlib_ops.reshard.job import Job, Wish
from shardlib_ops.reshard.progress.model import JobProgress
from shardlib_ops.reshard.store import JobStore
from shardlib_ops.settings import EndpointSettings
from shardlib_ops.settings.endpoints import allowed_endpoint_async

__all__ = ["Cluster"]


class Cluster:
    """What the calls work on.

    Args:
        manager: makes the changes.
        catalog: of the same cluster.
        endpoints: which servers a caller may name.
    """

    def __init__(self, manager: Manager, catalog: Catalog, endpoints: EndpointSettings) -> None:
        self.manager, self.catalog = manager, catalog
        self._jobs, self._endpoints = JobStore(catalog), endpoints

    async def check_endpoints(self, named: Sequence[tuple[str, str]]) -> None:
        """Refuse endpoints that lead where no caller may lead this process.

        Args:
            named: the place of each in the body, and its text.

        Raises:
            InvalidArgument: one is not allowed; `name` is its place.
        """
        for place, text in named:
            try:
                await allowed_endpoint_async(text, self._endpoints)
                if self._endpoints.plain_passwords == "refuse":
                    kept(Dsn(text), "refuse")
            except InvalidArgument as error:
                raise InvalidArgument(place, error.value, error.allowed) from None

    async def job(self, job: Job, topology: Topology | None = None) -> JobAnswer:
        """A job with all that is known of it."""
        if topology is None:
            topology = await self.manager.topology()
        wish, progress = await asyncio.to_thread(self._beside, job)
        return job_answer(topology, job, wish, progress)

    def _beside(self, job: Job) -> tuple[Wish, JobProgress | None]:
        wish = Wish.RUN if job.status.over else self._jobs.wish(job.id)
        return wish, self._jobs.progress(job.id)

    def progress(self, job: Job) -> JobProgress | None:
        """How far a job was when its runner wrote that down last. Blocks."""
        return self._jobs.progress(job.id)

    async def wish(self, job_id: int) -> tuple[Wish, int | None]:
        """What was asked of a job last, and the revision of that."""
        return await asyncio.to_thread(self._wish, job_id)

    def _wish(self, job_id: int) -> tuple[Wish, int | None]:
        found = self.catalog.read_document(f"wishes/{job_id:d}")
        return self._jobs.wish(job_id), None if found is None else found.revision
