"""The calls that make resharding jobs, show them and steer them."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response

from shardlib_ops.api.answers import JobAnswer, JobPage, PlanAnswer, tag_of
from shardlib_ops.api.job_changes import MakeJob, SteerJob
from shardlib_ops.api.models import DrainBody, MergeBody, MoveKeysBody, RebalanceBody, SplitBody, Steps
from shardlib_ops.api.requests import (
    PAGE_DEFAULT,
    PREFIX,
    Cursor,
    IfNoneMatch,
    JobId,
    Key,
    PageSize,
    Services,
    json_answer,
    page,
    problems,
)
from shardlib_ops.api.shard_routes import check_limit
from shardlib_ops.auth import Identity, Role
from shardlib_ops.reshard.job import Status
from shardlib_ops.serving.identity import ATTRIBUTE, Guard, needs
from shardlib_ops.serving.problem import problem
from shardlib_ops.serving.requests import request_info

__all__ = ["job_routes"]

WAIT_MAX_S: Final = 60
_LOOK_S: Final = 0.5
_MORE_S: Final = 15.0
_MAKE_S: Final = 120.0


def job_routes(services: Services) -> APIRouter:
    """The router of resharding jobs."""
    router = APIRouter(prefix=f"{PREFIX}/reshard", tags=["resharding"])
    _planners(router, services)
    _looks(router, services)
    _steps(router, services)
    return router


def _planners(router: APIRouter, services: Services) -> None:
    planned: dict[int | str, dict[str, Any]] = {
        200: {"model": PlanAnswer, "description": "The plan, for `dry_run`: nothing is changed"},
        **problems("not-found", "conflict", "body-too-large", "unsupported-media-type"),
    }

    async def make(
        request: Request, body: SplitBody | MergeBody | RebalanceBody | DrainBody | MoveKeysBody, key: str | None
    ) -> Response:
        # The job itself runs elsewhere. Its servers are looked at before it is made, each with limits of its own.
        request_info(request.scope).allow(_MAKE_S)
        return await services.change(request, MakeJob(services.cluster, body), key=key, body=body)

    more: dict[str, Any] = {"status_code": 202, "response_model": JobAnswer, "responses": planned}

    @router.post("/split", operation_id="splitShard", summary="Give a part of a shard's ranges to others", **more)
    async def split(
        request: Request,
        body: SplitBody,
        identity: Annotated[Identity, Depends(needs(Role.ADMIN, action="reshard.split"))],
        key: Key = None,
    ) -> Response:
        """The targets are shards there are, or are made. A resharder runs the job; this call does not wait for it."""
        return await make(request, body, key)

    @router.post("/merge", operation_id="mergeShards", summary="Give all that some shards own to one", **more)
    async def merge(
        request: Request,
        body: MergeBody,
        identity: Annotated[Identity, Depends(needs(Role.ADMIN, action="reshard.merge"))],
        key: Key = None,
    ) -> Response:
        """See `split`."""
        return await make(request, body, key)

    @router.post("/rebalance", operation_id="rebalance", summary="Give a shard its fair part of everything", **more)
    async def rebalance(
        request: Request,
        body: RebalanceBody,
        identity: Annotated[Identity, Depends(needs(Role.ADMIN, action="reshard.rebalance"))],
        key: Key = None,
    ) -> Response:
        """The shard owns nothing before. See `split`."""
        return await make(request, body, key)

    @router.post("/drain", operation_id="drainShard", summary="Give all that a shard owns to the others", **more)
    async def drain(
        request: Request,
        body: DrainBody,
        identity: Annotated[Identity, Depends(needs(Role.ADMIN, action="reshard.drain"))],
        key: Key = None,
    ) -> Response:
        """Then it can be deleted. See `split`."""
        return await make(request, body, key)

    @router.post("/move-keys", operation_id="moveKeys", summary="Give some keys to a shard", **more)
    async def move_keys(
        request: Request,
        body: MoveKeysBody,
        identity: Annotated[Identity, Depends(needs(Role.ADMIN, action="reshard.move_keys"))],
        key: Key = None,
    ) -> Response:
        """Such as one large tenant. The notes of a dry run name the keys that have no rows. See `split`."""
        return await make(request, body, key)


def _looks(router: APIRouter, services: Services) -> None:
    @router.get(
        "/jobs",
        operation_id="listJobs",
        summary="List jobs",
        response_model=JobPage,
        responses={**problems(), 304: {"description": "Nothing has changed"}},
    )
    async def list_(
        identity: Annotated[Identity, Depends(needs(Role.VIEWER, action="job.list"))],
        limit: PageSize = PAGE_DEFAULT,
        cursor: Cursor = None,
        status: Annotated[list[Status] | None, Query(max_length=len(Status), description="only of these")] = None,
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """Oldest first."""
        check_limit(limit, services.page_max)
        jobs = [job for job in await services.cluster.manager.list_jobs() if status is None or job.status in status]
        shown, following = page(jobs, [job.id for job in jobs], limit, cursor)
        topology = await services.cluster.manager.topology()
        items = await asyncio.gather(*(services.cluster.job(job, topology) for job in shown))
        return json_answer(JobPage(items=items, next_cursor=following), if_none_match)

    @router.get(
        "/jobs/{job_id}",
        operation_id="getJob",
        summary="Show a job, or wait until it changes",
        response_model=JobAnswer,
        responses={**problems("not-found"), 304: {"description": "Nothing has changed"}},
    )
    async def get(
        request: Request,
        job_id: JobId,
        identity: Annotated[Identity, Depends(needs(Role.VIEWER, action="job.get"))],
        wait_s: Annotated[
            float,
            Query(
                ge=0, le=WAIT_MAX_S, allow_inf_nan=False, description="with `If-None-Match`: seconds to wait at most"
            ),
        ] = 0,
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """With `If-None-Match` and `wait_s` the answer comes when the job is not any more what the caller has seen.

        Repeat it with the `ETag` of each answer to follow a job: 200 tells the change, 304 that there was none. The
        wait ends when the caller's token does.
        """
        guard = getattr(request.app.state, ATTRIBUTE)
        if not isinstance(guard, Guard):
            raise problem("internal")
        seen = () if if_none_match is None else tuple(each.strip() for each in if_none_match.split(","))
        until = time.monotonic() + min(wait_s, max(0.0, identity.expires_at - time.time()))
        if wait_s:
            request_info(request.scope).allow(wait_s + _MORE_S)
        while True:
            found = await services.cluster.job(await services.cluster.manager.get_job(job_id))
            left = until - time.monotonic()
            if left <= 0 or tag_of(found) not in seen:
                return json_answer(found, if_none_match)
            await asyncio.sleep(min(_LOOK_S, left))
            if not await guard.still_valid(identity):
                raise problem("unauthenticated", headers={"WWW-Authenticate": "Bearer"})


def _steps(router: APIRouter, services: Services) -> None:
    told: dict[Steps, tuple[str, str]] = {
        "pause": ("Let a job stand still", "Streams go on. Its record says `paused` when it does."),
        "resume": ("Let a paused job go on", "Of one that is not paused it withdraws what has not happened yet."),
        "cancel": ("Undo a job that has not switched", "What was copied is deleted from the targets."),
        "rollback": ("Take a switched job back", "The sources serve again, with all that was written since."),
        "complete": ("Delete the old copies of a switched job", "There is no rollback from then on."),
    }
    for step, (summary, text) in told.items():
        _step(router, services, step, summary, text)


def _step(router: APIRouter, services: Services, step: Steps, summary: str, text: str) -> None:
    @router.post(
        f"/jobs/{{job_id}}/{step}",
        operation_id=f"{step}Job",
        summary=summary,
        description=f"{text} The job's runner does it within seconds; `asked` tells what was asked last.",
        response_model=JobAnswer,
        responses=problems("not-found", "conflict"),
    )
    async def steer(
        request: Request,
        job_id: JobId,
        # Not in the annotation, which is looked up where `step` is not known.
        identity: Identity = Depends(needs(Role.ADMIN, action=f"job.{step}")),  # noqa: B008
        key: Key = None,
    ) -> Response:
        return await services.change(request, SteerJob(services.cluster, job_id, step), key=key)
