"""The cluster by the HTTP API of a manager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec

from shardlib.dsn import Dsn
from shardlib.errors import UnsupportedOperation
from shardlib_ops.client.base import Begun, Told
from shardlib_ops.client.errors import ManagerRefused
from shardlib_ops.client.link import Link, Reach
from shardlib_ops.client.views import (
    FaultView,
    JobView,
    PlanView,
    PromotionView,
    ShardsView,
    ShardView,
)
from shardlib_ops.manager.bootstrap import NewShard
from shardlib_ops.manager.promote import Rejoin
from shardlib_ops.manager.ring import RingView
from shardlib_ops.reshard.progress.model import JobProgress

__all__ = ["HttpClient"]

T = TypeVar("T")

_PAGE: Final = 100
_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "shard": {"status": "state", "primary_endpoint": "primary"},
    "job": {"type": "kind", "error_message": "error"},
    "plan": {"type": "kind"},
}
"""What the API calls otherwise than the views."""
_BODIES: Final[Mapping[str, Mapping[str, str]]] = {
    "split": {"source": "source_shard_id", "targets": "target_shards"},
    "merge": {"sources": "source_shard_ids", "target": "target_shard"},
    "rebalance": {"target": "target_shard"},
    "drain": {"shard": "source_shard_id"},
    "move_keys": {"target": "target_shard"},
}
"""How the API calls the arguments of the manager's methods."""


