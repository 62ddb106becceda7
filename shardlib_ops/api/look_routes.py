"""The calls that only look: the ring, the last promotion of a shard, how far a job is in all its parts."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Response

from shardlib_ops.api.answers import ProgressAnswer, PromotionAnswer, RingAnswer
from shardlib_ops.api.requests import PREFIX, IfNoneMatch, JobId, Services, ShardId, json_answer, problems
from shardlib_ops.auth import Identity, Role
from shardlib_ops.manager.ring import ring_view
from shardlib_ops.serving.identity import needs
from shardlib_ops.serving.problem import problem

__all__ = ["look_routes"]


def look_routes(services: Services) -> APIRouter:
    """The router of what is looked at beside shards and jobs."""
    router = APIRouter(prefix=PREFIX)
    unchanged: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing has changed"}}

    @router.get(
        "/ring",
        operation_id="getRing",
        summary="Show who owns how much of the ring, and what is moving",
        tags=["shards"],
        response_model=RingAnswer,
        responses={**problems(), **unchanged},
    )
    async def ring(
        identity: Annotated[Identity, Depends(needs(Role.VIEWER, action="ring.get"))],
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """Tokens are written in 16 hexadecimal digits."""
        found = ring_view(await services.cluster.manager.topology())
        return json_answer(RingAnswer.model_validate(msgspec.to_builtins(found)), if_none_match)

    @router.get(
        "/shards/{shard_id}/promotion",
        operation_id="getPromotion",
        summary="Show the last promotion of a shard",
        tags=["shards"],
        response_model=PromotionAnswer,
        responses={**problems("not-found"), **unchanged},
    )
    async def promotion(
        shard_id: ShardId,
        identity: Annotated[Identity, Depends(needs(Role.VIEWER, action="shard.promotion"))],
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """404 if there was none."""
        record = await services.cluster.manager.get_promotion(shard_id)
        if record is None:
            raise problem("not-found", f"there is no promotion of shard {shard_id!r}; `promote` begins one")
        answer = PromotionAnswer(
            id=record.shard,
            name=record.name,
            stage=record.stage.value,
            old=record.old.safe(),
            new=record.new.safe(),
            pause_s=record.pause_s,
            error=record.error,
        )
        return json_answer(answer, if_none_match)

    @router.get(
        "/reshard/jobs/{job_id}/progress",
        operation_id="getProgress",
        summary="Show how far a job is in each of its parts",
        tags=["resharding"],
        response_model=ProgressAnswer,
        responses={**problems("not-found"), **unchanged},
    )
    async def progress(
        job_id: JobId,
        identity: Annotated[Identity, Depends(needs(Role.VIEWER, action="job.progress"))],
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """As its runner wrote it down last: each table, each stream, and what stands in the way of the switch."""
        job = await services.cluster.manager.get_job(job_id)
        found = await asyncio.to_thread(services.cluster.progress, job)
        return json_answer(ProgressAnswer(progress=msgspec.to_builtins(found)), if_none_match)

    return router
