"""The audit log in a table of PostgreSQL, `shardlib_audit.entry`, into which rows are only inserted.

The primary key gives a place to one writer. A row is never changed: a trigger refuses it to whoever does not switch it
off, and a role that has INSERT and SELECT alone cannot.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import unquote

from shardlib.catalog.postgres_door import Door, Row
from shardlib.catalog.store import Deadline
from shardlib.dsn import Dsn
from shardlib.errors import CatalogUnavailable, InvalidArgument
from shardlib_ops.audit.base import PAGE, Page
from shardlib_ops.audit.entry import GENESIS, Damaged, Draft, Entry, Head, decode, encode, seal
from shardlib_ops.audit.errors import AuditUnavailable

__all__ = ["PostgresAudit"]

_PAUSE_FIRST_S: Final = 0.005
_PAUSE_MAX_S: Final = 0.25
_SWAP_PART: Final = 0.6
"""The part of the time that an insert may take; the rest is kept for reading what became of it."""
_BATCH: Final = 1000

_INSTALLED: Final = "SELECT to_regclass('shardlib_audit.entry') IS NOT NULL"
_INSTALL: Final = """
DO $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('shardlib_audit'));
    CREATE SCHEMA IF NOT EXISTS shardlib_audit;
    CREATE TABLE IF NOT EXISTS shardlib_audit.entry (
        log text, seq bigint CHECK (seq > 0), body text NOT NULL, PRIMARY KEY (log, seq)
    );
    CREATE OR REPLACE FUNCTION shardlib_audit.refuse() RETURNS trigger LANGUAGE plpgsql AS $f$
    BEGIN
        IF TG_OP = 'DELETE' AND current_setting('shardlib_audit.cut', true) = 'on' THEN
            RETURN OLD;
        END IF;
        RAISE EXCEPTION 'entries of an audit log are not changed' USING ERRCODE = 'insufficient_privilege';
    END $f$;
    CREATE OR REPLACE TRIGGER unchanged BEFORE UPDATE OR DELETE ON shardlib_audit.entry
        FOR EACH ROW EXECUTE FUNCTION shardlib_audit.refuse();
    CREATE OR REPLACE TRIGGER kept BEFORE TRUNCATE ON shardlib_audit.entry
        FOR EACH STATEMENT EXECUTE FUNCTION shardlib_audit.refuse();
END $$
"""
# A place is free only if none above it is taken, so that a writer which slept while entries were archived finds none.
# A server that acknowledges before it has written is asked to write first, for this one transaction.
_APPEND: Final = """
INSERT INTO shardlib_audit.entry (log, seq, body)
SELECT %(log)s, %(seq)s, %(body)s
WHERE NOT EXISTS (SELECT FROM shardlib_audit.entry WHERE log = %(log)s AND seq > %(seq)s)
  AND CASE WHEN current_setting('synchronous_commit') = 'off'
      THEN set_config('synchronous_commit', 'on', true) ELSE 'as it is' END IS NOT NULL
ON CONFLICT DO NOTHING RETURNING seq
"""
_ONE: Final = "SELECT body FROM shardlib_audit.entry WHERE log = %s AND seq = %s"
_NEWEST: Final = "SELECT seq, body FROM shardlib_audit.entry WHERE log = %s ORDER BY seq DESC LIMIT %s"
_AFTER: Final = "SELECT seq, body FROM shardlib_audit.entry WHERE log = %s AND seq > %s ORDER BY seq LIMIT %s"
_CUT: Final = """
WITH allowed AS MATERIALIZED (SELECT set_config('shardlib_audit.cut', 'on', true) AS said)
DELETE FROM shardlib_audit.entry
WHERE log = %s AND seq <= %s AND (SELECT said FROM allowed) = 'on' RETURNING seq
"""


class _AuditDoor(Door):
    """Says what a role needs for this table, not for the catalog's."""

    def _grants(self, denied: str) -> str:
        if "for database" in denied:
            return super()._grants(denied)
        return "GRANT USAGE ON SCHEMA shardlib_audit, and INSERT and SELECT ON shardlib_audit.entry, to it"


