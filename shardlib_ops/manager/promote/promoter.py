"""The steps of a promotion, forward and back. Everything before the swap can be taken back; nothing after it.

The order is what makes it safe, and each step leans on the one before::

    recorded                 whoever comes later knows what was meant, and with which gate numbers
    claimed                  an earlier manager that wakes up is refused by the servers
    cascaded                 the other replicas follow the new primary already, and can never be ahead of it
    gates_closed             no transaction of an application is in flight, and none begins
    read_only                nor does one of anybody else, unless it insists
    drained                  those who had begun have ended
    replayed                 the new primary has everything that was ever committed
    promoting, promoted      it takes writes; nobody knows it yet
    gates_opened             the gates of the next topology are open there, and no others
    swapped                  one compare-and-swap of the topology: the only step that counts
    fenced, rejoined         the old primary is read-only and has no gates, until it is a replica

Until the swap nobody writes to the new primary, so that opening the old one again loses nothing. A manager that finds
an open record goes forward if the topology names the new primary or the replica was promoted, and back otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from uuid import uuid4

import psycopg
from psycopg import sql

from shardlib.catalog import Catalog, Conflict, Lease, publish_change
from shardlib.dsn import Dsn, scrub
from shardlib.errors import CatalogUnavailable, InvalidTopology, ShardlibError, ShardUnavailable
from shardlib.topology import Topology
from shardlib_ops.manager.promote.follow import drop_slots, repoint
from shardlib_ops.manager.promote.record import Promotion, PromotionStore, Stage
from shardlib_ops.manager.promote.replica import admit
from shardlib_ops.manager.promote.server import JOB, Demoted, Node, Rejoin, until
from shardlib_ops.manager.promote.swap import regated, swapped, without_replica
from shardlib_ops.manager.promote.writers import Blocked, drain, name_readers
from shardlib_ops.reshard.connect import Runner, is_lost, is_superseded
from shardlib_ops.reshard.control import claim, drop_control
from shardlib_ops.reshard.gates import describe_holders

__all__ = ["Promoter"]

_log: Final = logging.getLogger("shardlib.promote")
T = TypeVar("T")

_PROMOTE_S: Final = 60.0
_SWAP_S: Final = 60.0
_SWAP_PAUSE_S: Final = 0.2
_PROBE_S: Final = 5.0
_LEFT_GATE_S: Final = 5.0


class Promoter:
    """One promotion, while this process holds the lease of its shard.

    Args:
        catalog: where the topology and the record are.
        lease: `promote-<shard id>`, as `catalog` gave it.
        record: what is to be done.
        rejoin: makes the old primary a replica; None leaves that to the operator.
        step: awaited with the name of each step when it is done.
        grace_s: seconds for applications to learn of the new primary before the old one is stopped.
    """

    def __init__(
        self,
        catalog: Catalog,
        lease: Lease,
        record: Promotion,
        *,
        rejoin: Rejoin | None,
        step: Callable[[str], Awaitable[None]],
        grace_s: float = 1.0,
    ) -> None:
        self._catalog, self._lease, self._store = catalog, lease, PromotionStore(catalog)
        self._rejoin, self._told, self._grace_s = rejoin, step, grace_s
        self.record = record
        self._runner = Runner(JOB, lease.token)
        self._old = Node(record.old, record.name, self._runner)
        self._new = Node(record.new, record.name, self._runner)
        self._others = [Node(dsn, record.name, self._runner) for dsn in record.others]
        self._closed_at: float | None = None

    async def close(self) -> None:
        """Close every connection; idempotent."""
        for node in (self._old, self._new, *self._others):
            await node.close()

    async def run(self, *, budget_s: float) -> Promotion:
        """From the record, just stored, to its end; or back, when anything stands in the way before the swap.

        Raises:
            InvalidTopology: something stood in the way, and everything is as before; or another manager took over; or
                the replica is promoted and somebody holds a gate there: `resume` later.
            ShardUnavailable, CatalogUnavailable: somebody does not answer, also for taking it back; `resume` later.
        """
        try:
            await self._prepare()
            await self._stop_writes(budget_s)
            await self._ask_replica()
        except BaseException as error:
            reason = _reason(error, self.record)
            _log.warning("promotion of shard %s: %s", self.record.name, reason)
            ended = await _unbroken(self.resume(reason))
            if not isinstance(error, psycopg.Error | ShardlibError | Blocked | TimeoutError | OSError):
                raise
            if ended.stage is Stage.DONE:
                return ended
            raise InvalidTopology(
                f"shard {self.record.name!r} was not promoted, and is as before: {reason}", "mend it, and try again"
            ) from error
        try:
            return await self._forward()
        except (psycopg.Error, Blocked, TimeoutError, OSError) as error:
            raise _left_open(error, self.record) from error

    async def resume(self, reason: str = "the manager that began it is gone") -> Promotion:
        """Bring a promotion to its end that was left open: forward if it can be, else back.

        Raises:
            InvalidTopology: another manager has taken it over; or somebody holds a gate of the replica: it stays open.
            ShardUnavailable, CatalogUnavailable: who has to be asked does not answer; it stays open.
        """
        try:
            topology = await self._load()
            if topology.shard(self.record.shard).primary == self.record.new:
                await self._claim_new()
                return await self._forward()
            await self._claim_old()
            if self.record.stage is Stage.PROMOTING and not self.record.given_up and await self._was_promoted():
                await self._claim_new()
                return await self._forward()
            return await self._back(reason)
        except (psycopg.Error, Blocked, TimeoutError, OSError) as error:
            raise _left_open(error, self.record) from error

    # -- before the swap ------------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        await self._claim_old()
        await self._step("claimed")
        await self._old.ready(len(self.record.forward))
        await self._new.ready()
        if self.record.synchronous:
            # What it may have kept from the time when it was the primary: it must not wait for itself.
            own, by_sql = await self._new.setting("synchronous_standby_names")
            await self._save(own=own, own_by_sql=by_sql)
            await self._new.set("synchronous_standby_names", "", shows="")
        for node, slot in zip(self._others, self.record.slots, strict=True):
            await repoint(node, self._new, host=self.record.new.host, port=self.record.new.port, slot=slot)
        await self._step("cascaded")

    async def _stop_writes(self, budget_s: float) -> None:
        """Close the shard, and wait until the new primary has everything; within the budget."""
        await self._save(stage=Stage.CLOSING)
        await self._step("closing")
        self._closed_at = began = time.monotonic()
        ends = began + budget_s
        numbers = await self._old.gates()
        closings = await self._old.close_gates(numbers, budget_s=budget_s)
        if held := [closing for closing in closings if not closing.closed]:
            raise Blocked("transactions hold the shard's gates: " + "; ".join(map(describe_holders, held)))
        await self._step("gates_closed")
        await self._old.set("default_transaction_read_only", "on", shows="on")
        await self._step("read_only")
        await drain(self._old, ends - time.monotonic())
        lsn = await self._old.marked()
        await self._step("drained")
        if not await self._new.replayed(lsn, ends - time.monotonic()):
            raise Blocked(
                f"replica {_at(self.record.new)} has not replayed {lsn} within the budget of {budget_s:g} s"
                + await name_readers(self._new)
            )
        await self._step("replayed")
        if time.monotonic() > ends:
            raise Blocked(f"the shard was closed for {budget_s:g} s, which is all that it may be")
        await self._save(stage=Stage.PROMOTING, lsn=lsn)
        await self._step("promoting")

    async def _ask_replica(self) -> None:
        self._held()
        if not await self._new.promote():
            raise InvalidTopology(f"replica {_at(self.record.new)} refused to be promoted", "look at its log")
        await self._await_promoted()

    async def _await_promoted(self) -> None:
        async def promoted() -> bool:
            return not await self._new.in_recovery()

        if not await until(promoted, _PROMOTE_S):
            raise TimeoutError(f"replica {_at(self.record.new)} was not promoted within {_PROMOTE_S:g} s")
        await self._step("promoted")

    async def _was_promoted(self) -> bool:
        """Whether the replica takes writes: certain, once it has replayed that this manager has the shard.

        What an earlier manager may still ask of it is refused from then on; a request that arrived before shows in
        the second look, since a replica looks for one before it waits for more. A replica that does not answer is
        given up for good: whoever comes later must not go forward when the old primary may have served again.

        Raises:
            TimeoutError: it answers and does not replay, so that it may be promoted yet.
        """
        promoted = False
        for _ in range(2):
            lsn = await self._old.marked()

            async def decided(lsn: str = lsn) -> bool:
                nonlocal promoted
                replayed = await self._new.replayed(lsn, 0.01)
                promoted = not await self._new.in_recovery()
                return promoted or replayed

            try:
                known = await until(decided, _PROBE_S)
            except (psycopg.Error, ShardUnavailable) as error:
                _log.warning("replica %s does not answer, and is given up: %s", _at(self.record.new), error)
                await self._save(given_up=True)
                return False
            if not known:
                raise TimeoutError(
                    f"replica {_at(self.record.new)} has not replayed {lsn} within {_PROBE_S:g} s, so that it may be "
                    "promoted yet: let it replay, or stop it, which gives it up"
                )
            if promoted:
                return True
        return False

    # -- back -----------------------------------------------------------------------------------------------------

    async def _back(self, reason: str) -> Promotion:
        """The old primary serves again, as if nothing had been; and the record says why."""
        record = self.record
        await self._old.set("default_transaction_read_only", None, shows="off")
        await self._step("writable")
        topology = await self._load()
        named = set(topology.gates_of(record.shard))
        if not named <= set(await self._old.gates()):
            await self._old.open_gates(record.back)
            await self._publish(lambda now: regated(now, record.shard, record.back, nonce=uuid4().hex))
        await self._step("opened_again")
        await self._close_unnamed(self._old, await self._load())
        for node, upstream, slot in zip(self._others, record.upstreams, record.slots, strict=True):
            await repoint(node, self._old, host=upstream.host, port=upstream.port, slot=slot)
        if await self._is_replica_still():
            await drop_slots(self._new, record.slots)
            reason += await self._give_back_own()
        else:
            # Whatever it is now, it is no copy of the primary any more that anybody may read or promote.
            await self._publish(lambda now: without_replica(now, record.shard, record.new, nonce=uuid4().hex))
            reason += f"; {_at(record.new)} is no replica of the shard any more: make it one, and add it again"
        await self._step("followed_back")
        await drop_control(await self._old.conn(), self._runner)
        await self._save(stage=Stage.UNDONE, ended_at=_now(), error=reason)
        await self._step("undone")
        return self.record

    async def _give_back_own(self) -> str:
        """The replica has the synchronous setting that it had; or what is left to do, for the reason."""
        own = self.record.own
        if own is None:
            return ""
        try:
            await self._new.set("synchronous_standby_names", own if self.record.own_by_sql else None, shows=own)
        except (psycopg.Error, ShardUnavailable, TimeoutError) as error:
            _log.warning("replica %s: %s", _at(self.record.new), _reason(error, self.record))
            return f"; set synchronous_standby_names = '{own}' on {_at(self.record.new)} again, which it had"
        return ""

    async def _is_replica_still(self) -> bool:
        if self.record.given_up:
            return False
        try:
            return await self._new.in_recovery()
        except (psycopg.Error, ShardUnavailable):
            # Not asked for a promotion, it will be a replica when it is back.
            return self.record.stage is not Stage.PROMOTING

    # -- forward --------------------------------------------------------------------------------------------------

    async def _forward(self) -> Promotion:
        """The replica was promoted: it gets its gates, the topology names it, the old primary becomes a replica."""
        record = self.record
        await self._new.open_gates(record.forward)
        await self._drop_leftovers()
        await self._step("gates_opened")
        await self._publish(lambda now: swapped(now, record.shard, record.new, record.forward, nonce=uuid4().hex))
        pause_s = record.pause_s if self._closed_at is None else round(time.monotonic() - self._closed_at, 3)
        await self._step("swapped")
        await self._save(stage=Stage.SWITCHED, pause_s=pause_s)
        await self._step("switched")
        if record.others:
            await self._synchronous()
        left = await self._demote()
        if not record.others:
            left = await self._synchronous(left)
        await drop_control(await self._new.conn(), self._runner)
        await self._save(stage=Stage.DONE, ended_at=_now(), error=left)
        await self._step("done")
        return self.record

    async def _synchronous(self, left: str | None = None) -> str | None:
        """The new primary waits for replicas as the old one did; while it has none, it would wait for ever."""
        names = self.record.synchronous
        if not names:
            return left
        if left is not None:
            return f"{left}; then set synchronous_standby_names = '{names}'"
        await self._new.set("synchronous_standby_names", names, shows=names)
        return None

    async def _claim_new(self) -> None:
        """Hold the shard at its new primary too: what an earlier manager may still do there is refused."""
        await self._await_promoted()
        await claim(await self._new.conn(), self._runner)

    async def _drop_leftovers(self) -> None:
        """No gate but those of the next topology, and no guard: no job works on this shard."""
        numbers = [number for number in await self._new.gates() if number not in self.record.forward]
        for closing in await self._new.close_gates(numbers, budget_s=_LEFT_GATE_S):
            if not closing.closed:
                raise Blocked("transactions hold a gate of the old primary: " + describe_holders(closing))
        for schema, name in await self._new.rows(
            "SELECT DISTINCT n.nspname::text, p.proname::text FROM pg_proc p"
            " JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_trigger t ON t.tgfoid = p.oid"
            " WHERE n.nspname = 'shardlib' AND p.proname ~ '^job_[0-9]+_guard_'"
        ):
            await self._new.do(sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE").format(sql.Identifier(schema, name)))

    async def _demote(self) -> str | None:
        """The old primary takes no writes and becomes a replica; or what the operator has to do about it."""
        record = self.record
        by_hand = (
            f"{_at(record.old)} is no server of the shard now: make it a replica of {_at(record.new)} "
            f"(pg_rewind, or a new base backup), then `shard add-replica {record.name} …`"
        )
        try:
            if not await self._old.in_recovery():
                await self._old.set("default_transaction_read_only", "on", shows="on")
                await self._close_unnamed(self._old, await self._load())
        except (psycopg.Error, ShardlibError, TimeoutError) as error:
            if self._rejoin is None:
                return f"{by_hand}; it does not answer and could not be fenced: {_reason(error, record)}"
        await self._step("fenced")
        if self._rejoin is None:
            return by_hand
        await asyncio.sleep(self._grace_s)
        await self._old.close()
        try:
            await self._rejoin(Demoted(record.name, record.old, record.new))
            await admit(self._catalog, self._new, self._old, record.shard, lease=self._lease)
        except (psycopg.Error, ShardlibError, TimeoutError, OSError) as error:
            return f"{by_hand}; the hook that was to do it failed: {_reason(error, record)}"
        await self._step("rejoined")
        return None

    # -- what all of them need ------------------------------------------------------------------------------------

    async def _claim_old(self) -> None:
        await claim(await self._old.conn(), self._runner)

    async def _close_unnamed(self, node: Node, topology: Topology) -> None:
        """Close gates that the topology does not name here; whoever holds one came through an older topology."""
        shard = topology.shard(self.record.shard)
        named = topology.gates_of(shard.id) if shard.primary == node.dsn else ()
        numbers = [number for number in await node.gates() if number not in named and number < topology.next_gate]
        for closing in await node.close_gates(numbers, budget_s=_LEFT_GATE_S):
            if not closing.closed:
                _log.warning("shard %s: a gate is still held: %s", shard.name, describe_holders(closing))

    async def _load(self) -> Topology:
        return await asyncio.to_thread(self._catalog.load)

    async def _publish(self, change: Callable[[Topology], Topology]) -> Topology:
        """Publish, and be certain of it: tried again while the catalog does not answer, within a limit."""
        ends = time.monotonic() + _SWAP_S
        while True:
            self._held()
            try:
                return await asyncio.to_thread(publish_change, self._catalog, change, lease=self._lease)
            except CatalogUnavailable:
                if time.monotonic() > ends:
                    raise
                await asyncio.sleep(_SWAP_PAUSE_S)
            except Conflict:
                raise _superseded(self.record) from None

    async def _save(self, **changes: Any) -> None:
        self._held()
        self.record = self.record.changed(**changes)
        try:
            await asyncio.to_thread(self._store.save, self.record, self._lease)
        except Conflict:
            raise _superseded(self.record) from None

    def _held(self) -> None:
        if not self._lease.alive():
            raise _superseded(self.record)

    async def _step(self, name: str) -> None:
        self._held()
        _log.debug("promotion of shard %s: %s", self.record.name, name)
        await self._told(name)


async def _unbroken(call: Awaitable[T]) -> T:
    """Run to the end even if the caller is cancelled meanwhile: writers wait for it."""
    running = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        return running.result()


def _superseded(record: Promotion) -> InvalidTopology:
    return InvalidTopology(
        f"the promotion of shard {record.name!r} is no longer this manager's: it was away for too long",
        "another one may have taken it over: `shard show`, and `shard promote --resume` if it is still open",
    )


def _left_open(error: BaseException, record: Promotion) -> ShardlibError:
    """What the operator is told of an error that leaves the promotion open."""
    if isinstance(error, psycopg.Error) and is_superseded(error):
        return _superseded(record)
    reason, way_out = _reason(error, record), f"`shard promote {record.name} --resume`, or `resume_promotion`"
    if isinstance(error, Blocked):
        return InvalidTopology(f"the promotion of shard {record.name!r} is still open: {reason}", way_out)
    return ShardUnavailable(record.name, f"{reason}; the promotion is still open: {way_out}")


def _reason(error: BaseException, record: Promotion) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "it was cancelled"
    text = str(error).strip() or type(error).__name__
    if isinstance(error, psycopg.Error) and is_lost(error):
        text = f"a server went away: {text}"
    return scrub(text, *(dsn.reveal() for dsn in (record.old, record.new, *record.others, *record.upstreams)))


def _at(dsn: Dsn) -> str:
    return f"{dsn.host}:{dsn.port}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
