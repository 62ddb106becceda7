"""Who rows go to: shards there are, and those that a job makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument
from shardlib.topology import Shard, Topology
from shardlib.topology.change import with_shard
from shardlib_ops.manager.bootstrap import NewShard
from shardlib_ops.manager.shards import planned_shard

__all__ = ["Parties", "Target", "with_targets"]

Target = Mapping[str, Any]
"""`{"shard_id": name or id}`, or `{"name": …, "primary_endpoint": dsn, "replicas": [dsn], "vnode_count": 256}`."""


@dataclass(frozen=True, slots=True)
class Parties:
    """Shards as they are, or as they will be when the job begins."""

    topology: Topology
    targets: tuple[Shard, ...]


def with_targets(topology: Topology, targets: Sequence[Target]) -> Parties:
    """The topology as it will be when the new ones among the targets are made, and the targets in it."""
    found: list[Shard] = []
    for target in targets:
        if not isinstance(target, Mapping):
            raise InvalidArgument("target", target, 'a mapping: {"shard_id": …} or {"name": …, "primary_endpoint": …}')
        unknown = set(target) - {"shard_id", "name", "primary_endpoint", "replicas", "vnode_count"}
        if unknown or ("shard_id" in target) == ("primary_endpoint" in target):
            raise InvalidArgument(
                "target",
                sorted(unknown or target),
                'either {"shard_id": …} or {"name": …, "primary_endpoint": …, "replicas": …, "vnode_count": …}',
            )
        if "shard_id" in target:
            found.append(topology.shard(target["shard_id"]))
            continue
        new = NewShard(
            target.get("name", ""),
            Dsn(target["primary_endpoint"]),
            [Dsn(text) for text in target.get("replicas", ())],
            target.get("vnode_count", 256),
        )
        shard = planned_shard(topology, new)
        topology = with_shard(topology, shard, nonce=uuid4().hex)
        found.append(shard)
    if len({shard.id for shard in found}) != len(found):
        raise InvalidArgument("targets", [shard.name for shard in found], "each shard once")
    return Parties(topology, tuple(found))
