"""The catalog in a PostgreSQL database: schema `shardlib_catalog`, told by NOTIFY and checked by a poll."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final

import psycopg

from shardlib.catalog.postgres_door import Door, Link, rows
from shardlib.catalog.store import Deadline, Grant, Record, Stop
from shardlib.dsn import Dsn
from shardlib.topology.codec import ChunkKey

__all__ = ["PostgresStore"]

_BATCH: Final = 64
_BEAT_S: Final = 2.0
_ASK_S: Final = 3.0

_INSTALL: Final = """
DO $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('shardlib_catalog'));
    CREATE SCHEMA IF NOT EXISTS shardlib_catalog;
    CREATE SEQUENCE IF NOT EXISTS shardlib_catalog.revision;
    CREATE TABLE IF NOT EXISTS shardlib_catalog.head (
        catalog text PRIMARY KEY, data bytea NOT NULL, revision bigint NOT NULL
    );
    CREATE TABLE IF NOT EXISTS shardlib_catalog.chunk (
        catalog text, attempt bytea, digest bytea, data bytea NOT NULL, PRIMARY KEY (catalog, attempt, digest)
    );
    CREATE TABLE IF NOT EXISTS shardlib_catalog.document (
        catalog text, name text COLLATE "C", data bytea NOT NULL, revision bigint NOT NULL, PRIMARY KEY (catalog, name)
    );
    CREATE TABLE IF NOT EXISTS shardlib_catalog.lease (
        catalog text, name text, token bigint NOT NULL, holder text NOT NULL, expires timestamptz NOT NULL,
        PRIMARY KEY (catalog, name)
    );
END $$
"""
_INSTALLED: Final = (
    "SELECT to_regclass('shardlib_catalog.lease') IS NOT NULL AND to_regclass('shardlib_catalog.document') IS NOT NULL"
)
_HEAD: Final = "SELECT data, revision FROM shardlib_catalog.head WHERE catalog = %s"
_NEWER: Final = "SELECT data, revision FROM shardlib_catalog.head WHERE catalog = %s AND revision > %s"
_HELD: Final = """
held AS MATERIALIZED (
    SELECT 1 FROM shardlib_catalog.lease
    WHERE catalog = %(catalog)s AND name = %(lease)s AND token = %(token)s AND expires > clock_timestamp()
    FOR SHARE
)"""
_TOLD: Final = "SELECT revision, pg_notify('shardlib_catalog', %(catalog)s) FROM done"
# The lease's row stays locked until the head is written: nobody can take it over in between.
_CREATE: Final = f"""
WITH {_HELD}, done AS (
    INSERT INTO shardlib_catalog.head (catalog, data, revision)
    SELECT %(catalog)s, %(data)b, nextval('shardlib_catalog.revision')
    WHERE %(lease)s::text IS NULL OR EXISTS (SELECT FROM held)
    ON CONFLICT DO NOTHING RETURNING revision
) {_TOLD}"""
_SWAP: Final = f"""
WITH {_HELD}, done AS (
    UPDATE shardlib_catalog.head SET data = %(data)b, revision = nextval('shardlib_catalog.revision')
    WHERE catalog = %(catalog)s AND revision = %(expected)s
      AND (%(lease)s::text IS NULL OR EXISTS (SELECT FROM held))
    RETURNING revision
) {_TOLD}"""
_CREATE_DOCUMENT: Final = f"""
WITH {_HELD}
INSERT INTO shardlib_catalog.document (catalog, name, data, revision)
SELECT %(catalog)s, %(name)s, %(data)b, nextval('shardlib_catalog.revision')
WHERE %(lease)s::text IS NULL OR EXISTS (SELECT FROM held)
ON CONFLICT DO NOTHING RETURNING revision"""
_SWAP_DOCUMENT: Final = f"""
WITH {_HELD}
UPDATE shardlib_catalog.document SET data = %(data)b, revision = nextval('shardlib_catalog.revision')
WHERE catalog = %(catalog)s AND name = %(name)s AND revision = %(expected)s
  AND (%(lease)s::text IS NULL OR EXISTS (SELECT FROM held))
