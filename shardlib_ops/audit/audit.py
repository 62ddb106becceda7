"""Nothing is done that is not in the log: an entry before, an entry after."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar

from shardlib.errors import InvalidArgument
from shardlib_ops.audit.base import AuditStore
from shardlib_ops.audit.entry import Actor, Entry, Head, Kind, draft
from shardlib_ops.audit.errors import AuditUnavailable
from shardlib_ops.audit.heads import sign_head
from shardlib_ops.audit.text import outcome_of

__all__ = ["Attempt", "Audit"]

_log = logging.getLogger("shardlib.ops.audit")
_heads_log = logging.getLogger("shardlib.ops.audit.head")

T = TypeVar("T")


def _now() -> datetime:
    return datetime.now(UTC)


class Attempt:
    """A piece of work that is in the log as begun."""

    def __init__(self, intent: Entry) -> None:
        self.intent = intent
        self.details: dict[str, object] = {}

    def result(self, text: object = "", **details: object) -> None:
        """What came out, for the entry of the outcome: a text, and further details by name."""
        if text != "":
            self.details["result"] = text
        self.details.update(details)


class Audit:
    """The way of a process into the log. Its entries are written one after the other, by a thread of its own.

    Args:
        store: from `open_audit`; `close` closes it.
        clock: the time of an entry, in UTC.
        timeout_s: longest time for an entry, those before it in this process included. Then `AuditUnavailable`.
    """

    def __init__(self, store: AuditStore, *, clock: Callable[[], datetime] = _now, timeout_s: float = 15.0) -> None:
        self.store = store
        self._clock, self._timeout_s = clock, timeout_s
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shardlib-audit")
        self._appended = asyncio.Event()
        self._count = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Wait for the entries under way, which have their own time limits, and close the store; idempotent."""
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self.store.close)

    @asynccontextmanager
    async def attempt(
        self, actor: Actor, action: str, target: str, details: Mapping[str, object] | None = None
    ) -> AsyncIterator[Attempt]:
        """Work that changes something: an entry of the intent before it, and one of the outcome after it.

        ::

            async with audit.attempt(actor, "shard.create", "shard-04", {"vnode_count": 256}) as attempt:
                shard = await manager.create_shard(...)
                attempt.result(shard_id=shard.id)

        The outcome is `ok`, or the error that the body raises, which goes on to the caller. A body that is cancelled
        has an outcome too. A process that dies leaves an intent without one: nobody knows what became of that work.

        Args:
            actor: who asks for it.
            action: such as `shard.create`.
            target: on what, such as a shard's name.
            details: further values. No secrets: endpoints as `Dsn`.

        Raises:
            AuditUnavailable: the intent could not be written, and the body has not run; or, with `done=True`, the
                body is over and its outcome could not be written. What the body raised is its cause then.
        """
        attempt = Attempt(await self._append("intent", actor, action, target, details))
        finish = _Finish(self, actor, attempt)
        try:
            yield attempt
        except Exception as error:
            await finish(outcome_of(error), error)
            raise
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
            try:
                await finish(outcome_of(error), error)
            except AuditUnavailable as unavailable:
                _log.error(
                    "no entry of an interrupted %s, begun by entry %d: %s", action, attempt.intent.seq, unavailable
                )
            raise
        await finish("ok", None)

    async def refused(
        self, actor: Actor, action: str, target: str, why: str, details: Mapping[str, object] | None = None
    ) -> Entry:
        """An attempt that was not let through: a failed login, a role that does not suffice, a body that is wrong.

        Raises:
            AuditUnavailable: it could not be written.
        """
        return await self._append("refused", actor, action, target, details, result=why)

    async def _append(
        self,
        kind: Kind,
        actor: Actor,
        action: str,
        target: str,
        details: Mapping[str, object] | None = None,
        *,
        of: int | None = None,
        result: str = "",
    ) -> Entry:
        at = self._clock().astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        new = draft(
            id=secrets.token_hex(8), at=at, kind=kind, actor=actor, action=action, target=target, details=details,
            of=of, result=result,
        )  # fmt: skip
        try:
            writing = asyncio.get_running_loop().run_in_executor(self._writer, self.store.append, new)
        except RuntimeError:  # the writer was shut down
            raise AuditUnavailable(self.store.safe_url, "this log was closed") from None
        try:
            # What is still queued when the time is over is taken out of the queue, and never written.
            entry = await asyncio.wait_for(writing, self._timeout_s)
        except TimeoutError:
            raise AuditUnavailable(self.store.safe_url, f"no answer within {self._timeout_s:g} s") from None
        self._count += 1
        self._appended.set()
        return entry

    async def head(self) -> Head:
        """The end of the log now.

        Raises:
            AuditUnavailable: no answer.
        """
        return await asyncio.to_thread(self.store.head)

    async def publish_heads(self, key: bytes, *, every_s: float = 60.0, every_entries: int = 100) -> None:
        """Log a signed head at each beat, and after so many entries of this process, until cancelled.

        It goes to the logger `shardlib.ops.audit.head` at INFO, as `sign_head` writes it. Keep that log where whoever
        can write the audit log cannot reach: `verify` finds by it what was cut off. A head that was logged already is
        not logged again.

        Args:
            key: see `sign_head`.
            every_s: seconds between two looks.
            every_entries: entries after which the next beat is not waited for.

        Raises:
            InvalidArgument: the key is too short, or an interval not above 0.
        """
        if not every_s > 0 or every_entries < 1:
            raise InvalidArgument("every_s, every_entries", (every_s, every_entries), "above 0")
        sign_head(key, Head(0, "0" * 64))
        published: Head | None = None
        while True:
            seen, self._count = self._count, 0
            try:
                head = await self.head()
            except AuditUnavailable as error:
                self._count += seen
                _log.warning("no head of the audit log is published: %s", error)
            else:
                if head.seq and head != published:
                    _heads_log.info("%s", sign_head(key, head))
                    published = head
            await self._beat(every_s, every_entries)

    async def _beat(self, every_s: float, every_entries: int) -> None:
        try:
            async with asyncio.timeout(every_s):
                while True:
                    self._appended.clear()
                    await self._appended.wait()
                    if self._count >= every_entries:
                        return
        except TimeoutError:
            pass  # the beat


class _Finish:
    """Writes the outcome of an attempt, also while the task is being cancelled."""

    def __init__(self, audit: Audit, actor: Actor, attempt: Attempt) -> None:
        self._audit, self._actor, self._attempt = audit, actor, attempt

    async def __call__(self, result: str, error: BaseException | None) -> None:
        intent = self._attempt.intent
        write = self._audit._append(  # noqa: SLF001 - a part of it
            "outcome", self._actor, intent.action, intent.target, self._attempt.details, of=intent.seq, result=result
        )
        try:
            await _to_its_end(write)
        except AuditUnavailable as unavailable:
            raise AuditUnavailable(unavailable.store, unavailable.reason, True) from error or unavailable


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Run something to its end, however often the task is cancelled meanwhile; the cancellation follows after.

    It must be short: nothing cuts it off.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