class HttpClient:
    """See `Client`. The manager writes the audit log.

    Args:
        reach: how the manager is reached.

    Raises:
        InvalidArgument: see `Link`.
    """

    look_s = 1.0

    def __init__(self, reach: Reach) -> None:
        self._link = Link(reach)

    async def close(self) -> None:
        """See `Client`."""
        await self._link.close()

    # -- shards ---------------------------------------------------------------------------------------------------

    async def shards(self) -> ShardsView:
        """See `Client`."""
        pages = await self._pages("/shards")
        items = tuple(self._shard(item) for page in pages for item in page["items"])
        return self._as(
            ShardsView,
            {"cluster_id": pages[-1].get("cluster_id"), "version": pages[-1].get("topology_version"), "shards": items},
        )

    async def shard(self, shard: str) -> ShardView:
        """See `Client`."""
        return self._shard(await self._link.get(_of_shard(shard)))

    async def ring(self) -> RingView:
        """See `Client`."""
        return self._as(RingView, await self._link.get("/ring"))

    async def create_shard(
        self, name: str, *, primary_endpoint: str, replicas: Sequence[str], vnode_count: int
    ) -> ShardView:
        """See `Client`."""
        NewShard(name, Dsn(primary_endpoint), [Dsn(each) for each in replicas], vnode_count)  # said here as there
        body = {
            "name": name,
            "primary_endpoint": primary_endpoint,
            "replicas": list(replicas),
            "vnode_count": vnode_count,
        }
        return self._shard(await self._link.post("/shards", body))

    async def delete_shard(self, shard: str) -> None:
        """See `Client`."""
        await self._link.delete(_of_shard(shard))

    async def promote(
        self,
        shard: str,
        replica: str | None,
        *,
        budget_s: float,
        max_lag_bytes: int,
        rejoin: Rejoin | None,
        on_step: Told | None,
    ) -> PromotionView | None:
        """See `Client`. The steps are not told."""
        _no_rejoin(rejoin)
        body = {"replica_endpoint": replica, "budget_s": budget_s, "max_lag_bytes": max_lag_bytes}
        await self._link.post(f"{_of_shard(shard)}/promote", body)
        return self._as(PromotionView, await self._link.get(f"{_of_shard(shard)}/promotion"))

    async def check_promotion(self, shard: str, replica: str | None, *, max_lag_bytes: int) -> list[FaultView]:
        """No call of a manager does that."""
        raise _without("shard promote --check")

    async def resume_promotion(self, shard: str, *, rejoin: Rejoin | None, on_step: Told | None) -> PromotionView:
        """No call of a manager does that: it does so by itself when the same request comes again."""
        raise _without("shard promote --resume")

    async def add_replica(self, shard: str, endpoint: str) -> ShardView:
        """No call of a manager does that."""
        raise _without("shard add-replica")

    async def remove_replica(self, shard: str, endpoint: str) -> ShardView:
        """No call of a manager does that."""
        raise _without("shard remove-replica")

    # -- jobs -----------------------------------------------------------------------------------------------------

    async def plan(self, kind: str, arguments: Mapping[str, Any]) -> PlanView:
        """See `Client`."""
        found = await self._link.post(
            _planner(kind), {**_body(kind, arguments), "dry_run": True}, given=_given(arguments)
        )
        return self._as(PlanView, _named("plan", found))

    async def begin(self, kind: str, arguments: Mapping[str, Any]) -> Begun:
        """See `Client`."""
        found = await self._link.post(_planner(kind), _body(kind, arguments), given=_given(arguments))
        return Begun(self._job(found), tuple(map(str, found.get("warnings", ()))))

    async def jobs(self) -> list[JobView]:
        """See `Client`."""
        return [self._job(item) for page in await self._pages("/reshard/jobs") for item in page["items"]]

    async def job(self, job_id: int) -> JobView:
        """See `Client`."""
        return self._job(await self._link.get(_of_job(job_id)))

    async def progress(self, job_id: int) -> JobProgress | None:
        """See `Client`."""
        return self._as(JobProgress | None, (await self._link.get(f"{_of_job(job_id)}/progress"))["progress"])  # type: ignore[arg-type]

    async def steer(self, job_id: int, verb: str) -> JobView:
        """See `Client`."""
        return self._job(await self._link.post(f"{_of_job(job_id)}/{verb}"))

    # -- parts ----------------------------------------------------------------------------------------------------

    async def _pages(self, path: str) -> list[dict[str, Any]]:
        pages: list[dict[str, Any]] = []
        more: dict[str, Any] = {}
        while True:
            page = await self._link.get(path, limit=_PAGE, **more)
            pages.append(page)
            if page["next_cursor"] is None:
                return pages
            more = {"cursor": page["next_cursor"]}

    def _shard(self, content: Any) -> ShardView:
        return self._as(ShardView, _named("shard", content))

    def _job(self, content: Any) -> JobView:
        return self._as(JobView, _named("job", content))

    def _as(self, kind: type[T], content: Any) -> T:
        try:
            return msgspec.convert(content, kind)
        except msgspec.ValidationError as error:
            raise ManagerRefused(
                self._link.url, f"its answer is of another version ({error})", "upgrade the older of the two"
            ) from None


def _named(what: str, content: Any) -> Any:
    """An answer with the names that the views have."""
    names = _NAMES[what]
    return {names.get(name, name): value for name, value in content.items()} if isinstance(content, dict) else content


def _body(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent for the arguments of the manager's method `kind`."""
    names = _BODIES[kind]
    return {names.get(name, name): value for name, value in arguments.items() if value is not None}


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as an error names them."""
    targets = arguments.get("targets") or [one for one in [arguments.get("target")] if one]
    names = ", ".join(str(one.get("shard_id") or one.get("name")) for one in targets)
    return {**arguments, "target": names, "targets": names}


def _planner(kind: str) -> str:
    return f"/reshard/{kind.replace('_', '-')}"


def _of_shard(shard: str) -> str:
    return f"/shards/{quote(shard, safe='')}"


def _of_job(job_id: int) -> str:
    return f"/reshard/jobs/{job_id:d}"


def _no_rejoin(rejoin: Rejoin | None) -> None:
    if rejoin is not None:
        raise _without("--rejoin-command")


def _without(what: str) -> UnsupportedOperation:
    return UnsupportedOperation(f"a manager does not do this: {what}", "it needs --catalog")
