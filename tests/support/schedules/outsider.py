"""A writer that has never heard of shardlib: it writes to the old side of a job, without a gate."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self
from uuid import uuid4

import psycopg

from tests.support.history import Outcome, Write

_PAUSE_S = 0.08


class Outsider:
    """Writes rows of keys straight to the servers that own them when a job begins; use as a context manager.

    Between the switch and the end of a rollback the database has to refuse it. Where the job is to be completed, `stop`
    comes before that: afterwards nothing guards the old side.

    Args:
        keys: key -> DSN of the database that owns it.
        rng: chooses.
    """

    def __init__(self, keys: Mapping[str, str], rng: random.Random) -> None:
        self._keys, self._rng = dict(keys), rng
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outsider", daemon=True)
        self.writes: list[Write] = []
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        if self._keys:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End, and have ended; idempotent."""
        self._stop.set()
        if self._keys:
            self._thread.join(60)
            assert not self._thread.is_alive(), "the writer without a gate hangs"
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        connections: dict[str, psycopg.Connection[object]] = {}
        try:
            for number in itertools.count():
                if self._stop.wait(_PAUSE_S * self._rng.random()):
                    break
                key = self._rng.choice(sorted(self._keys))
                self.writes.append(self._write(connections, self._keys[key], key, f"outside-{uuid4().hex}", number))
        except BaseException as error:  # noqa: BLE001 - raised by `stop`
            self.failure = error
        finally:
            for conn in connections.values():
                conn.close()

    def _write(
        self, connections: dict[str, psycopg.Connection[object]], dsn: str, key: str, uid: str, number: int
    ) -> Write:
        began = time.monotonic()
        outcome: Outcome = "failed"
        text = ""
        try:
            conn = connections.get(dsn)
            if conn is None or conn.closed:
                conn = connections[dsn] = psycopg.connect(dsn, connect_timeout=5, options="-c statement_timeout=20s")
            try:
                conn.execute("INSERT INTO bag (key, uid) VALUES (%s, %s)", (key, uid))
                if number % 3 == 0:
                    self._stop.wait(0.01)
                conn.execute("UPDATE counter SET v = v + 1 WHERE key = %s", (key,))
                outcome = "unknown"
                conn.commit()
                outcome = "ok"
            except psycopg.Error:
                if not conn.closed:
                    conn.rollback()
                raise
        except psycopg.Error as error:
            text = f"{type(error).__name__}: {error}"[:200]
            if outcome == "unknown" and error.sqlstate is not None and not error.sqlstate.startswith(("57", "08")):
                outcome = "failed"  # the server itself said that it was not committed
        return Write(key, uid, None, began, time.monotonic(), outcome, text)
