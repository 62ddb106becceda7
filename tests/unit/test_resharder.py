"""A resharder that serves: a job that breaks its runner is told of and tried again, and the others go on."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing

import pytest

from shardlib.catalog import Catalog, open_catalog
from shardlib.ring import TokenRange
from shardlib_ops.reshard.job import Job, Kind, legs_of
from shardlib_ops.reshard.resharder import Resharder
from shardlib_ops.reshard.store import JobStore
from tests.support.topologies import make_topology


def _job(source: str) -> Job:
    return Job(1, Kind.SPLIT, legs_of([(source, "s2", [TokenRange(0, 9)])]))


async def _noted(catalog: Catalog, job_id: int) -> str:
    async with asyncio.timeout(20):
        while (error := (await asyncio.to_thread(JobStore(catalog).load, job_id)).error) is None:  # noqa: ASYNC110 - told by nobody
            await asyncio.sleep(0.05)
    return error


async def test_a_job_that_cannot_run_is_noted_and_does_not_keep_others_from_running(
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = "memory://resharder-breaks"
    with closing(open_catalog(url)) as catalog:
        catalog.publish(make_topology(), expected=None)
        catalog.write_document("jobs/1", b"damaged", expected=None)
        first = JobStore(catalog).create(_job("gone"))
        async with Resharder(url) as resharder:
            serving = asyncio.create_task(resharder.serve())
            try:
                with caplog.at_level(logging.ERROR, "shardlib.reshard"):
                    assert "gone" in await _noted(catalog, first.id)
                    second = JobStore(catalog).create(_job("lost"))
                    assert "lost" in await _noted(catalog, second.id)
                assert not serving.done()
            finally:
                serving.cancel()
                await asyncio.wait([serving])
    assert "job 1 has broken off" in caplog.text
    assert "cannot be read" in caplog.text
