"""One span for each statement and COMMIT, by OpenTelemetry's stable conventions for database clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import psycopg
from sqlalchemy import ClauseElement, Table
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.visitors import iterate

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from shardlib.dsn import Dsn

__all__ = ["Spans"]

_SUMMARY_MAX: Final = 255
_FOLLOWS: Final = (
    ",remoteParentNotSampled:AlwaysOffSampler"
    ",localParentSampled:AlwaysOnSampler,localParentNotSampled:AlwaysOffSampler}"
)
"""How the SDK describes a sampler that takes the decision of the parent, as its default does."""
_WORDS: Final = frozenset((
    "SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "WITH", "VALUES", "TABLE", "COPY", "CALL", "DO", "SET", "SHOW",
    "RESET", "EXPLAIN", "ANALYZE", "LOCK", "TRUNCATE", "CREATE", "ALTER", "DROP", "GRANT", "REVOKE", "COMMENT",
    "REFRESH", "VACUUM", "SAVEPOINT", "RELEASE", "ROLLBACK", "BEGIN", "COMMIT", "DECLARE", "FETCH", "CLOSE", "MOVE",
    "LISTEN", "NOTIFY", "UNLISTEN", "PREPARE", "EXECUTE", "DEALLOCATE", "DISCARD",
))  # fmt: skip
"""First words that a span may show: whatever else begins a text could be a value."""


class _Shown(NamedTuple):
    """What a span tells of a statement."""

    name: str
    attributes: Mapping[str, str]


class Spans:
    """Begins and ends spans. They become nobody's parent: psycopg's work is what they stand for.

    Args:
        tracer: of OpenTelemetry.
        query_text: whether spans hold the text of statements.
    """

    def __init__(self, tracer: Tracer, query_text: bool) -> None:
        from opentelemetry.trace import SpanKind, StatusCode, get_current_span

        self._tracer, self._query_text = tracer, query_text
        self._kind, self._error = SpanKind.CLIENT, StatusCode.ERROR
        self._current = get_current_span
        sampler = getattr(tracer, "sampler", None)  # of the SDK's tracers
        self._follows = sampler is not None and str(sampler.get_description()).endswith(_FOLLOWS)
        self._known: WeakKeyDictionary[Any, _Shown] = WeakKeyDictionary()
        self._endpoints: dict[tuple[str, str], tuple[Dsn, Mapping[str, Any]]] = {}

    def _dropped(self) -> bool:
        """Whether the sampler would drop a span for its parent's sake: what happens to most, told with little work."""
        if not self._follows:
            return False
        parent = self._current().get_span_context()
        return parent.is_valid and not parent.trace_flags.sampled

    def statement(self, conn: Any, context: Any, text: str, batch: int) -> Span | None:
        """The span of a statement that is about to be sent; None if nobody would see it.

        Args:
            conn: a `ShardConnection`.
            context: SQLAlchemy's execution context.
            text: the SQL.
            batch: parameter sets that psycopg sends one by one; 1 for a plain statement.
        """
        if self._dropped():
            return None
        shown = self._shown(context.compiled, text)
        pool = conn.engine.pool
        route = "fan_out" if conn.fan_out is not None else conn.route
        attributes = {
            **self._endpoint(pool), **shown.attributes,
            "shardlib.route": route, "shardlib.topology.version": conn.topology_version,
        }  # fmt: skip
        name = shown.name
        if batch > 1:
            attributes["db.operation.batch.size"] = batch
            for key in ("db.operation.name", "db.query.summary"):
                if key in attributes:
                    attributes[key] = f"BATCH {attributes[key]}"
            name = f"BATCH {name}"
        if self._query_text:
            attributes["db.query.text"] = text
        return self._tracer.start_span(name, kind=self._kind, attributes=attributes)

    def commit(self, pool: Any) -> Span | None:
        """The span of a COMMIT that is about to be sent; None if nobody would see it."""
        if self._dropped():
            return None
        attributes = {**self._endpoint(pool), "db.operation.name": "COMMIT", "db.query.summary": "COMMIT"}
        return self._tracer.start_span("COMMIT", kind=self._kind, attributes=attributes)

    def failed(self, span: Span, error: BaseException) -> None:
        """The error's type and SQLSTATE, and not its text: PostgreSQL puts values of rows there."""
        state = error.sqlstate if isinstance(error, psycopg.Error) else None
        if state:
            span.set_attribute("db.response.status_code", state)
        span.set_attribute("error.type", state or type(error).__name__)
        span.set_status(self._error)

    def _endpoint(self, pool: Any) -> Mapping[str, Any]:
        known = self._endpoints.get((pool.shard, pool.role))
        if known is not None and known[0] is pool.tried:
            return known[1]
        dsn: Dsn = pool.tried
        attributes: dict[str, Any] = {
            "db.system.name": "postgresql", "db.namespace": dsn.dbname, "shardlib.shard.id": pool.shard,
        }  # fmt: skip
        if dsn.host:
            attributes["server.address"] = dsn.host
            if dsn.port.isdigit() and not dsn.host.startswith("/"):
                attributes["server.port"] = int(dsn.port)
        self._endpoints[pool.shard, pool.role] = dsn, attributes
        return attributes

    def _shown(self, compiled: Any, text: str) -> _Shown:
        known = self._known.get(compiled) if compiled is not None else None
        if known is None:
            known = _describe(compiled, text)
            if compiled is not None:
                self._known[compiled] = known
        return known


def _describe(compiled: Any, text: str) -> _Shown:
    """Operation and tables of a statement; the tables of raw SQL are not looked for."""
    word = text.lstrip()[:20].partition(" ")[0].strip("(;\n").upper()
    state = getattr(compiled, "compile_state", None)  # of the ORM: what its statement has become
    statement = getattr(state, "statement", None) if state is not None else getattr(compiled, "statement", None)
    tables: list[str] = []
    if isinstance(statement, UpdateBase):
        tables = [getattr(statement.table, "fullname", "")]
    elif isinstance(statement, ClauseElement):
        tables = list(dict.fromkeys(part.fullname for part in iterate(statement) if isinstance(part, Table)))
    if word not in _WORDS:
        return _Shown("postgresql", {})
    attributes = {"db.operation.name": word}
    summary = word
    for table in filter(None, map(str, tables)):
        if len(summary) + 1 + len(table) > _SUMMARY_MAX:
            break
        summary = f"{summary} {table}"
    attributes["db.query.summary"] = summary
    if len(tables) == 1:
        attributes["db.collection.name"] = str(tables[0])
    return _Shown(summary, attributes)
