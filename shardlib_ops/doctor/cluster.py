"""What the catalog alone tells: whether it answers, and what was begun and not brought to an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit, urlunsplit

from shardlib.catalog import Catalog, open_catalog
from shardlib.errors import CatalogUnavailable, InvalidArgument, ShardlibError
from shardlib_ops.doctor.finding import Finding, Limits, Severity
from shardlib_ops.doctor.view import View, age_s
from shardlib_ops.reshard.job import Job, Status

__all__ = ["catalog_findings", "cluster_findings", "members_of"]

_MEMBER_S = 3.0


async def catalog_findings(catalog: Catalog, url: str, limits: Limits) -> list[Finding]:
    """Whether the catalog answers soon, and each of its members does.

    Raises:
        CatalogUnavailable: it does not answer at all.
    """
    began = time.monotonic()
    version = await asyncio.to_thread(catalog.version)
    took_s = time.monotonic() - began
    found = []
    if took_s > limits.catalog_s:
        found.append(
            Finding(
                Severity.WARNING,
                "catalog",
                "catalog",
                f"one small read took {took_s:.1f} s",
                "look at the disks and the network of its members; clients route without it, and learn of changes late",
            )
        )
    members = members_of(url)
    if len(members) > 1:
        answers = await asyncio.gather(*(asyncio.to_thread(_member, member, version) for _, member in members))
        for (name, _), wrong in zip(members, answers, strict=True):
            if wrong is not None:
                found.append(
                    Finding(
                        Severity.ERROR,
                        "members",
                        f"catalog member {name}",
                        wrong,
                        "start it again, or take it out of the URL; without a majority nothing can be changed",
                    )
                )
    return found


def members_of(url: str) -> list[tuple[str, str]]:
    """Name, and a URL that leads to it alone, of each server that a catalog's URL lists."""
    parts = urlsplit(url)
    login, at, hosts = parts.netloc.rpartition("@")
    return [(host, urlunsplit(parts._replace(netloc=f"{login}{at}{host}"))) for host in hosts.split(",") if host]


def _member(url: str, version: int | None) -> str | None:
    """What is wrong with one server of the catalog."""
    try:
        with closing(open_catalog(url, timeout_s=_MEMBER_S)) as alone:
            found = alone.version()
    except CatalogUnavailable as error:
        return f"it does not answer: {error}"
    except (InvalidArgument, ShardlibError) as error:
        return str(error)
    if version is not None and (found is None or found < version):
        return f"it holds version {found} of the topology, and the catalog {version}"
    return None


def cluster_findings(view: View) -> Iterator[Finding]:
    """What stands open in the catalog. Pure, but for the clock."""
    for job in view.jobs:
        yield from _job(view, job)
    for promotion in view.promotions.values():
        if age_s(promotion.started_at) > view.limits.quiet_s:
            yield Finding(
                Severity.ERROR,
                "promotions",
                f"shard {promotion.name!r}",
                f"its promotion stands at {promotion.stage.value!r} since {promotion.started_at}",
                f"`shard promote {promotion.name} --resume` brings it to an end",
            )
    change = view.change
    if change is not None and change.open and (change.failed or age_s(change.began_at) > view.limits.quiet_s):
        yield Finding(
            Severity.WARNING,
            "schema",
            "catalog",
            f"{change}" + (f": {change.error}" if change.error else ""),
            "`schema status` tells where the shards are, and `schema apply` goes on",
        )


def _job(view: View, job: Job) -> Iterator[Finding]:
    where, limits = f"job {job.id}", view.limits
    if job.status is Status.FAILED and age_s(job.completed_at) < limits.failed_s:
        yield Finding(
            Severity.WARNING, "jobs", where, f"it has failed: {job.error}", "nothing has moved; mend that, make it anew"
        )
    if job.status.over:
        return
    if job.paused:
        yield Finding(
            Severity.WARNING,
            "jobs",
            where,
            f"it is paused in {job.status.value!r}; its slots keep WAL meanwhile",
            f"`reshard resume {job.id}` or `reshard cancel {job.id}`",
        )
        return
    worked = view.worked_at.get(job.id)
    if min(age_s(worked), age_s(job.started_at), age_s(job.created_at)) > limits.quiet_s:
        since = f"since {worked}" if worked else "so far"
        yield Finding(
            Severity.WARNING,
            "jobs",
            where,
            f"nobody has worked on it {since}; it is {job.status.value!r}",
            f"`resharder run`, or `resharder run {job.id}`; its slots keep WAL meanwhile",
        )
    elif job.error:
        yield Finding(Severity.WARNING, "jobs", where, f"it waits: {job.error}", f"`reshard show {job.id}`")
