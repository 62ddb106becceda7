"""The calls that concern shards."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from shardlib.topology.model import highest_number
from shardlib_ops.api.answers import ShardAnswer, ShardPage, shard_answer
from shardlib_ops.api.models import CreateShardBody, PromoteBody
from shardlib_ops.api.requests import (
    PAGE_DEFAULT,
    PREFIX,
    Cursor,
    IfNoneMatch,
    Key,
    PageSize,
    Services,
    ShardId,
    json_answer,
    page,
    problems,
)
from shardlib_ops.api.shard_changes import CreateShard, DeleteShard, PromoteShard
from shardlib_ops.auth import Identity, Role
from shardlib_ops.serving.identity import needs
from shardlib_ops.serving.problem import problem
from shardlib_ops.serving.requests import request_info

__all__ = ["shard_routes"]

PROMOTE_S = 60.0
"""What a promotion may take beside the time that the shard is closed: its servers are asked before and told after."""


def shard_routes(services: Services) -> APIRouter:
    """The router of shards."""
    router = APIRouter(prefix=f"{PREFIX}/shards", tags=["shards"])

    @router.post(
        "",
        operation_id="createShard",
        summary="Add a shard that owns nothing yet",
        status_code=201,
        response_model=ShardAnswer,
        responses=problems("conflict", "body-too-large", "unsupported-media-type"),
    )
    async def create(
        request: Request,
        body: CreateShardBody,
        identity: Annotated[Identity, Depends(needs(Role.ADMIN, action="shard.create"))],
        key: Key = None,
    ) -> Response:
        """`reshard` calls give it ranges, and tables with them. Its database gets the schema `shardlib`."""
        return await services.change(request, CreateShard(services.cluster, body), key=key, body=body)

    @router.get(
        "",
        operation_id="listShards",
        summary="List shards",
        response_model=ShardPage,
        responses={**problems(), 304: {"description": "Nothing has changed"}},
    )
    async def list_(
        identity: Annotated[Identity, Depends(needs(Role.VIEWER, action="shard.list"))],
        limit: PageSize = PAGE_DEFAULT,
        cursor: Cursor = None,
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """In the order in which they were made."""
        check_limit(limit, services.page_max)
        topology = await services.cluster.manager.topology()
        numbers = [highest_number([shard]) for shard in topology.shards]
        ordered = sorted(zip(numbers, topology.shards, strict=True), key=lambda pair: pair[0])
        shown, following = page([shard for _, shard in ordered], [number for number, _ in ordered], limit, cursor)
        found = ShardPage(
            items=[shard_answer(topology, shard) for shard in shown],
            next_cursor=following,
            topology_version=topology.version,
            cluster_id=topology.cluster_id,
        )
        return json_answer(found, if_none_match)

    @router.get(
        "/{shard_id}",
        operation_id="getShard",
        summary="Show a shard",
        response_model=ShardAnswer,
        responses={**problems("not-found"), 304: {"description": "Nothing has changed"}},
    )
    async def get(
        shard_id: ShardId,
        identity: Annotated[Identity, Depends(needs(Role.VIEWER, action="shard.get"))],
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """By its name or id."""
        topology = await services.cluster.manager.topology()
        return json_answer(shard_answer(topology, topology.shard(shard_id)), if_none_match)

    @router.delete(
        "/{shard_id}",
        operation_id="deleteShard",
        summary="Take a shard out of the cluster",
        status_code=204,
        response_class=Response,
        responses=problems("not-found", "conflict"),
    )
    async def delete(
        request: Request,
        shard_id: ShardId,
        identity: Annotated[Identity, Depends(needs(Role.ADMIN, action="shard.delete"))],
    ) -> Response:
        """Its rows and its server are left as they are. Refused (409) while it owns ranges or a job uses it."""
        return await services.change(request, DeleteShard(services.cluster, shard_id))

    @router.post(
        "/{shard_id}/promote",
        operation_id="promoteReplica",
        summary="Let a replica become the primary",
        response_model=ShardAnswer,
        responses=problems("not-found", "conflict", "body-too-large", "unsupported-media-type"),
    )
    async def promote(
        request: Request,
        shard_id: ShardId,
        identity: Annotated[Identity, Depends(needs(Role.OPERATOR, action="shard.promote"))],
        key: Key = None,
        body: PromoteBody = PromoteBody(),  # noqa: B008 - frozen; the body may be left out
    ) -> Response:
        """Reads and writes of the shard wait for a moment, and nothing that was committed is lost.

        When anything stands in the way, everything is as before (409). The old primary is fenced and no server of the
        shard any more: make it a replica, then add it again.
        """
        request_info(request.scope).allow(body.budget_s + PROMOTE_S)
        return await services.change(request, PromoteShard(services.cluster, shard_id, body), key=key, body=body)

    return router


def check_limit(limit: int, page_max: int) -> None:
    """Refuse a page that is larger than the server gives.

    Raises:
        Problem: 422.
    """
    if limit > page_max:
        fault = {"in": "query.limit", "message": f"at most {page_max}"}
        raise problem("invalid", f"{fault['in']}: {fault['message']}", errors=[fault])
