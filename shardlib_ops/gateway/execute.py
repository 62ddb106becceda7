"""One request's statement: routed by its key, fenced, run in a transaction of its own, its rows as JSON."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
import psycopg
from sqlalchemy.util import await_only, greenlet_spawn

from shardlib import AsyncShardedEngine, RetryPolicy
from shardlib.engine.pinned import begin_pinned
from shardlib.errors import InvalidArgument, RetryableError, ShardlibError, ShardUnavailable
from shardlib.fence.verdict import lost_connection
from shardlib.key import encode_key
from shardlib.route.retry import next_wait
from shardlib.topology import Shard
from shardlib_ops.gateway.roles import Vetting
from shardlib_ops.gateway.rows import Chunk, TextCursor
from shardlib_ops.gateway.statement import check_statement, leaves_traces
from shardlib_ops.gateway.values import Encoder, encoder_of, needs_type, parameter_text

__all__ = ["Answer", "Emit", "Executor", "Limits", "ResultTooLarge", "Statement", "StatementTimeout"]

T = TypeVar("T")

Emit = Callable[[bytes], Awaitable[object]]
"""Takes some lines of a stream; returns once there is room for more."""

_CHUNK: Final = 200
"""Rows that are held at once while they become JSON."""
_TYPES_MAX: Final = 1_000
_READ_ONLY: Final = b"SET TRANSACTION READ ONLY"
# serialization_failure, deadlock_detected: the server rolled the transaction back and asks to run it again.
_AGAIN: Final = frozenset({"40001", "40P01"})


class ResultTooLarge(ShardlibError):  # noqa: N818 - named like those of shardlib.errors
    """A result is larger than one answer may be. The transaction was rolled back."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(what, limit)
        self.what, self.limit = what, limit

    def __str__(self) -> str:
        return f"the result has more than {self.limit} {self.what}; ask for less with LIMIT, or for a stream"


