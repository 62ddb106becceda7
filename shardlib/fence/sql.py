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
    # What a resharding job writes down in the databases it works on. Application roles may read none of it but the
    # key tables, which are granted as they are made.
    """
    CREATE TABLE shardlib.job (
        id bigint PRIMARY KEY,
        token bigint NOT NULL
    );
    CREATE TABLE shardlib.position (
        job bigint NOT NULL,
        leg integer NOT NULL,
        direction text NOT NULL CHECK (direction IN ('forward', 'reverse')),
        lsn pg_lsn NOT NULL,
        PRIMARY KEY (job, leg, direction)
    );
    CREATE TABLE shardlib.copied (
        job bigint NOT NULL,
        leg integer NOT NULL,
        table_name text NOT NULL,
        lsn pg_lsn NOT NULL,
        rows bigint NOT NULL,
        PRIMARY KEY (job, leg, table_name)
    );
    CREATE FUNCTION shardlib.claimed(wanted_job bigint, wanted_token bigint) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
    BEGIN
        PERFORM FROM shardlib.job WHERE id = wanted_job AND token = wanted_token FOR SHARE;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'job % is not held by the runner with token %', wanted_job, wanted_token
                USING ERRCODE = 'SL001';
        END IF;
    END
    $$;
    REVOKE ALL ON FUNCTION shardlib.claimed(bigint, bigint) FROM PUBLIC;
    """,
)

SCHEMA_VERSION: Final = len(MIGRATIONS)

READ_CONTROL: Final = b"SELECT schema_version, cluster_id, shard_id FROM shardlib.control"
