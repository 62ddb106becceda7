"""Changes of shards: one is made, taken out, or gets another primary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardlib.dsn import Dsn
from shardlib.topology import Shard, Topology
from shardlib.topology.model import highest_number
from shardlib_ops.api.answers import shard_answer
from shardlib_ops.api.change import Done
from shardlib_ops.api.cluster import Cluster
from shardlib_ops.api.models import HOST_PORT, CreateShardBody, PromoteBody
from shardlib_ops.manager.promote.record import Promotion, Stage
from shardlib_ops.serving.problem import problem

__all__ = ["CreateShard", "DeleteShard", "PromoteShard", "made_since"]


def made_since(topology: Topology, next_shard: int, name: str, primary: str) -> Shard | None:
    """The shard of this name and primary that was made since `next_shard` was the next number; None if none was."""
    named = Dsn(primary)
    for shard in topology.shards:
        # Of a password that was encrypted on the way in, the text is another each time.
        same = shard.primary == named or (shard.primary.encrypted_password and shard.primary.bound() == named.bound())
        if same and shard.name == name and highest_number([shard]) >= next_shard:
            return shard
    return None


class CreateShard:
    """`POST /shards`."""

    action = "shard.create"

    def __init__(self, cluster: Cluster, body: CreateShardBody) -> None:
        self._cluster, self._body = cluster, body
        self._primary = body.primary_endpoint.get_secret_value()
        self.target = body.name
        self.details: Mapping[str, object] = {
            "primary_endpoint": Dsn(self._primary),
            "replicas": ", ".join(Dsn(each.get_secret_value()).safe() for each in body.replicas),
            "vnode_count": body.vnode_count,
        }

    async def check(self) -> None:
        """See `Change.check`."""
        await self._cluster.check_endpoints(self._body.endpoints())

    async def before(self) -> dict[str, Any]:
        """See `Change.before`."""
        return {"next_shard": (await self._cluster.manager.topology()).next_shard}

    async def apply(self) -> Done:
        """See `Change.apply`."""
        shard = await self._cluster.manager.create_shard(
            self._body.name,
            primary_endpoint=self._primary,
            replicas=[each.get_secret_value() for each in self._body.replicas],
            vnode_count=self._body.vnode_count,
        )
        return _created(await self._cluster.manager.topology(), shard)

    async def settle(self, before: Mapping[str, Any]) -> Done | None:
        """See `Change.settle`."""
        topology = await self._cluster.manager.topology()
        shard = made_since(topology, before["next_shard"], self._body.name, self._primary)
        return None if shard is None else _created(topology, shard)


def _created(topology: Topology, shard: Shard) -> Done:
    return Done(201, shard_answer(topology, shard), path=f"/shards/{shard.id}", told={"shard_id": shard.id})


class DeleteShard:
    """`DELETE /shards/{id}`."""

    action = "shard.delete"

    def __init__(self, cluster: Cluster, shard: str) -> None:
        self._cluster, self.target = cluster, shard
        self.details: Mapping[str, object] = {}

    async def check(self) -> None:
        """Nothing is named that could lead anywhere."""

    async def before(self) -> dict[str, Any]:
        """A repetition finds no shard, and that is its answer."""
        return {}

    async def apply(self) -> Done:
        """See `Change.apply`."""
        shard = await self._cluster.manager.get_shard(self.target)
        await self._cluster.manager.delete_shard(shard.id)
        return Done(204, None, told={"shard_id": shard.id, "shard": shard.name})

    async def settle(self, before: Mapping[str, Any]) -> Done | None:
        """See `before`."""
        return None


class PromoteShard:
    """`POST /shards/{id}/promote`."""

    action = "shard.promote"

    def __init__(self, cluster: Cluster, shard: str, body: PromoteBody) -> None:
        self._cluster, self._body, self.target = cluster, body, shard
        self._replica = None if body.replica_endpoint is None else body.replica_endpoint.get_secret_value()
        shown = self._replica
        if shown is not None and not HOST_PORT.fullmatch(shown):
            shown = Dsn(shown).safe()
        self.details: Mapping[str, object] = {
            "replica_endpoint": shown or "the least behind",
            "budget_s": body.budget_s,
            "max_lag_bytes": body.max_lag_bytes,
        }

    async def check(self) -> None:
        """Only a replica that the shard has can be named, and nothing is connected to before that is known."""

    async def before(self) -> dict[str, Any]:
        """See `Change.before`."""
        record = await self._cluster.manager.get_promotion(self.target)
        return {"started_at": None if record is None else record.started_at}

    async def apply(self) -> Done:
        """See `Change.apply`."""
        shard = await self._cluster.manager.promote_replica(
            self.target, self._replica, budget_s=self._body.budget_s, max_lag_bytes=self._body.max_lag_bytes
        )
        return await self._promoted(shard.id)

    async def settle(self, before: Mapping[str, Any]) -> Done | None:
        """Bring to its end what was begun; what was written down says in which direction."""
        record = await self._cluster.manager.get_promotion(self.target)
        if record is None or record.started_at == before["started_at"]:
            return None
        if not record.stage.over:
            record = await self._cluster.manager.resume_promotion(self.target)
        if record.stage is Stage.DONE:
            return await self._promoted(record.shard)
        raise problem("conflict", f"the promotion of shard {record.name!r} was interrupted and has been undone")

    async def _promoted(self, shard_id: str) -> Done:
        topology = await self._cluster.manager.topology()
        shard = topology.shard_by_id(shard_id)
        record: Promotion | None = await self._cluster.manager.get_promotion(shard_id)
        told: dict[str, object] = {"shard_id": shard_id, "primary_endpoint": shard.primary}
        if record is not None and record.error:
            told["left_to_do"] = record.error
        return Done(200, shard_answer(topology, shard), told=told)
