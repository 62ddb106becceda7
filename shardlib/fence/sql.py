"""What is installed in a shard's database: the schema `shardlib`, its control row, and the 2PC decisions."""

from __future__ import annotations

from typing import Final

__all__ = ["MIGRATIONS", "READ_CONTROL", "SCHEMA_VERSION"]

# One entry a version, each run once, in order, in one transaction with the change of `schema_version`.
MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE shardlib.control (
        only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
        schema_version integer NOT NULL,
        cluster_id text NOT NULL,
        shard_id text NOT NULL,
        app_roles text[] NOT NULL DEFAULT '{}'
    );
    CREATE TABLE shardlib.decision (
        txid text PRIMARY KEY,
        verdict text NOT NULL CHECK (verdict IN ('commit', 'abort')),
        decided_at timestamptz NOT NULL DEFAULT now()
    );
    """,
)

SCHEMA_VERSION: Final = len(MIGRATIONS)

READ_CONTROL: Final = b"SELECT schema_version, cluster_id, shard_id FROM shardlib.control"
