"""A leg's changes flow from its origin to its sink, each exactly once, in commit order.

::

    origin's slot ──► read: decode, filter ──► queue ──► apply: one transaction at the sink ──► hand over new keys
          ▲                                                                                          │
          └──────────────────── confirm: only what is durable at the sink ◄──────────────────────────┘

The position is an LSN of the origin just after a commit record, written at the sink in the transaction that applies the
changes; a transaction whose commit record begins before it is skipped. The slot is never told of more than the position
says, so a slot that is ahead of the position shows that the sink lost transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NoReturn

from psycopg import AsyncConnection

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.room import no_room
from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.stream.apply import Key, Sink
from shardlib_ops.reshard.stream.decode import lsn_text
from shardlib_ops.reshard.stream.faults import SlotLost
from shardlib_ops.reshard.stream.filter import Change, Filter, Transaction, mover
from shardlib_ops.reshard.stream.origin import columns_of, take_slot
from shardlib_ops.reshard.stream.progress import Lag, Progress
from shardlib_ops.reshard.stream.recent import Recent
from shardlib_ops.reshard.stream.wire import Wire

__all__ = ["NewKeys", "Standstill", "Stream"]

_log: Final = logging.getLogger("shardlib.reshard.stream")

NewKeys = Callable[[Sequence[Key]], Awaitable[None]]
"""Called with keys (first part, other parts) that the sink did not know; has to make them durable elsewhere."""

_BATCH_BYTES: Final = 8 << 20
_READ_S: Final = 1.0
_PULSE_S: Final = 0.5
_CONFIRM_S: Final = 5.0
_REST_S: Final = 10.0
_ASK_FIRST_S: Final = 0.002
_ASK_MAX_S: Final = 0.1
_KEYS_AT_ONCE: Final = 10_000
_HEARD_MAX: Final = 1_000
_KEEPALIVE: Final = 0x6B
_EVERYTHING: Final = 1 << 64


class Stream:
    """Reads a leg's slot and applies what concerns the leg.

    A TRUNCATE at the origin deletes the rows of the leg's keys at the sink. A change of a table's columns is seen with
    the first change of a row after it.

    Args:
        link: the leg and the direction.
        shapes: all tables of the publication.
        on_new_keys: gets the keys that the sink's key table did not hold, after the commit that added them and before
            the slot is told of it. After a crash it gets the same keys again. None: nobody needs them.
        batch_changes: changes that one transaction at the sink holds when there is a backlog.
        clock: seconds, rising.

    Attributes:
        applied: LSN: every transaction that ends at or below it and concerns the leg is committed at the sink, and its
            new keys are handed over.
        received: LSN up to which the origin has sent.
        changes_applied: row changes written since this object was made.
        transactions_applied: transactions of the origin with such changes.
        recent: which rows were changed since a comparison began.
    """

    def __init__(
        self,
        link: Link,
        shapes: Sequence[TableShape],
        *,
        on_new_keys: NewKeys | None = None,
        batch_changes: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if batch_changes < 1:
            raise InvalidArgument("batch_changes", batch_changes, "at least 1")
        self._link, self._shapes, self._on_new_keys = link, tuple(shapes), on_new_keys
        self._batch, self._clock = batch_changes, clock
        self._progress, self._lag = Progress(link.slot), Lag(clock)
        self._moves = mover(link.ranges, link.hash_function)
        self._limit = _EVERYTHING
        self._standing = asyncio.Lock()
        self._heard: dict[str, int] = {}
        self._running = False
        self.applied = self.received = 0
        self.changes_applied = self.transactions_applied = 0
        self._reset()

    def _reset(self) -> None:
        self._queue: deque[Transaction] = deque()
        self._queued = self._queued_bytes = 0
        self._busy = False
        self._handing: asyncio.Task[None] | None = None
        self._durable = self._written = 0
        self._confirmed_at = self._rested_at = self._clock()
        self._wire: Wire | None = None
        self._filter: Filter | None = None
        self.recent = Recent()  # what was committed as the last run broke off is not in it

    @property
    def lag_bytes(self) -> int | None:
        """WAL of the origin that is not applied yet; None while that is not known."""
        return self._lag.bytes(self.applied) if self._running else None

    @property
    def lag_s(self) -> float | None:
        """Age of the oldest WAL of the origin that is not applied yet, within half a second; None if not known."""
        return self._lag.seconds(self.applied) if self._running else None

    @property
    def origin_end(self) -> int | None:
        """LSN up to which the origin has written its WAL to disk, within half a second; None while not known."""
        return self._lag.last if self._running else None

    @property
    def held(self) -> bool:
        """Whether it stands still since somebody asked it to."""
        return self._limit != _EVERYTHING

    async def run(self) -> None:
        """Let changes flow until cancelled. After an error it may be called again, and goes on where it was.

        Raises:
            ShardUnavailable, psycopg.OperationalError: a server went away; see `connect.is_lost`.
            psycopg.Error: SQLSTATE SL001: a later runner holds the job; see `connect.is_superseded`.
            SlotLost: the copy has to start anew.
            Lost: the sink's disk is full.
            SchemaChanged, Diverged, CannotFollow: running it again does not help.
            InvalidTopology: no start was written down at the sink.
        """
        if self._running:
            raise InvalidArgument("run", self._link.slot, "a stream runs once at a time")
        self._running = True
        self._reset()
        self._progress.failure = None
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._run(stack)
        except BaseException as error:
            failure = _first(error)
            self._progress.failure = failure
            if failure is error:
                raise
            raise failure from failure.__cause__
        finally:
            self._running, self._wire = False, None
            self._progress.changed()

    async def _run(self, stack: contextlib.AsyncExitStack) -> None:
        link = self._link
        sink = await Sink.open(link, self._shapes)
        stack.push_async_callback(sink.close)
        position, copied = await sink.start()
        origin = await link.open_origin("watch")
        stack.push_async_callback(origin.close)
        confirmed = await take_slot(origin, link)
        if position is None:
            raise InvalidTopology(
                f"shard {link.sink.name!r} does not say where the stream from slot {link.slot!r} starts",
                "write it down with start_position",
            )
        if position < confirmed:
            raise SlotLost(
                f"slot {link.slot!r} was told that shard {link.sink.name!r} has everything up to {lsn_text(confirmed)},"
                f" and it has {lsn_text(position)}: it lost transactions, as in a failover to a replica that was"
                " behind",
                "the copy has to start anew",
            )
        if self._on_new_keys is not None:
            again = await sink.keys_after(confirmed, self._moves)
            for at in range(0, len(again), _KEYS_AT_ONCE):
                await self._on_new_keys(again[at : at + _KEYS_AT_ONCE])
        self._filter = Filter(
            self._shapes,
            self._moves,
            columns=await columns_of(origin, self._shapes, link.origin.name),
            position=position,
            copied=copied,
            limit=self._batch,
            limit_bytes=_BATCH_BYTES,
        )
        self._durable = self._written = position
        self.applied, self.received = max(self.applied, position), max(self.received, position)
        self._wire = await Wire.open(link, position)
        stack.push_async_callback(self._wire.close)
        _log.info("slot %s: streaming from %s", link.slot, lsn_text(position))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(self._wire, self._filter))
            tasks.create_task(self._apply(sink, tasks))
            tasks.create_task(self._pulse(origin))

    # Reading

    async def _read(self, wire: Wire, changes: Filter) -> NoReturn:
        while True:
            messages = await wire.read(_READ_S)
            at = 0
            for index, message in enumerate(messages):
                if message[0] == _KEEPALIVE:
                    changes.feed(messages[at:index])
                    at = index + 1
                    self._kept_alive(message, changes)
            changes.feed(messages[at:] if at else messages)
            self.received = max(self.received, changes.complete)
            for transaction in changes.take():
                self._queue.append(transaction)
                self._queued += len(transaction.changes)
                self._queued_bytes += transaction.size
            self._settle()
            self._progress.changed()
            await asyncio.sleep(0)
            while self._queued > 2 * self._batch or self._queued_bytes > 2 * _BATCH_BYTES:
                await self._progress.next()

    def _kept_alive(self, message: bytes, changes: Filter) -> None:
        lsn = int.from_bytes(message[1:9], "big")
        changes.at_rest(lsn)
        self.received = max(self.received, lsn)
        if message[17]:
            self._confirm(ask=False)

    def _confirm(self, *, ask: bool) -> None:
        if self._wire is not None:
            self._wire.confirm(self.received, self._durable, ask=ask)
            self._confirmed_at = self._clock()

    # Applying

    def _allowed(self) -> bool:
        return bool(self._queue) and (self._busy or self._queue[0].commit < self._limit)

    async def _apply(self, sink: Sink, tasks: asyncio.TaskGroup) -> NoReturn:
        fresh: list[Key] = []
        told: list[str] = []
        while True:
            while not self._allowed():
                if not self._busy and self._rest_due():
                    await self._rest(sink)
                else:
                    await self._progress.next()
            self._busy = True
            batch = self._next_batch()
            told += [text for part in batch for text in part.messages]
            changes: list[Change] = [change for part in batch for change in part.changes]
            keys: dict[bytes, None] = {}
            for part in batch:
                keys.update(part.keys)
            last = batch[-1].end
            if changes or sink.begun:
                lsn = batch[-1].commit + 1 if last is None else last
                with no_room(self._link.sink.name):
                    fresh += await sink.write(changes, keys, lsn=lsn, last=last is not None)
                self.recent.add(changes, lsn)
                self.changes_applied += len(changes)
                self.transactions_applied += sum(1 for part in batch if part.end is not None and part.changes)
            if last is None:
                continue
            self._written = sink.position
            await self._hand_over(fresh, told, last, tasks)
            fresh, told = [], []

    def _next_batch(self) -> list[Transaction]:
        batch: list[Transaction] = []
        count = size = 0
        while self._queue and count < self._batch and size < _BATCH_BYTES:
            if self._queue[0].commit >= self._limit and (not batch or batch[-1].end is not None) and batch:
                break
            part = self._queue.popleft()
            batch.append(part)
            count, size = count + len(part.changes), size + part.size
        self._queued -= count
        self._queued_bytes -= size
        self._progress.changed()
        return batch

    async def _hand_over(self, fresh: list[Key], told: list[str], end: int, tasks: asyncio.TaskGroup) -> None:
        """Publish what was committed, after its new keys are at the origin: meanwhile the next batch is written."""
        if self._handing is not None:
            await asyncio.wait([self._handing])
            self._handing = None
        if fresh and self._on_new_keys is not None:
            self._handing = tasks.create_task(self._hand(self._on_new_keys, fresh, told, end, self._written))
        else:
            self._publish(told, end, self._written)
        self._busy = False
        self._settle()

    async def _hand(self, give: NewKeys, keys: list[Key], told: list[str], end: int, written: int) -> None:
        for at in range(0, len(keys), _KEYS_AT_ONCE):
            await give(keys[at : at + _KEYS_AT_ONCE])
        self._handing = None
        self._publish(told, end, written)
        self._settle()

    def _publish(self, told: list[str], end: int, written: int) -> None:
        self.applied = max(self.applied, end)
        self._durable = max(self._durable, written)
        for text in told:
            self._heard.pop(text, None)
            self._heard[text] = end
            if len(self._heard) > _HEARD_MAX:
                del self._heard[next(iter(self._heard))]
        self._confirm(ask=False)
        self._progress.changed()

    def _settle(self) -> None:
        """With nothing left to apply, what the origin has sent is applied."""
        changes = self._filter
        if changes is not None and not self._queue and self._handing is None and not self._busy and changes.between:
            if changes.complete > self.applied:
                self.applied = changes.complete
            self._progress.changed()

    def _rest_due(self) -> bool:
        return self._handing is None and self.applied > self._written and self._clock() - self._rested_at >= _REST_S

    async def _rest(self, sink: Sink) -> None:
        """Nothing concerned the leg for a while: move the position, so that the origin need not keep its WAL."""
        lsn, self._busy = self.applied, True
        await sink.rest(lsn)
        self._written, self._durable, self._rested_at = lsn, max(self._durable, lsn), self._clock()
        self._busy = False
        self._confirm(ask=False)
        self._settle()

    # Keeping in touch

    async def _pulse(self, origin: AsyncConnection[Any]) -> NoReturn:
        while True:
            row = await (await origin.execute("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint")).fetchone()
            assert row is not None  # noqa: S101 - a SELECT of one expression
            self._lag.sample(int(row[0]))
            if self.applied < int(row[0]) or self._clock() - self._confirmed_at >= _CONFIRM_S:
                self._confirm(ask=self.applied < int(row[0]))
            self._progress.changed()
            await asyncio.sleep(_PULSE_S)

    async def _asking(self) -> NoReturn:
        """Ask the origin how far it has sent, again and again, since it tells by itself twice a minute."""
        pause = _ASK_FIRST_S
        while True:
            self._confirm(ask=True)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _ASK_MAX_S)

    async def _until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        if condition():
            return
        asking = asyncio.create_task(self._asking())
        try:
            await self._progress.until(condition, timeout_s=timeout_s, what=what)
        finally:
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking

    async def reached(self, lsn: int, *, timeout_s: float) -> None:
        """Wait until everything of the transactions that ended at or below `lsn` at the origin is at the sink.

        `lsn` has to be one that the origin has on its disk: `pg_current_wal_flush_lsn()`.

        Raises:
            TimeoutError: it is not after `timeout_s` seconds.
            StreamStopped: the stream ended.
        """
        await self._until(lambda: self.applied >= lsn, timeout_s, f"{lsn_text(lsn)} was reached")

    async def heard(self, message: str, *, timeout_s: float) -> int:
        """Wait for a logical message with the prefix `shardlib` and this content.

        Returns:
            The LSN just after the commit of the transaction that sent it (of a message outside of one, its own): all
            that committed before is at the sink, new keys handed over.

        Raises:
            TimeoutError: it has not come after `timeout_s` seconds. One that an earlier run of this stream passed does
                not come again: use `reached`.
            StreamStopped: the stream ended.
        """
        await self._until(lambda: message in self._heard, timeout_s, f"the message {message!r} arrived")
        return self._heard[message]

    # Standing still

    @contextlib.asynccontextmanager
    async def standstill(self, *, timeout_s: float) -> AsyncIterator[Standstill]:
        """Inside, nothing is applied, but what `Standstill.at` lets through. The origin keeps its WAL meanwhile.

        To compare both sides: stand still, make a slot with a snapshot at the origin, `at` its consistent point, take
        a snapshot at the sink.

        Raises:
            TimeoutError: the transaction being applied did not end within `timeout_s` seconds.
            StreamStopped: the stream ended.
        """
        async with self._standing:
            self._limit = 0
            try:
                await self._progress.until(
                    lambda: self._running and self._quiet(), timeout_s=timeout_s, what="the applier stood still"
                )
                yield Standstill(self)
            finally:
                self._limit = _EVERYTHING
                self._progress.changed()

    def held_at(self, lsn: int, *, timeout_s: float) -> AbstractAsyncContextManager[Standstill]:
        """`standstill`, then `Standstill.at(lsn)`: for a point that the stream has not passed yet."""
        return self._held_at(lsn, timeout_s)

    @contextlib.asynccontextmanager
    async def _held_at(self, lsn: int, timeout_s: float) -> AsyncIterator[Standstill]:
        async with self.standstill(timeout_s=timeout_s) as still:
            await still.at(lsn, timeout_s=timeout_s)
            yield still

    def _quiet(self) -> bool:
        return not self._busy and self._handing is None

    async def _advance_to(self, lsn: int, timeout_s: float) -> None:
        if self._written > lsn:
            raise InvalidArgument("lsn", lsn_text(lsn), f"the stream is past it, at {lsn_text(self._written)}")
        self._limit = lsn
        self._progress.changed()

        def there() -> bool:
            if not (self._running and self._quiet()):
                return False
            return self.applied >= lsn or (bool(self._queue) and self._queue[0].commit >= lsn)

        await self._until(there, timeout_s, f"exactly {lsn_text(lsn)} was applied")


class Standstill:
    """A stream that stands still."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def at(self, lsn: int, *, timeout_s: float) -> None:
        """Apply exactly the transactions whose commit record begins before `lsn`, and stand still again.

        With the consistent point of a slot as `lsn`, these are the transactions that the slot's snapshot sees.

        Raises:
            InvalidArgument: the stream is past that point.
            TimeoutError: not done within `timeout_s` seconds.
            StreamStopped: the stream ended.
        """
        await self._stream._advance_to(lsn, timeout_s)  # noqa: SLF001 - the two are one thing


def _first(error: BaseException) -> BaseException:
    """Of what several tasks raised, what was raised first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