class StatementTimeout(ShardlibError):  # noqa: N818 - named like those of shardlib.errors
    """The statement did not end in time. It was cancelled and its transaction rolled back."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s)
        self.limit_s = limit_s

    def __str__(self) -> str:
        return f"the statement did not end within {self.limit_s:g} s and was cancelled"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may take.

    Attributes:
        rows_max: rows of an answer; a stream has no such limit.
        bytes_max: bytes of an answer's rows.
        timeout_s: seconds for the statement and the reading of its rows, a stream's too: its transaction holds the
            gate of its range, and a shard that is split waits for it.
    """

    rows_max: int = 10_000
    bytes_max: int = 16 << 20
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Statement:
    """What a program asks for.

    Attributes:
        key: the shard key, of the types that `shardlib.key` knows.
        query: one statement, its parameters as `$1`, `$2`.
        params: their values, as `values.read_json` gives them.
        read_only: whether PostgreSQL shall refuse it if it writes.
        timeout_s: seconds, where it should take less than the gateway allows.
    """

    key: object
    query: str
    params: Sequence[object] = ()
    read_only: bool = False
    timeout_s: float | None = None

    def checked(self) -> Statement:
        """This statement, if it is one that the gateway runs.

        Raises:
            InvalidArgument: it is not.
        """
        check_statement(self.query)
        return self


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it.

    Attributes:
        shard_id: where it ran.
        rows: the rows as one JSON array.
        row_count: rows that were returned, or changed by a statement that returns none.
        latency_ms: milliseconds from the first attempt to the end of the transaction.
    """

    shard_id: str
    rows: bytes
    row_count: int
    latency_ms: float

    def json(self) -> bytes:
        """The answer as the body of a response."""
        return b'{"shard_id":%b,"rows":%b,"row_count":%d,"latency_ms":%.3f}' % (
            msgspec.json.encode(self.shard_id), self.rows, self.row_count, self.latency_ms,
        )  # fmt: skip


class Executor:
    """Runs statements on an engine that it does not own.

    Attributes:
        limits: what one request may take.
        vetting: who looks at the connections.

    Args:
        engine: the engine.
        limits: see above.
        retry: how often work is tried that certainly left nothing behind, within the time of the statement.
        any_role: whether statements also run as a role of the database that may do too much, see `roles`.
    """

    def __init__(
        self,
        engine: AsyncShardedEngine,
        limits: Limits | None = None,
        retry: RetryPolicy | None = None,
        *,
        any_role: bool = False,
    ) -> None:
        self._engine, self.limits, self._retry = engine, limits or Limits(), retry or RetryPolicy()
        self.vetting = Vetting(self.limits.timeout_s, any_role=any_role)
        self._types: dict[str, list[int]] = {}

    async def run(self, statement: Statement) -> Answer:
        """Run a statement and commit it.

        It is tried again after errors that certainly left nothing behind, never after a COMMIT of unknown outcome.

        Raises:
            InvalidArgument: a statement, parameter or column name that the gateway does not take.
            InvalidShardKey: the key.
            ResultTooLarge, StatementTimeout: its limits; nothing is left behind.
            RoleTooStrong: the gateway comes to the shard as a role that may do too much.
            CommitOutcomeUnknown: COMMIT was sent, and no answer came.
            RetryableError: as `AsyncShardedEngine.run`.
            psycopg.Error: what PostgreSQL says of the statement.
        """
        statement.checked()
        began, attempt = time.perf_counter(), 0
        while True:
            attempt += 1
            try:
                chunk_rows = min(_CHUNK, self.limits.rows_max + 1)
                shard_id, (rows, count) = await greenlet_spawn(self._transact, statement, chunk_rows, self._collect)
                return Answer(shard_id, rows, count, (time.perf_counter() - began) * 1_000)
            except Exception as error:
                wait_s = self._wait_s(statement, error, attempt, time.perf_counter() - began)
                if wait_s is None:
                    raise
                await asyncio.sleep(wait_s)

    def _wait_s(self, statement: Statement, error: Exception, attempt: int, passed_s: float) -> float | None:
        """Seconds until the next attempt; None if there is none."""
        self._types.pop(statement.query, None)
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # an error of the server took the place of the cancellation
            return None
        again = RetryableError() if isinstance(error, psycopg.Error) and error.sqlstate in _AGAIN else error
        wait_s = next_wait(again, attempt, self._retry, random.uniform(0.5, 1.0))  # noqa: S311
        return None if wait_s is None or passed_s + wait_s >= self._limit_s(statement) else wait_s

    def _limit_s(self, statement: Statement) -> float:
        return min(statement.timeout_s or self.limits.timeout_s, self.limits.timeout_s)

    async def _collect(self, chunks: AsyncIterator[Chunk]) -> tuple[bytes, int]:
        """The rows as one array, and how many there are, or were changed."""
        parts: list[bytes] = []
        size = changed = 0
        encode = None
        async for chunk in chunks:
            changed = chunk.changed if chunk.last and chunk.changed is not None else changed
            encode = encode or _row_encoder(chunk)
            for row in range(chunk.result.ntuples):
                parts.append(encode(chunk, row))
                size += len(parts[-1])
            if len(parts) > self.limits.rows_max:
                raise ResultTooLarge("rows", self.limits.rows_max)
            if size > self.limits.bytes_max:
                raise ResultTooLarge("bytes", self.limits.bytes_max)
        returns = encode is not None and encode is not _no_row
        return b"[" + b",".join(parts) + b"]", len(parts) if returns else changed

    async def stream(self, statement: Statement, emit: Emit) -> None:
        """Run a statement and commit it; emit `{"row":{…}}` lines, and `{"end":{…}}` once it is committed.

        The time of the statement goes on while `emit` waits for a slow reader. Before the first line it is tried again
        as `run` does.

        Raises:
            Exception: as `run`, or what `emit` raises. Rows that were emitted do not count then.
        """
        statement.checked()
        began, attempt = time.perf_counter(), 0
        given = changed = 0

        async def pass_on(chunks: AsyncIterator[Chunk]) -> None:
            nonlocal given, changed
            encode = None
            async for chunk in chunks:
                changed = chunk.changed if chunk.last and chunk.changed is not None else changed
                encode = encode or _row_encoder(chunk)
                if chunk.result.ntuples:
                    lines = [b'{"row":' + encode(chunk, row) + b"}\n" for row in range(chunk.result.ntuples)]
                    given += len(lines)
                    await emit(b"".join(lines))

        while True:
            attempt += 1
            try:
                shard_id, _ = await greenlet_spawn(self._transact, statement, _CHUNK, pass_on)
            except Exception as error:
                wait_s = None if given else self._wait_s(statement, error, attempt, time.perf_counter() - began)
                if wait_s is None:
                    raise
                await asyncio.sleep(wait_s)
            else:
                took_ms = (time.perf_counter() - began) * 1_000
                await emit(b'{"end":{"shard_id":%b,"row_count":%d,"latency_ms":%.3f}}\n' % (
                    msgspec.json.encode(shard_id), given or changed, took_ms,
                ))  # fmt: skip
                return

    def _transact(
        self, statement: Statement, rows: int, consume: Callable[[AsyncIterator[Chunk]], Awaitable[T]]
    ) -> tuple[str, T]:
        """The statement in a transaction of its own; the id of its shard, and what `consume` made of its rows.

        All of it in one of SQLAlchemy's greenlets: one for each step costs more than the steps.
        """
        core = self._engine.sync_engine._core  # noqa: SLF001 - the engine's own inside
        conn = begin_pinned(core, encode_key(statement.key))
        shard: Any = conn.shard
        driver, info = conn.driver, conn.info
        try:
            result, vetted = await_only(self._work(driver, info, shard, statement, rows, consume))
            conn.commit()
            if vetted is not None:
                info.update(vetted)
            if leaves_traces(statement.query):
                conn.invalidate()
            return shard.id, result
        finally:
            if driver.closed and not conn.invalidated:
                conn.invalidate()  # there is nothing left to roll back
            conn.close()

    async def _work(
        self,
        driver: Any,
        info: Mapping[Any, Any],
        shard: Shard,
        statement: Statement,
        rows: int,
        consume: Callable[[AsyncIterator[Chunk]], Awaitable[T]],
    ) -> tuple[T, dict[str, object] | None]:
        """What is between BEGIN and COMMIT, within the time of the statement."""
        limit = asyncio.timeout(self._limit_s(statement))
        try:
            async with limit:
                if statement.read_only:
                    await driver.wait(driver.message(_READ_ONLY))
                vetted = await self.vetting.vet(driver, info, shard.name)
                cursor = TextCursor(driver)
                params = await self._texts(cursor, statement)
                async with aclosing(cursor.texts(statement.query, params, rows=rows)) as chunks:
                    return await consume(chunks), vetted
        except TimeoutError:
            if limit.expired():
                raise StatementTimeout(self._limit_s(statement)) from None
            raise
        except psycopg.Error as error:
            if limit.expired():  # the server's error crossed the request to cancel
                raise StatementTimeout(self._limit_s(statement)) from error
            # Before COMMIT, so nothing is left behind.
            if driver.closed and lost_connection(error):
                raise ShardUnavailable(shard.name, "the connection was lost") from error
            raise

    async def _texts(self, cursor: TextCursor, statement: Statement) -> list[bytes | None]:
        if not any(needs_type(value) for value in statement.params):
            return [parameter_text(value) for value in statement.params]
        types = self._types.get(statement.query)
        if types is None:
            if len(self._types) >= _TYPES_MAX:
                self._types.pop(next(iter(self._types)))
            types = self._types[statement.query] = await cursor.parameter_types(statement.query)
        if len(types) != len(statement.params):
            raise InvalidArgument("params", len(statement.params), f"{len(types)} of them, as the query has")
        return [parameter_text(value, oid) for value, oid in zip(statement.params, types, strict=True)]


def _no_row(chunk: Chunk, row: int) -> bytes:
    raise AssertionError(f"row {row} of a statement that returns none: {chunk.result}")


def _row_encoder(chunk: Chunk) -> Callable[[Chunk, int], bytes]:
    """Makes a row of this result a JSON object.

    Raises:
        InvalidArgument: two columns have one name.
    """
    result = chunk.result
    if not result.nfields:
        return _no_row
    names = [(result.fname(column) or b"").decode() for column in range(result.nfields)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument("query", twice, "columns whose names differ; give one another name with AS")
    columns: list[tuple[int, bytes, Encoder]] = [
        (column, msgspec.json.encode(name) + b":", encoder_of(result.ftype(column)))
        for column, name in enumerate(names)
    ]

    def encode(chunk: Chunk, row: int) -> bytes:
        value_of = chunk.result.get_value
        return b"{" + b",".join([
            name + (b"null" if (text := value_of(row, column)) is None else encoder(text))
            for column, name, encoder in columns
        ]) + b"}"  # fmt: skip

    return encode
