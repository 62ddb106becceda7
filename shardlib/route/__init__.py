"""Which shards a statement or row needs, decided without I/O."""

from shardlib.route.extract import needs_of
from shardlib.route.needs import Describe, Needs, Scope, TableKey

__all__ = ["Describe", "Needs", "Scope", "TableKey", "needs_of"]