RETURNING revision"""
_DOCUMENT: Final = "SELECT data, revision FROM shardlib_catalog.document WHERE catalog = %s AND name = %s"
_DOCUMENTS: Final = """
SELECT name, data, revision FROM shardlib_catalog.document WHERE catalog = %s AND starts_with(name, %s) ORDER BY name
"""
_PUT: Final = """
INSERT INTO shardlib_catalog.chunk (catalog, attempt, digest, data)
SELECT %s, * FROM unnest(%b::bytea[], %b::bytea[], %b::bytea[]) ON CONFLICT DO NOTHING
"""
_AMONG: Final = "catalog = %s AND (attempt, digest) IN (SELECT * FROM unnest(%b::bytea[], %b::bytea[]))"
_GET: Final = f"SELECT attempt, digest, data FROM shardlib_catalog.chunk WHERE {_AMONG}"
_DROP: Final = f"DELETE FROM shardlib_catalog.chunk WHERE {_AMONG}"
_LIST: Final = "SELECT attempt, digest FROM shardlib_catalog.chunk WHERE catalog = %s"
_GRANT: Final = """
INSERT INTO shardlib_catalog.lease AS l (catalog, name, token, holder, expires)
VALUES (%(catalog)s, %(name)s, 1, %(holder)s, clock_timestamp() + make_interval(secs => %(ttl)s))
ON CONFLICT (catalog, name) DO UPDATE
SET token = l.token + 1, holder = excluded.holder,
    expires = clock_timestamp() + make_interval(secs => %(ttl)s)
