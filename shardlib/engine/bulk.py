"""`engine.bulk_load`: rows from anywhere into all shards, at the speed of COPY.

The rows are read once, in portions. Each portion becomes text a column at a time, is split by shard and appended
to a COPY that runs on each of them, in a transaction that holds the gates of what it writes. Nothing is committed
before every shard has accepted all of its rows.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from operator import itemgetter
from typing import Any, Final

from shardlib.checks import check
from shardlib.engine.bulk_commit import Commits
from shardlib.engine.bulk_copy import CopyLeg
from shardlib.engine.bulk_rows import RowShape, Target, portions
from shardlib.engine.bulk_split import Splitter
from shardlib.engine.bulk_text import TableText, block_of
from shardlib.engine.options import CALLS
from shardlib.errors import InvalidArgument, ShardKeyRequired, StaleTopology, UnsupportedOperation
from shardlib.fence.verdict import GateClosed
from shardlib.session.core import Core, Needed
from shardlib.shard import ShardConnection
from shardlib.topology import Shard, Status, Topology

__all__ = ["BulkProgress", "BulkResult", "bulk_load"]

_PORTION_BYTES: Final = 256 * 1024
_PORTION_ROWS: Final = (16, 1024)
_REPORT_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class BulkProgress:
    """How far a bulk load is."""

    rows_read: int
    """From the source."""
    rows_sent: dict[str, int]
    """Shard name -> rows made ready for it; a reference table's rows count on every shard."""
    rows_committed: dict[str, int]
    """Shard name -> rows that are committed there."""
    bytes_sent: int
    """Size of the text of all rows, over all shards."""
    elapsed_s: float
    done: bool
    """Everything is committed; this is the last report."""


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What a bulk load has done."""

    rows: int
    """Rows of the source, all committed."""
    rows_by_shard: dict[str, int]
    """Shard name -> rows committed there; shards without any are left out."""
    bytes: int
    """Size of the text of all rows, over all shards."""
    elapsed_s: float


Progress = Callable[[BulkProgress], Any]


def bulk_load(
    core: Core,
    table: Any,
    rows: Any,
    *,
    columns: Sequence[Any] | None,
    progress: Progress | None,
    batch_rows: int | None,
    stall_timeout_s: float,
) -> BulkResult:
    """See `ShardedEngine.bulk_load`. Blocking, or inside SQLAlchemy's greenlet for asyncio."""
    given = {"columns": columns, "progress": progress, "batch_rows": batch_rows, "stall_timeout_s": stall_timeout_s}
    check(CALLS, given)
    take = portions(rows, core.waits)
    if core.metrics is None:
        return _Load(core, Target(table), columns, progress, batch_rows, stall_timeout_s).run(take)
    with core.metrics.request("bulk_load"):
        return _Load(core, Target(table), columns, progress, batch_rows, stall_timeout_s).run(take)


