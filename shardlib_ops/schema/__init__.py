"""Alembic over every shard and reference table: apply, stamp, look for drift."""

from shardlib_ops.schema.blocking import BlockingSchemaManager
from shardlib_ops.schema.env import run_migrations
from shardlib_ops.schema.errors import MigrationFailed
from shardlib_ops.schema.manager import SchemaManager
from shardlib_ops.schema.model import Applied, SchemaStatus, Script, ShardRevision

__all__ = [
    "Applied", "BlockingSchemaManager", "MigrationFailed", "SchemaManager", "SchemaStatus", "Script", "ShardRevision",
    "run_migrations",
]  # fmt: skip