WHERE l.expires <= clock_timestamp() RETURNING token
"""
_RENEW: Final = """
UPDATE shardlib_catalog.lease SET expires = clock_timestamp() + make_interval(secs => %s)
WHERE catalog = %s AND name = %s AND token = %s AND expires > clock_timestamp() RETURNING 1
"""
_REVOKE: Final = """
UPDATE shardlib_catalog.lease SET expires = '-infinity' WHERE catalog = %s AND name = %s AND token = %s
"""


class PostgresStore:
    """The store `postgresql://...?catalog=name`. Tables are created by the first write.

    Leases run out by the server's clock. A lease's row stays when it is given up, so its token goes on
    rising.
    """

    def __init__(self, dsn: Dsn, name: str) -> None:
        self._door = Door(dsn)
        self.safe_url = f"{dsn.safe()}?catalog={name}"
        self._door.safe_url = self.safe_url
        self._name = name
        self._installed = False

    def _ready(self, deadline: Deadline, *, write: bool) -> bool:
        """Whether the tables are there; a writer makes them."""
        if not self._installed:
            self._installed = bool(self._door.run(_INSTALLED, (), deadline)[0][0])
            if not self._installed and write:
                self._door.run(_INSTALL, (), deadline)
                self._installed = True
        return self._installed

    def read_head(self, deadline: Deadline) -> Record | None:
        """See `Store.read_head`."""
        if not self._ready(deadline, write=False):
            return None
        found = self._door.run(_HEAD, (self._name,), deadline)
        return Record(bytes(found[0][0]), int(found[0][1])) if found else None

    def swap_head(self, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline) -> bool:
        """See `Store.swap_head`."""
        self._ready(deadline, write=True)
        values = {
            "catalog": self._name,
            "data": data,
            "expected": expected,
            "lease": grant.name if grant else None,
            "token": grant.token if grant else 0,
        }
        return bool(self._door.run(_CREATE if expected is None else _SWAP, values, deadline, again=False))

    def read_document(self, name: str, deadline: Deadline) -> Record | None:
        """See `Store.read_document`."""
        if not self._ready(deadline, write=False):
            return None
        found = self._door.run(_DOCUMENT, (self._name, name), deadline)
        return Record(bytes(found[0][0]), int(found[0][1])) if found else None

    def swap_document(
        self, name: str, data: bytes, expected: int | None, grant: Grant | None, deadline: Deadline
    ) -> int | None:
        """See `Store.swap_document`."""
        self._ready(deadline, write=True)
        values = {
            "catalog": self._name,
            "name": name,
            "data": data,
            "expected": expected,
            "lease": grant.name if grant else None,
            "token": grant.token if grant else 0,
        }
        query = _CREATE_DOCUMENT if expected is None else _SWAP_DOCUMENT
        found = self._door.run(query, values, deadline, again=False)
        return int(found[0][0]) if found else None

    def list_documents(self, prefix: str, deadline: Deadline) -> dict[str, Record]:
        """See `Store.list_documents`."""
        if not self._ready(deadline, write=False):
            return {}
        found = self._door.run(_DOCUMENTS, (self._name, prefix), deadline)
        return {str(name): Record(bytes(data), int(revision)) for name, data, revision in found}

    def put_chunks(self, chunks: Mapping[ChunkKey, bytes], deadline: Deadline) -> None:
        """See `Store.put_chunks`."""
        self._ready(deadline, write=True)
        for keys in _parts(chunks):
            attempts, digests = _columns(keys)
            self._door.run(_PUT, (self._name, attempts, digests, [chunks[key] for key in keys]), deadline)

    def get_chunks(self, keys: Collection[ChunkKey], deadline: Deadline) -> dict[ChunkKey, bytes]:
        """See `Store.get_chunks`."""
        found: dict[ChunkKey, bytes] = {}
        for part in _parts(keys):
            for attempt, digest, data in self._door.run(_GET, (self._name, *_columns(part)), deadline):
                found[ChunkKey(bytes(attempt), bytes(digest))] = bytes(data)
        return found

    def list_chunks(self, deadline: Deadline) -> set[ChunkKey]:
        """See `Store.list_chunks`."""
        found = self._door.run(_LIST, (self._name,), deadline)
        return {ChunkKey(bytes(attempt), bytes(digest)) for attempt, digest in found}

    def drop_chunks(self, keys: Collection[ChunkKey], deadline: Deadline) -> None:
        """See `Store.drop_chunks`."""
        for part in _parts(keys):
            self._door.run(_DROP, (self._name, *_columns(part)), deadline)

    def follow(self, after: int, stop: Stop, on_record: Callable[[Record], None], on_alive: Callable[[], None]) -> None:
        """See `Store.follow`. Where NOTIFY cannot pass (PgBouncer), the head is read at every beat."""
        link = self._door.open(Deadline(_ASK_S))
        try:
            stop.attach(link.cut)
            rows(link, "LISTEN shardlib_catalog", ())
            while not stop.is_set():
                link.deadline = Deadline(_ASK_S)
                found = rows(link, _NEWER, (self._name, after)) if self._seen(link) else []
                on_alive()
                if found:
                    after = int(found[0][1])
                    on_record(Record(bytes(found[0][0]), after))
                link.deadline = Deadline(_BEAT_S + _ASK_S)
                for notice in link.notifies(timeout=_BEAT_S, stop_after=1):
                    del notice  # that something changed is all it tells
        except psycopg.Error as error:
            if not stop.is_set():
                raise self._door.unavailable(error) from None
        finally:
            link.close()

    def _seen(self, link: Link) -> bool:
        if not self._installed:
            self._installed = bool(rows(link, _INSTALLED, ())[0][0])
        return self._installed

    def grant(self, name: str, ttl_s: float, holder: str, deadline: Deadline) -> Grant | None:
        """See `Store.grant`."""
        self._ready(deadline, write=True)
        sent_at = time.monotonic()
        values = {"catalog": self._name, "name": name, "holder": holder, "ttl": ttl_s}
        found = self._door.run(_GRANT, values, deadline, again=False)
        if not found:
            return None
        return Grant(name, int(found[0][0]), int(found[0][0]), ttl_s, sent_at)

    def renew(self, grant: Grant, deadline: Deadline) -> bool:
        """See `Store.renew`."""
        return bool(self._door.run(_RENEW, (grant.ttl_s, self._name, grant.name, grant.token), deadline))

    def revoke(self, grant: Grant, deadline: Deadline) -> None:
        """See `Store.revoke`."""
        self._door.run(_REVOKE, (self._name, grant.name, grant.token), deadline)

    def after_fork(self) -> None:
        """See `Store.after_fork`."""
        self._door.after_fork()

    def close(self) -> None:
        """See `Store.close`."""
        self._door.close()


def _parts(keys: Collection[ChunkKey]) -> Iterator[list[ChunkKey]]:
    ordered = sorted(keys)
    for at in range(0, len(ordered), _BATCH):
        yield ordered[at : at + _BATCH]


def _columns(keys: Sequence[ChunkKey]) -> tuple[list[bytes], list[bytes]]:
    return [key.attempt for key in keys], [key.digest for key in keys]
