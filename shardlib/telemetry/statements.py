"""Where statements leave for the server: SQLAlchemy's dialect, watched while somebody wants to know."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from psycopg import pq

from shardlib.telemetry.metrics import Metrics, blame
from shardlib.telemetry.spans import Spans

__all__ = ["Statements"]

_IDLE: Final = pq.TransactionStatus.IDLE


class Statements:
    """Stands in an engine's dialect before what sends a statement or COMMIT; installed when telemetry is first on.

    Args:
        dialect: of all shards of one engine.
    """

    def __init__(self, dialect: Any) -> None:
        self.metrics: Metrics | None = None
        self.spans: Spans | None = None
        self._execute, self._many = dialect.do_execute, dialect.do_executemany
        self._plain, self._commit = dialect.do_execute_no_params, dialect.do_commit
        dialect.do_execute, dialect.do_executemany = self.do_execute, self.do_executemany
        dialect.do_execute_no_params, dialect.do_commit = self.do_execute_no_params, self.do_commit

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        """See `sqlalchemy.engine.Dialect`, as for the others."""
        self._watched(context, statement, 1, self._execute, cursor, statement, parameters, context)

    def do_executemany(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        """Several parameter sets."""
        self._watched(context, statement, len(parameters), self._many, cursor, statement, parameters, context)

    def do_execute_no_params(self, cursor: Any, statement: str, context: Any = None) -> None:
        """With `no_parameters`."""
        self._watched(context, statement, 1, self._plain, cursor, statement, context)

    def _watched(self, context: Any, text: str, batch: int, send: Callable[..., None], *arguments: Any) -> None:
        conn: Any = None if context is None else context.root_connection
        shard = getattr(conn, "shard", None)
        if shard is None:  # what a dialect asks of a new connection
            send(*arguments)
            return
        metrics, spans = self.metrics, self.spans
        if metrics is not None:
            metrics.sent(shard.id)
        span = None if spans is None else spans.statement(conn, context, text, batch)
        began = time.perf_counter() if conn.pinned else 0.0
        try:
            send(*arguments)
        except BaseException as error:
            blame(error, shard.id)
            if spans is not None and span is not None:
                spans.failed(span, error)
            if metrics is not None and conn.pinned:
                metrics.failed(error, shard.id)
            raise
        finally:
            if span is not None:
                span.end()
            if metrics is not None and conn.pinned:  # a session's requests are counted where they are routed
                metrics.done("core", time.perf_counter() - began)

    def do_commit(self, dbapi_connection: Any) -> None:
        """COMMIT, unless there is nothing to commit."""
        record: Any = getattr(dbapi_connection, "_connection_record", None)
        pool = getattr(record, "home", None)
        if pool is None or record.fenced.rolling_back or record.pgconn.transaction_status == _IDLE:
            self._commit(dbapi_connection)
            return
        metrics, spans = self.metrics, self.spans
        if metrics is not None:
            metrics.sent(pool.shard)
        span = None if spans is None else spans.commit(pool)
        try:
            self._commit(dbapi_connection)
        except BaseException as error:
            if spans is not None and span is not None:
                spans.failed(span, error)
            if metrics is not None:
                metrics.failed(error, pool.shard)
            raise
        finally:
            if span is not None:
                span.end()