class _Load:
    """One load, from its first row to its last commit."""

    def __init__(
        self,
        core: Core,
        target: Target,
        columns: Sequence[Any] | None,
        progress: Progress | None,
        batch_rows: int | None,
        stall_timeout_s: float,
    ) -> None:
        self._core, self._target, self._progress = core, target, progress
        self._batch_rows, self._stall_timeout_s = batch_rows, stall_timeout_s
        self._spec = core.describe(target.table)
        self._topology: Topology = core.cache.current
        self._legs: dict[str, CopyLeg] = {}
        self._commits = Commits(core.waits, target.table.fullname)
        self._rows = self._bytes = 0
        self._sent: dict[str, int] = {}
        self._began = self._reported = time.monotonic()
        self._shape: RowShape | None = None
        if columns is not None:
            self._take_shape([_name(column) for column in columns], "columns")

    # -- the whole ------------------------------------------------------------------------------------------------

    def run(self, take: Callable[[int], list[Any]]) -> BulkResult:
        try:
            count = 64
            while rows := take(count):
                self._feed(rows)
                count = self._next_count()
                if self._core.waits.is_async:
                    self._core.waits.sleep(0)  # a portion is work without a wait; other tasks have their turn
                self._report(done=False)
            self._commit(list(self._legs.values()))
        except BaseException as error:
            left = [leg.shard.name for leg in self._legs.values() if leg.rows]
            self._abort()
            if not isinstance(error, Exception):
                self._commits.tell(error)
            elif (incomplete := self._commits.incomplete(error, left)) is not None:
                raise incomplete from error
            raise
        self._report(done=True)
        return BulkResult(self._rows, dict(self._commits.committed), self._bytes, time.monotonic() - self._began)

    def _next_count(self) -> int:
        least, most = _PORTION_ROWS
        mean = max(1, self._bytes // max(1, sum(self._sent.values())))
        return min(max(_PORTION_BYTES // mean, least), most, self._batch_rows or most)

    def _report(self, *, done: bool) -> None:
        now = time.monotonic()
        if self._progress is None or (not done and now - self._reported < _REPORT_S):
            return
        self._reported = now
        sent, committed = dict(self._sent), dict(self._commits.committed)
        answer = self._progress(BulkProgress(self._rows, sent, committed, self._bytes, now - self._began, done))
        if isawaitable(answer):
            self._core.waits.await_(answer)

    # -- rows -----------------------------------------------------------------------------------------------------

    def _take_shape(self, names: Sequence[str], at: str) -> RowShape:
        shape = self._target.shape(names, at)
        keys = [column.key for column in shape.columns]
        missing = [key for key in self._spec.column_keys if key not in keys]
        if missing:
            raise ShardKeyRequired(
                f"the rows for {self._target.table.fullname!r} have no {', '.join(map(repr, missing))}, "
                "which decides where they go",
                "give the shard key in each row",
            )
        dialect = self._core.pools.dialect
        self._text = TableText(shape.columns, dialect)
        self._split = Splitter(self._spec, [keys.index(key) for key in self._spec.column_keys])
        quoted = dialect.identifier_preparer
        names_sql = ", ".join(quoted.format_column(column) for column in shape.columns)
        self._command = (
            f"COPY {quoted.format_table(self._target.table)} ({names_sql}) FROM STDIN (FORMAT text, ENCODING 'UTF8')"
        )
        self._shape = shape
        return shape

    def _feed(self, rows: list[Any]) -> None:
        first = self._rows + 1
        shape = self._shape
        if shape is None:
            if not isinstance(rows[0], Mapping):
                raise InvalidArgument("row 1", rows[0], "a mapping, or a tuple if columns=[...] is given")
            shape = self._take_shape(list(rows[0]), "row 1")
        values = shape.values(rows, first)
        lines = self._text.lines(values, first)
        if self._batch_rows is not None:
            self._topology = self._core.cache.current  # each transaction routes by the topology it begins with
        if self._spec.reference:
            self._feed_all(lines, first)
        else:
            self._feed_each(values, lines, first)
        self._rows += len(rows)
        self._commit_full()

    def _feed_all(self, lines: list[str], first: int) -> None:
        legs = self._hold(lambda topology: {s.id: (topology.default_gate(s.id),) for s in _holders(topology)})
        block = _encoded(lines, first, range(len(lines)))
        for leg in legs:
            self._give(leg, block, len(lines), first, None)

    def _feed_each(self, values: list[Sequence[Any]], lines: list[str], first: int) -> None:
        parts: dict[str, array[int]] = {}

        def wants(topology: Topology) -> Needed:
            nonlocal parts
            needed, parts = self._split.parts(topology, values, first)
            return needed

        for leg in self._hold(wants):
            positions = parts[leg.shard.id]
            its = [lines[positions[0]]] if len(positions) == 1 else itemgetter(*positions)(lines)
            block = _encoded(its, first, positions)
            self._give(leg, block, len(positions), first, positions)

    def _give(self, leg: CopyLeg, block: bytes, count: int, first: int, positions: array[int] | None) -> None:
        leg.add(block, count, first, positions)
        self._bytes += len(block)
        self._sent[leg.shard.name] = self._sent.get(leg.shard.name, 0) + count

    # -- transactions ---------------------------------------------------------------------------------------------

    def _hold(self, wants: Callable[[Topology], Needed]) -> list[CopyLeg]:
        """A leg for each shard that a portion needs, with the gates it needs.

        As long as no transaction of the load has rows, a closed gate means to route anew by a newer topology.

        Raises:
            StaleTopology: a gate is closed and rows were sent, or no topology with an open one came in time.
        """
        deadline, attempt = 0.0, 0
        while True:
            needed = wants(self._topology)
            refused = self._take(needed)
            if refused is None:
                return [self._legs[shard_id] for shard_id in needed]
            shard, closed = refused
            if self._batch_rows is not None:
                self._commit(list(self._legs.values()))
            elif self._legs:
                raise StaleTopology(shard.name, closed.gates[0], self._topology.version)
            deadline = deadline or time.monotonic() + self._core.reroute_timeout_s
            self._topology = self._core.newer(self._topology, closed, shard.name, deadline, attempt)
            attempt += 1

    def _take(self, needed: Needed) -> tuple[Shard, GateClosed] | None:
        for shard_id, gates in needed.items():
            leg = self._legs.get(shard_id)
            missing = () if leg is None else tuple(gate for gate in gates if gate not in leg.gates)
            if leg is not None and missing:
                if self._batch_rows is None:
                    leg.lock(missing, self._topology.version)
                else:
                    self._commit([leg])  # a transaction that has not begun can be routed anew
        fresh = [(self._topology.shard(i), gates) for i, gates in needed.items() if i not in self._legs]
        return self._open(fresh) if fresh else None

    def _open(self, fresh: list[tuple[Shard, tuple[int, ...]]]) -> tuple[Shard, GateClosed] | None:
        """Begin on these shards side by side, on all or none."""
        begun: dict[str, tuple[ShardConnection, tuple[int, ...]]] = {}
        refusals: list[tuple[Shard, GateClosed]] = []

        def begin(shard: Shard, gates: tuple[int, ...]) -> None:
            if shard.status is Status.READONLY:
                raise UnsupportedOperation(
                    f"shard {shard.name!r} is read-only", "write again once its status is active"
                )
            try:
                begun[shard.id] = self._core.connect(shard, gates), gates
            except GateClosed as closed:
                refusals.append((shard, closed))

        try:
            self._core.waits.run_all([partial(begin, shard, gates) for shard, gates in fresh])
            if refusals:
                return refusals[0]
            legs = [CopyLeg(shard, *begun.pop(shard.id), self._command, self._stall_timeout_s) for shard, _ in fresh]
        finally:
            for conn, _ in begun.values():
                conn.close()
        self._legs.update((leg.shard.id, leg) for leg in legs)
        self._core.waits.run_all([leg.begin for leg in legs])
        return None

    def _commit_full(self) -> None:
        """Commit what has reached the size of a batch."""
        if self._batch_rows is None:
            return
        full = [leg for leg in self._legs.values() if leg.rows >= self._batch_rows]
        if full:
            # The copies of a reference table have the same rows, so they are full together.
            self._commit(full)

    def _commit(self, legs: list[CopyLeg]) -> None:
        self._commits.commit(legs)
        for leg in legs:
            del self._legs[leg.shard.id]

    def _abort(self) -> None:
        legs, self._legs = self._legs, {}
        for leg in legs.values():
            leg.abort()


def _encoded(lines: Sequence[str], first: int, positions: Sequence[int]) -> bytes:
    """Lines as bytes.

    Raises:
        InvalidArgument: a row holds a lone surrogate.
    """
    try:
        return block_of(lines)
    except UnicodeEncodeError as error:
        part = error.object[: error.start]
        row = first + positions[part.count("\n")]
        raise InvalidArgument(
            f"row {row}", error.object[error.start : error.end], "a lone surrogate is no character and has no UTF-8"
        ) from None


def _name(column: Any) -> str:
    """What `columns` names: a string, or a Column or mapped attribute."""
    name = column if isinstance(column, str) else getattr(column, "key", None)
    if not isinstance(name, str):
        raise InvalidArgument("columns", column, "names of columns, or the columns themselves")
    return name


def _holders(topology: Topology) -> list[Shard]:
    """The shards that hold the reference tables: all that have a gate to write through."""
    gated = {gate.shard_id for gate in topology.gates if not gate.ranges}
    return [shard for shard in topology.shards if shard.id in gated]
