"""How a change is made: written to the audit log first, once for each key, and brought to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from pydantic import BaseModel

from shardlib.errors import ShardlibError
from shardlib_ops.api.change import Change, Done
from shardlib_ops.api.idempotency import Claim, IdempotencyKeys, Kept
from shardlib_ops.audit import Actor, Attempt, Audit
from shardlib_ops.serving.problem import Problem, problem_of

__all__ = ["Changes"]

_LOG = logging.getLogger("shardlib.ops.api")

_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Changes:
    """Makes the changes that callers ask for.

    A change that has begun is brought to its end also when its caller does not wait for it, or its request has taken
    too long: the audit log and the kept answer then tell what came of it.

    Args:
        audit: the log.
        keys: the idempotency keys.
        registry: where changes are counted.
    """

    def __init__(self, audit: Audit, keys: IdempotencyKeys, registry: CollectorRegistry) -> None:
        self._audit, self._keys = audit, keys
        self._running: set[asyncio.Task[Kept]] = set()
        self._count = Counter(
            "shard_manager_operations", "Changes that were asked for.", ("operation", "result"), registry=registry
        )
        self._seconds = Histogram(
            "shard_manager_operation_duration_seconds", "Time of a change.", ("operation",), registry=registry,
            buckets=_BUCKETS,
        )  # fmt: skip

    async def make(self, change: Change, actor: Actor, key: str | None, request: str) -> Kept:
        """Make a change, and tell its answer.

        Args:
            change: what is asked for.
            actor: who asks.
            key: the `Idempotency-Key`, None without one.
            request: see `request_hash`.

        Raises:
            Problem, ShardlibError: it was not made.
        """
        task = asyncio.create_task(self._make(change, actor, key, request), name=change.action)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def close(self, timeout_s: float) -> None:
        """Wait for the changes under way; what takes longer is cancelled, which the audit log tells."""
        if not self._running:
            return
        _, left = await asyncio.wait(set(self._running), timeout=timeout_s)
        for task in left:
            _LOG.warning("%s is interrupted, since the server ends", task.get_name())
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=timeout_s)

    def _ended(self, task: asyncio.Task[Kept]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Said here too: whoever has asked may be gone. The text is for the log that is written with care.
            _LOG.info("%s has failed: %s", task.get_name(), type(error).__name__)

    async def _make(self, change: Change, actor: Actor, key: str | None, request: str) -> Kept:
        began = time.monotonic()
        result = "error"
        try:
            async with self._audit.attempt(actor, change.action, change.target, _told(change, key)) as attempt:
                await change.check()
                if key is None:
                    kept = _kept(await _applied(change, attempt))
                else:
                    kept = await self._once(change, actor, key, request, attempt)
            result = "ok"
            return kept
        finally:
            self._count.labels(change.action, result).inc()
            self._seconds.labels(change.action).observe(time.monotonic() - began)

    async def _once(self, change: Change, actor: Actor, key: str, request: str, attempt: Attempt) -> Kept:
        async with self._keys.claim(actor.subject, key, request, change.before) as claim:
            if claim.answer is not None:
                attempt.result("the answer of an earlier request", status=claim.answer.status)
                if (refused := claim.answer.problem) is not None:
                    raise refused
                return claim.answer
            # What stands in the way of looking is no answer yet: that one who has died still holds a lease, say.
            done = await self._settled(change, claim, attempt)
            try:
                kept = _kept(done if done is not None else await _applied(change, attempt))
            except (Problem, ShardlibError) as error:
                found = problem_of(error)
                # Of 5xx nobody knows yet what was done: a repetition looks.
                if found.status < 500:
                    await claim.keep(
                        Kept(status=found.status, slug=found.slug, detail=found.detail, headers=dict(found.headers))
                    )
                raise
            await claim.keep(kept)
            return kept

    async def _settled(self, change: Change, claim: Claim, attempt: Attempt) -> Done | None:
        if not claim.interrupted:
            return None
        done = await change.settle(claim.before)
        if done is not None:
            attempt.result("done by an earlier request that was interrupted", **done.told)
        return done


async def _applied(change: Change, attempt: Attempt) -> Done:
    done = await change.apply()
    attempt.result(**done.told)
    return done


def _told(change: Change, key: str | None) -> dict[str, object]:
    return {**change.details, **({} if key is None else {"idempotency_key": key})}


def _kept(done: Done) -> Kept:
    headers = {} if done.path is None else {"Location": done.path}
    return Kept(status=done.status, body=_text(done.answer), headers=headers)


def _text(answer: BaseModel | Any | None) -> str:
    return "" if answer is None else answer.model_dump_json()
