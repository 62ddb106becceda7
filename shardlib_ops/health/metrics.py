"""Health as metrics in Prometheus' text format. What is not known is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from shardlib.telemetry.metrics import Family, head, sample
from shardlib_ops.health.model import Health, ServerHealth, ShardHealth

__all__ = ["metrics_text"]

_SHARD: Final = ("shard",)
_SERVER: Final = ("shard", "server")

STATUS: Final = Family("shard_health_status", "gauge", "1 for the status that a shard has.", ("shard", "status"))
PRIMARY: Final = Family("shard_primary_up", "gauge", "1 if the primary answers and takes writes.", _SHARD)
REPLICAS: Final = Family("shard_replicas_up", "gauge", "Replicas that answer and are some.", _SHARD)
MAINTENANCE: Final = Family("shard_maintenance", "gauge", "1 while a shard is under maintenance.", _SHARD)
ELECTED: Final = Family("shard_health_elected", "gauge", "1 if this controller is the one that acts.")
SERVERS: Final = (
    (Family("shard_replication_lag_seconds", "gauge", "Age of what a replica has not replayed.", _SERVER), "lag_s"),
    (Family("shard_replication_lag_bytes", "gauge", "WAL that a replica has not replayed.", _SERVER), "lag_bytes"),
    (Family("shard_query_latency_seconds", "gauge", "Time of one small query.", _SERVER), "latency_s"),
    (Family("shard_xid_age", "gauge", "Age of the oldest transaction id.", _SERVER), "xid_age"),
    (Family("shard_slot_lag_bytes", "gauge", "WAL that is kept for the slowest slot.", _SERVER), "slot_lag_bytes"),
    (Family("shard_disk_free_ratio", "gauge", "Free part of the disk, where it is known.", _SERVER), "disk_free"),
)


def metrics_text(shards: Sequence[ShardHealth], *, elected: bool) -> str:
    """Everything that is known of some shards, in Prometheus' text format 0.0.4."""
    lines = [*head(ELECTED), sample(ELECTED.name, {}, int(elected))]

    def tell(family: Family, samples: Iterable[tuple[dict[str, str], float | None]]) -> None:
        lines.extend(head(family))
        lines.extend(sample(family.name, labels, value) for labels, value in samples if value is not None)

    tell(STATUS, (({"shard": one.name, "status": each}, int(one.status == each)) for one in shards for each in Health))
    tell(PRIMARY, (({"shard": one.name}, int(one.primary_up)) for one in shards))
    tell(REPLICAS, (({"shard": one.name}, one.replicas_up) for one in shards))
    tell(MAINTENANCE, (({"shard": one.name}, int(one.maintenance)) for one in shards))
    for family, name in SERVERS:
        tell(family, ((_of(one, each), getattr(each, name)) for one in shards for each in one.servers))
    return "\n".join(lines) + "\n"


def _of(shard: ShardHealth, server: ServerHealth) -> dict[str, str]:
    return {"shard": shard.name, "server": server.endpoint}
