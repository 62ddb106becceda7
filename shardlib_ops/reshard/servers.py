"""The real world of a job: PostgreSQL servers, the catalog, the clock."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

from psycopg import AsyncConnection
from psycopg import errors as pg

from shardlib.catalog import Catalog, Conflict, Lease
from shardlib.errors import CatalogUnavailable
from shardlib.ring import TokenRange
from shardlib.topology import Topology
from shardlib_ops.reshard.cleanup import purge
from shardlib_ops.reshard.connect import Runner
from shardlib_ops.reshard.control import Direction, claimed, start_position
from shardlib_ops.reshard.copy import ExportedSnapshot, collect_keys, copy_tables, empty_half_copied, export_snapshot
from shardlib_ops.reshard.flow import StreamFlow, who_blocks
from shardlib_ops.reshard.job import WAY_BACK_LOST, Job, Leg, Status, Wish
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.orphan import gone
from shardlib_ops.reshard.progress import Tracker
from shardlib_ops.reshard.schema import (
    advance_sequences,
    copy_after_rows,
    copy_before_rows,
    validate_foreign_keys,
)
from shardlib_ops.reshard.schema.change import CHANGE, decode_change
from shardlib_ops.reshard.side import ShardSide, translated
from shardlib_ops.reshard.store import JobStore
from shardlib_ops.reshard.stream import (
    MAX_SLOT_WAL,
    SlotOverBudget,
    watch_slot,
)
from shardlib_ops.reshard.stream.origin import columns_of
from shardlib_ops.reshard.together import first_of, together
from shardlib_ops.reshard.validate import Tables, compare_changed, compare_closed, compare_whole
from shardlib_ops.reshard.world import Blocked, Compared, Failure, Flow, Lost, Superseded

__all__ = ["Servers"]

_log = logging.getLogger("shardlib.reshard")

T = TypeVar("T")

_WISH_S: Final = 0.2
_LEASE_LOOK_S: Final = 0.5
_SERVERS_LOOK_S: Final = 1.0
_SNAPSHOT_S: Final = 30.0


class Servers:
    """The world of one job, while this process holds the job's lease.

    Args:
        catalog: where the topology and the job's record are.
        lease: the job's, as `catalog` gave it.
        job: its record.
        topology: the present one; names the shards' servers.
        store: that the record was read by.
        workers: connections that copy side by side, for each leg.
        purge_rows_per_s: limit of the cleanup.
        max_slot_wal: bytes of WAL that a server may keep for a slot of the job; None: any.
        trend_s: seconds for which a stream has to be outrun before that is told.
    """

    def __init__(
        self,
        catalog: Catalog,
        lease: Lease,
        job: Job,
        topology: Topology,
        *,
        store: JobStore,
        workers: int = 2,
        purge_rows_per_s: int = 20_000,
        max_slot_wal: int | None = MAX_SLOT_WAL,
        trend_s: float = 60.0,
    ) -> None:
        self._catalog, self._lease, self._job_id = catalog, lease, job.id
        self._store = store
        self._legs = job.legs
        self._topology = topology
        self._workers, self._purge_rows_per_s = workers, purge_rows_per_s
        self.runner = Runner.of_lease(job.id, lease.token)
        self.tables = tuple(table for table in topology.tables if not table.reference)
        self.references = tuple(table for table in topology.tables if table.reference)
        self._sides = {
            shard_id: ShardSide(
                job,
                self.runner,
                topology.shard_by_id(shard_id),
                self.tables,
                hash_function=topology.hash_function,
                cluster_id=topology.cluster_id,
                waits=self._tell_waits,
                places=_places(job, topology, shard_id),
            )
            for shard_id in job.shards
        }
        self._flows: dict[tuple[int, Direction], StreamFlow] = {}
        self._kept: dict[int, tuple[AsyncConnection[Any], AsyncConnection[Any]]] = {}
        self._wish: tuple[float, Wish] | None = None
        self.now: Callable[[], float] = time.monotonic
        self.sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self.jitter: Callable[[], float] = random.random
        self.stamp: Callable[[], str] = lambda: datetime.now(UTC).isoformat(timespec="milliseconds")
        self.nonce: Callable[[], str] = lambda: uuid.uuid4().hex
        self.waits: Callable[[str | None], Awaitable[None]] = _untold
        self._max_slot_wal = max_slot_wal
        self.progress = Tracker(job, topology, clock=self.now, stamp=self.stamp, trend_s=trend_s)

    async def close(self) -> None:
        """Close every connection; idempotent."""
        await together(side.close() for side in self._sides.values())
        kept, self._kept = self._kept, {}
        await together(conn.close() for pair in kept.values() for conn in pair)

    async def _tell_waits(self, what: str | None) -> None:
        await self.waits(what)

    async def anew(self) -> None:
        """See `World.anew`. Connections bear the round's token in their names, so all are made anew."""
        self._held()
        await self.close()
        if not self.runner.next_round():
            raise Superseded(f"job {self._job_id} was taken up too often under one lease")
        # Another server stands in for one of them after a failover.
        found = await self._ask(lambda: self._catalog.load(self._topology))
        self._same_shards(found)
        self._topology = found
        for shard_id, side in self._sides.items():
            side.shard = self._topology.shard_by_id(shard_id)

    async def topology(self) -> Topology:
        """See `World.topology`."""
        found = await self._ask(lambda: self._catalog.load(self._topology))
        self._same_primaries(found)
        self._topology = found
        for shard_id, side in self._sides.items():
            side.shard = self._topology.shard_by_id(shard_id)  # replicas come and go
        return self._topology

    def _same_shards(self, found: Topology) -> None:
        if away := gone(self.progress.job, found):
            raise Superseded(f"job {self._job_id}: shard {', '.join(away)} was taken out of the cluster")

    def _same_primaries(self, found: Topology) -> None:
        self._same_shards(found)
        for shard_id, side in self._sides.items():
            shard = found.shard_by_id(shard_id)
            if shard.primary != side.shard.primary:
                raise Lost(
                    f"shard {shard.name!r} was failed over to {shard.primary.safe()}: what was begun is looked at again"
                )

    def check_tables(self, found: Topology) -> None:
        """See `World.check_tables`."""
        now = {table.fullname: table for table in found.tables}
        begun = {table.fullname: table for table in (*self.tables, *self.references)}
        differ = sorted(name for name in now.keys() | begun.keys() if now.get(name) != begun.get(name))
        if differ:
            raise Failure(
                f"the cluster's tables changed after the job had begun ({', '.join(differ)}): run it again, and change "
                "no tables meanwhile"
            )

    async def publish(self, after: Topology, *, expected: int) -> bool:
        """See `World.publish`."""
        self._held()
        try:
            await self._ask(lambda: self._catalog.publish(after, expected=expected, lease=self._lease))
        except Conflict:
            self._held()
            return False
        return True

    async def save(self, job: Job) -> None:
        """See `World.save`."""
        self._held()
        saving = asyncio.ensure_future(self._ask(lambda: self._store.save(job, self._lease)))
        try:
            await asyncio.shield(saving)
        except asyncio.CancelledError:
            # Arriving later, it would overwrite what is stored next.
            await asyncio.wait([saving])
            if not saving.cancelled():
                saving.exception()  # looked at; the cancellation is what counts
            raise
        except Conflict:
            raise Superseded(f"the record of job {job.id} was changed by another runner") from None
        self.progress.saved(job)

    async def wish(self) -> Wish:
        """See `World.wish`. While the catalog does not answer, the last one holds."""
        self._held()
        now = self.now()
        if self._wish is None or now - self._wish[0] > _WISH_S:
            try:
                self._wish = now, await self._ask(lambda: self._store.wish(self._job_id))
            except Lost:
                if self._wish is None:
                    raise
                self._wish = now, self._wish[1]
        return self._wish[1]

    @property
    def latest(self) -> Topology:
        """The topology as this world has seen it last."""
        return self._topology

    def side(self, shard_id: str) -> ShardSide:
        """See `World.side`."""
        return self._sides[shard_id]

    def flow(self, leg: Leg, direction: Direction) -> StreamFlow:
        """See `World.flow`."""
        key = (leg.number, direction)
        if key not in self._flows:
            self._flows[key] = StreamFlow(self, leg, direction)
        return self._flows[key]

    def link(self, leg: Leg, direction: Direction = "forward") -> Link:
        """One leg in one direction."""
        forward = Link(
            runner=self.runner,
            number=leg.number,
            direction="forward",
            origin=self._sides[leg.source].shard,
            sink=self._sides[leg.target].shard,
            ranges=leg.ranges,
            hash_function=self._topology.hash_function,
            tables=self.tables,
        )
        return forward if direction == "forward" else forward.reversed

    @translated
    async def schema_before_rows(self, leg: Leg) -> None:
        """See `World.schema_before_rows`."""
        self.progress.begins("prepare")
        found = await self._ask(partial(self._catalog.read_document, CHANGE))
        if found is not None and (tables := decode_change(found.data)).open:
            raise Blocked(f"{tables}, so that the shards' tables are not alike: `schema apply` brings it to its end")
        await copy_before_rows(self.link(leg), self.references)

    @translated
    async def schema_after_rows(self, leg: Leg) -> None:
        """See `World.schema_after_rows`."""
        self.progress.begins("indexes")
        await copy_after_rows(self.link(leg), self.references)
        self._sides[leg.target].forget_shapes()

    @translated
    async def validate_foreign_keys(self, leg: Leg) -> tuple[str, ...]:
        """See `World.validate_foreign_keys`."""
        left = await validate_foreign_keys(self.link(leg))
        if left:
            name = self._sides[leg.target].shard.name
            _log.warning("job %d: foreign keys do not hold on shard %r: %s", self._job_id, name, ", ".join(left))
        return left

    @translated
    async def copied(self, leg: Leg) -> bool:
        """See `World.copied`."""
        async with self._sides[leg.target].using() as conn:
            found = await conn.execute(
                "SELECT count(*) FROM shardlib.copied WHERE job = %s AND leg = %s", (self._job_id, leg.number)
            )
            row = await found.fetchone()
        whole = row is not None and row[0] >= len(self.tables)
        return whole and await self.flow(leg, "forward").usable()

    @translated
    async def copy(self, leg: Leg, pause: Callable[[], Awaitable[None]]) -> None:
        """See `World.copy`.

        The slot of the first attempt stays: what was copied whole before a runner died is kept, and the rest is copied
        under a later snapshot, from which on the stream counts for those tables.
        """
        link, flow = self.link(leg), self.flow(leg, "forward")
        source, target = self._sides[leg.source], self._sides[leg.target]
        usable = await flow.usable()
        if not usable:
            await flow.drop_slot()
            async with target.using() as conn, conn.transaction():
                await conn.execute(claimed(self.runner))
                await conn.execute(
                    "DELETE FROM shardlib.copied WHERE job = %s AND leg = %s", (self._job_id, leg.number)
                )
        await empty_half_copied(link, await target.shapes())
        name = f"{link.slot}_tmp" if usable else link.slot
        self.progress.copy_begins(leg.number, anew=not usable)
        async with (
            self._beside([self._watch_slot(leg, "forward")]),
            await self._snapshot(leg, name, temporary=usable) as snapshot,
        ):
            if not usable:
                async with target.using() as conn:
                    await start_position(conn, self.runner, leg.number, "forward", snapshot.lsn)
            self.progress.begins("keys")
            keys = partial(self.progress.keys, leg.number)
            keys(await collect_keys(link, await source.shapes(), snapshot, on_progress=keys), exact=True)
            await pause()
            self.progress.begins("copy")
            await copy_tables(
                link,
                await source.shapes(),
                await target.shapes(),
                snapshot,
                workers=self._workers,
                throttle=pause,
                on_progress=partial(self.progress.copied, leg.number),
            )

    async def _snapshot(self, leg: Leg, name: str, *, temporary: bool) -> ExportedSnapshot:
        async with self._sides[leg.source].naming(f"slot {name!r}", who_blocks):
            try:
                return await export_snapshot(self.link(leg), slot=name, temporary=temporary, timeout_s=_SNAPSHOT_S)
            except pg.DuplicateObject as error:
                if not temporary:
                    raise
                # The session of the snapshot before has not ended yet at the server, and the slot goes with it.
                raise Blocked(f"a session that ends holds slot {name!r} still") from error

    def _export(self, leg: Leg) -> Callable[[], AbstractAsyncContextManager[ExportedSnapshot]]:
        @asynccontextmanager
        async def export() -> AsyncIterator[ExportedSnapshot]:
            async with await self._snapshot(leg, f"{self.link(leg).slot}_cmp", temporary=True) as snapshot:
                yield snapshot

        return export

    @translated
    async def compare(self, leg: Leg, flow: Flow, *, since: str | None) -> Compared:
        """See `World.compare`."""
        self.progress.begins("compare")
        stream = self.flow(leg, "forward").stream
        link, export, tables = self.link(leg), self._export(leg), await self._tables(leg)
        await together(self._unaltered(shard_id) for shard_id in (leg.source, leg.target))
        if since is None:
            found = await compare_whole(link, stream, tables, export=export)
        else:
            found = await compare_changed(link, stream, tables, since=since, export=export)
        await self._comparing(leg)  # ready for the closed window
        self.progress.begins("stream")
        return Compared(found.lsn, found.keys, found.left)

    async def _unaltered(self, shard_id: str) -> None:
        """Before each attempt: where nothing was written since, neither stream nor comparison looks at the columns."""
        side = self._sides[shard_id]
        shapes = await side.shapes()
        async with side.using() as conn:
            await columns_of(conn, shapes, side.shard.name)

    async def _tables(self, leg: Leg) -> Tables:
        return Tables(
            await self._sides[leg.source].shapes(),
            await self._sides[leg.target].shapes(),
            shared_origin=sum(other.source == leg.source for other in self._legs) > 1,
            shared_sink=sum(other.target == leg.target for other in self._legs) > 1,
        )

    async def _comparing(self, leg: Leg) -> tuple[AsyncConnection[Any], AsyncConnection[Any]]:
        """Connections of a leg for the comparison while its ranges are closed: opened before, kept for the next."""
        kept = self._kept.get(leg.number)
        if kept is None or any(conn.closed or conn.broken for conn in kept):
            for conn in kept or ():
                await conn.close()
            link = self.link(leg)
            origin = await link.open_origin("compare")
            try:
                kept = self._kept[leg.number] = (origin, await link.open_sink("compare"))
            except BaseException:
                await origin.close()
                raise
        return kept

    @translated
    async def compare_closed(self, leg: Leg, *, since: str) -> int:
        """See `World.compare_closed`."""
        here, there = await self._comparing(leg)
        tables, recent = await self._tables(leg), self.flow(leg, "forward").stream.recent
        return await compare_closed(
            self.link(leg), tables, since=since, origin_conn=here, sink_conn=there, recent=recent
        )

    @translated
    async def advance_sequences(self, leg: Leg, direction: Direction, *, ahead: int) -> None:
        """See `World.advance_sequences`."""
        before, after = (leg.source, leg.target) if direction == "forward" else (leg.target, leg.source)
        shapes = await self._sides[before].shapes()
        async with self._sides[before].using() as giver, self._sides[after].using() as taker:
            await advance_sequences(giver, taker, self.runner, shapes, ahead=ahead)

    @translated
    async def start_reverse(self, leg: Leg, lsn: str) -> None:
        """See `World.start_reverse`."""
        async with self._sides[leg.source].using() as conn:
            await start_position(conn, self.runner, leg.number, "reverse", lsn)

    @translated
    async def purge(self, leg: Leg, shard_id: str, pause: Callable[[], Awaitable[None]]) -> None:
        """See `World.purge`."""
        side = self._sides[shard_id]
        link = self.link(leg, "forward" if shard_id == leg.target else "reverse")
        if not await self._has_keys(side):
            return
        self.progress.begins("purge")
        await purge(
            link,
            await side.shapes(),
            ranges=side.ranges,
            rows_per_s=self._purge_rows_per_s,
            pause=pause,
            on_progress=partial(self.progress.deleted, shard_id),
        )

    async def _has_keys(self, side: ShardSide) -> bool:
        async with side.using() as conn:
            found = await conn.execute("SELECT to_regclass(%s) IS NOT NULL", (f"shardlib.job_{self._job_id}_keys",))
            row = await found.fetchone()
        return row is not None and bool(row[0])

    @asynccontextmanager
    async def running(self, flows: Sequence[Flow]) -> AsyncIterator[None]:
        """See `World.running`."""
        opened = [flow for flow in flows if isinstance(flow, StreamFlow)]
        await together(flow.open() for flow in opened)
        self.progress.begins("stream")
        # The way back is prepared before the switch: its slot keeps WAL from then on.
        slots = [self._watch_slot(flow.leg, flow.direction) for flow in opened]
        slots += [self._watch_slot(flow.leg, "reverse") for flow in opened if flow.direction == "forward"]
        async with self._beside([*(flow.run() for flow in flows), self._watch_lease(), self._watch_servers(), *slots]):
            yield

    @asynccontextmanager
    async def _beside(self, work: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
        """Let this go on for as long as the body runs; what breaks of it ends the body."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one) for one in work]
                try:
                    yield
                finally:
                    for task in tasks:
                        task.cancel()
        except BaseExceptionGroup as errors:
            error = first_of(errors)
            if isinstance(error, SlotOverBudget):
                await self._over_budget(error)
            raise error from None

    @translated
    async def _watch_slot(self, leg: Leg, direction: Direction) -> None:
        seen = partial(self.progress.slot_seen, leg.number, direction)
        await watch_slot(self.link(leg, direction), max_bytes=self._max_slot_wal, seen=seen)

    async def _over_budget(self, found: SlotOverBudget) -> NoReturn:
        """Rather the job than the disk, and after the switch rather the way back."""
        job = self.progress.job
        if found.direction == "forward":
            raise Failure(
                f"{found}: the job is undone rather than the disk filled; run it at a quieter time, or allow more"
            ) from found
        await next(self.flow(leg, "reverse") for leg in job.legs if leg.number == found.leg).drop_slot()
        # Before the switch nothing is read from it yet: the next look makes it anew.
        after = WAY_BACK_LOST if job.status is Status.VALIDATION else "it is made anew"
        _log.warning("job %d: %s: the slot was dropped; %s", job.id, found, after)
        raise Lost(f"{found}: the slot was dropped; {after}") from found

    async def _watch_lease(self) -> None:
        while True:
            self._held()
            await asyncio.sleep(_LEASE_LOOK_S)

    async def _watch_servers(self) -> None:
        """End the streams when the topology names another primary: the old one may still answer this process."""
        known = self._topology
        while True:
            await asyncio.sleep(_SERVERS_LOOK_S)
            try:
                known = await self._ask(partial(self._catalog.load, known))
            except Lost:
                continue  # without the catalog nothing can be switched
            self._same_primaries(known)

    def _held(self) -> None:
        if not self._lease.alive():
            raise Superseded(f"the lease {self._lease.name!r} is lost")

    async def _ask(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(call)
        except CatalogUnavailable as error:
            raise Lost(str(error)) from error


def _places(job: Job, topology: Topology, shard_id: str) -> list[tuple[str, tuple[TokenRange, ...]]]:
    """The shards at the other ends of a shard's legs, by name, with what has moved there."""
    ends = [(leg.target if leg.source == shard_id else leg.source, leg) for leg in job.legs]
    return [
        (topology.shard_by_id(other).name, leg.ranges) for other, leg in ends if shard_id in (leg.source, leg.target)
    ]


async def _untold(what: str | None) -> None:
    """Who waits is told to nobody yet."""