class PostgresAudit:
    """The log `postgresql://.../database?log=name`. The table is made by the first append.

    Args:
        url: of the database; without `log` the log is called `default`.
        timeout_s: longest time for each call.

    Raises:
        InvalidArgument: not such a URL.
    """

    def __init__(self, url: str, *, timeout_s: float = 10.0) -> None:
        base, _, query = url.partition("?")
        parts = query.split("&") if query else []
        named = [unquote(part.partition("=")[2]) for part in parts if part.startswith("log=")]
        kept = [part for part in parts if not part.startswith("log=")]
        self._name = named[-1] if named else "default"
        if not 1 <= len(self._name) <= 200:
            raise InvalidArgument("log", self._name, "1 to 200 characters")
        dsn = Dsn(f"{base}?{'&'.join(kept)}" if kept else base)
        self.safe_url = f"{dsn.safe()}?log={self._name}"
        self._door = _AuditDoor(dsn)
        self._door.safe_url = self.safe_url
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._known: Head | None = None
        self._installed = False

    def append(self, new: Draft) -> Entry:
        """See `AuditStore.append`."""
        deadline = Deadline(self._timeout_s)
        if not self._lock.acquire(timeout=self._timeout_s):
            raise AuditUnavailable(self.safe_url, f"other entries were waited for, {self._timeout_s:g} s")
        try:
            self._ready(deadline)
            head = self._known or self._end(deadline)
            pause_s = _PAUSE_FIRST_S
            while True:
                entry = seal(new, head)
                if self._insert(entry, deadline):
                    self._known = entry.head
                    return entry
                head = self._known = self._end(deadline)
                if deadline.left() < pause_s:
                    raise AuditUnavailable(self.safe_url, f"others took each place for {self._timeout_s:g} s")
                time.sleep(pause_s * random.random())  # noqa: S311 - jitter
                pause_s = min(_PAUSE_MAX_S, pause_s * 2)
        except AuditUnavailable:
            self._known = None
            raise
        finally:
            self._lock.release()

    def _insert(self, entry: Entry, deadline: Deadline) -> bool:
        values = {"log": self._name, "seq": entry.seq, "body": encode(entry).decode()}
        part = Deadline(deadline.left() * _SWAP_PART)
        try:
            return bool(self._door.run(_APPEND, values, part, again=False))
        except CatalogUnavailable as error:
            if error.final:
                raise AuditUnavailable(self.safe_url, error.reason) from None
            return self._settle(entry, deadline, error)

    def _settle(self, entry: Entry, deadline: Deadline, error: CatalogUnavailable) -> bool:
        """Learn by reading what became of an insert whose answer did not come; an entry's id tells it from others."""
        pause_s = _PAUSE_FIRST_S
        while True:
            found = self._run(_ONE, (self._name, entry.seq), deadline)
            if found:
                return bool(found[0][0] == encode(entry).decode())
            # It may still be under way in the server: not being there says nothing yet.
            if deadline.left() < pause_s:
                raise AuditUnavailable(self.safe_url, f"an entry was not answered ({error.reason})")
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause_s = min(_PAUSE_MAX_S, pause_s * 2)

    def head(self) -> Head:
        """See `AuditStore.head`."""
        deadline = Deadline(self._timeout_s)
        return self._end(deadline) if self._there(deadline) else GENESIS

    def _end(self, deadline: Deadline) -> Head:
        found = self._run(_NEWEST, (self._name, 1), deadline)
        if not found:
            return GENESIS
        return Head(int(found[0][0]), _entry(found[0]).hash)

    def read(self, after: int = 0, limit: int = PAGE) -> Page:
        """See `AuditStore.read`. A place is the number of a row."""
        deadline = Deadline(self._timeout_s)
        if not self._there(deadline):
            return Page((), after, more=False)
        found = self._run(_AFTER, (self._name, after, limit), deadline)
        return Page(tuple(map(_entry, found)), int(found[-1][0]) if found else after, more=len(found) == limit)

    def last(self, limit: int) -> Page:
        """See `AuditStore.last`."""
        deadline = Deadline(self._timeout_s)
        if not self._there(deadline):
            return Page((), 0, more=False)
        found = self._run(_NEWEST, (self._name, limit), deadline)[::-1]
        return Page(tuple(map(_entry, found)), int(found[-1][0]) if found else 0, more=False)

    def cut(self, through: int) -> int:
        """See `AuditStore.cut`. Rows are deleted, a thousand at a time; the role needs DELETE."""
        deadline = Deadline(self._timeout_s)
        found = self._run(_AFTER, (self._name, 0, 1), deadline) if self._there(deadline) else []
        if not found:
            return 0
        count = 0
        for upto in range(int(found[0][0]) + _BATCH - 1, through + _BATCH, _BATCH):
            count += len(self._run(_CUT, (self._name, min(upto, through)), Deadline(self._timeout_s)))
        return count

    def close(self) -> None:
        """See `AuditStore.close`."""
        self._door.close()

    def _there(self, deadline: Deadline) -> bool:
        if not self._installed:
            self._installed = bool(self._run(_INSTALLED, (), deadline)[0][0])
        return self._installed

    def _ready(self, deadline: Deadline) -> None:
        if not self._there(deadline):
            self._run(_INSTALL, (), deadline)
            self._installed = True

    def _run(
        self, statement: str, values: Sequence[object] | Mapping[str, object], deadline: Deadline
    ) -> Sequence[Row]:
        try:
            return self._door.run(statement, values, deadline)
        except CatalogUnavailable as error:
            raise AuditUnavailable(self.safe_url, error.reason) from None


def _entry(row: Row) -> Entry | Damaged:
    return decode(str(row[1]).encode(), int(row[0]))
