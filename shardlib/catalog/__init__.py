"""Where the topology lives: etcd by default, PostgreSQL, or memory; and the cache a client routes by."""

from shardlib.catalog.base import POLL_S, Catalog, Conflict, Document, Lease, Watch
from shardlib.catalog.cache import TopologyCache
from shardlib.catalog.open import open_catalog
from shardlib.catalog.publish import publish_change

__all__ = [
    "POLL_S", "Catalog", "Conflict", "Document", "Lease", "TopologyCache", "Watch", "open_catalog", "publish_change",
]  # fmt: skip
