"""The tables of all shards, changed and looked at as one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import psycopg
from psycopg import AsyncConnection
from sqlalchemy import MetaData, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from shardlib.catalog import Conflict, publish_change
from shardlib.engine.schema import records
from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError, UnsupportedOperation
from shardlib.shard.prepare import unavailable
from shardlib.topology import Shard, Topology
from shardlib.topology.change import record_tables
from shardlib_ops.manager.base import Base
from shardlib_ops.reshard.schema.revision import read_revision
from shardlib_ops.reshard.schema.structure import Structure, differences, read_structure, real_tables, tables_in
from shardlib_ops.reshard.together import together
from shardlib_ops.schema.blocking import BlockingSchemaManager
from shardlib_ops.schema.crew import Crew, WorkerLost
from shardlib_ops.schema.drift import unlike_metadata
from shardlib_ops.schema.errors import MigrationFailed
from shardlib_ops.schema.model import Applied, SchemaStatus, Script, ShardRevision
from shardlib_ops.schema.order import Answer, Order
from shardlib_ops.schema.shards import asked, each
from shardlib_ops.schema.turn import Turn, change_of, taken

__all__ = ["SchemaManager"]

T = TypeVar("T")
Told = Callable[[str, tuple[str, ...]], Awaitable[None]]
"""Awaited with the name of each shard that is done, and its revisions."""

_PARALLEL_MAX = 32


class SchemaManager(Base):
    """Alembic over every shard of one cluster.

    The migrations are those of the application, with an `env.py` that calls `run_migrations`. Each shard holds the
    revision of its tables in `shardlib.alembic_version`.

    Args:
        url: the catalog, such as `etcd://127.0.0.1:2379/shop`.
        config: path of `alembic.ini`.
        timeout_s: limit for one answer of the catalog, in seconds.
    """

    def __init__(self, url: str, *, config: str = "alembic.ini", timeout_s: float = 5.0) -> None:
        super().__init__(url, timeout_s=timeout_s)
        self._config = config

    @classmethod
    def sync(cls, url: str, *, config: str = "alembic.ini", timeout_s: float = 5.0) -> BlockingSchemaManager:
        """The blocking twin, for scripts."""
        return BlockingSchemaManager(cls(url, config=config, timeout_s=timeout_s))

    async def apply(
        self,
        revision: str = "heads",
        *,
        metadata: MetaData | None = None,
        parallel: int = 1,
        lock_timeout_s: float = 1.0,
        lock_wait_s: float = 60.0,
        wait_s: float = 0.0,
        on_shard: Told | None = None,
    ) -> Applied:
        """Bring every shard to a revision; one after the other, each in one transaction. Run again, it goes on.

        Stops at the first shard that refuses. What is done is not done twice.

        Args:
            revision: as Alembic names it.
            metadata: the application's; its tables are made known to the cluster afterwards.
            parallel: how many shards at once, 1 to 32. The first one goes alone in any case.
            lock_timeout_s: how long a statement waits for a lock, while whoever comes after it waits too.
            lock_wait_s: how long a shard whose locks cannot be had is tried again.
            wait_s: how long to wait for another one that changes the tables now.
            on_shard: told of each shard that is done.

        Raises:
            MigrationFailed: a shard refused; the error says which ones are done.
            InvalidTopology: a job moves rows, another one is at it, a shard's tables have no revision, or the files
                are wrong.
            InvalidArgument: a value that is not allowed.
            ShardUnavailable: a shard does not answer, before anything was changed.
            ShardKeyRequired, InvalidShardKey: the metadata has a table that declares no shard key, or a wrong one.
            CatalogUnavailable: no answer.
        """
        if not 1 <= parallel <= _PARALLEL_MAX:
            raise InvalidArgument("parallel", parallel, f"1 to {_PARALLEL_MAX} shards at once")
        for name, value in (("lock_timeout_s", lock_timeout_s), ("lock_wait_s", lock_wait_s)):
            if not 0.01 <= value <= 86_400:
                raise InvalidArgument(name, value, "0.01 to 86400 seconds")
        known = [] if metadata is None else records(metadata)
        order = Order("upgrade", revision, lock_timeout_s=lock_timeout_s, lock_wait_s=lock_wait_s)
        given = self._given()
        async with taken(self._catalog, self._jobs, wait_s=wait_s) as turn, Crew(given, parallel) as crew:
            target = await self._meant(crew, revision)
            topology = await self.topology()
            await turn.look_first()
            record_tables(topology, known, nonce="")  # refuses a changed key before anything is changed
            before = await self._revisions(topology)
            await self._refuse_unstamped(topology, before)
            todo = [shard for shard in topology.shards if before[shard.id] != target]
            had = [shard.name for shard in topology.shards if before[shard.id] == target]
            if todo:
                await turn.begin(target)
                await _while_kept(turn, self._all_of(crew, turn, order, todo, had, topology, parallel, on_shard))
            last = await asyncio.to_thread(change_of, self._catalog)
            if todo or (last is not None and last.open):
                if not todo:
                    await turn.begin(target)
                await turn.end(done=tuple(shard.name for shard in topology.shards), failed=None, error=None)
        registered = await self._register(metadata)
        changed = {shard.id for shard in todo}
        return Applied(
            target=target,
            changed=tuple(shard.name for shard in topology.shards if shard.id in changed),
            unchanged=tuple(shard.name for shard in topology.shards if shard.id not in changed),
            registered=registered,
            unknown=await self._unknown(await self.topology()),
        )

    async def _all_of(
        self,
        crew: Crew,
        turn: Turn,
        order: Order,
        todo: Sequence[Shard],
        had: Sequence[str],
        topology: Topology,
        parallel: int,
        told: Told | None,
    ) -> None:
        """Each of the shards; none is begun after one has failed, and those that are under way then come to an end.

        `had` names the shards that are at the revision already.
        """
        waiting, failed, done = list(todo), list[MigrationFailed](), list(had)

        async def one(shard: Shard) -> None:
            await turn.look_at_jobs()
            try:
                answer = await crew.ask(_on(order, shard))
            except WorkerLost as lost:
                answer = Answer(error=str(lost), kind="lost", way_out="run `schema apply` again")
            if answer.error is None:
                done.append(shard.name)
                await turn.at(done=tuple(done))
                if told is not None:
                    await told(shard.name, answer.revisions)
                return
            failed.append(MigrationFailed(shard.name, answer.error, way_out=answer.way_out))

        async def several() -> None:
            while waiting and not failed:
                await one(waiting.pop(0))

        if waiting:
            await one(waiting.pop(0))
        await together(several() for _ in range(parallel))
        if not failed:
            return
        first = failed[0]
        left = [shard.name for shard in topology.shards if shard.name not in done]
        if len(left) == len(topology.shards) and len(failed) == 1 and not turn.change.done:
            await turn.end(failed=first.shard, error=first.reason)  # no shard has changed: nobody needs to wait
        else:
            await turn.at(done=tuple(done), failed=first.shard, error=first.reason)
        raise MigrationFailed(first.shard, first.reason, done=done, left=left, way_out=first.way_out)

    async def stamp(self, revision: str, *, shards: Sequence[str] = (), wait_s: float = 0.0) -> tuple[str, ...]:
        """Say that shards are at a revision, and change nothing else there.

        Args:
            revision: as Alembic names it; `base` for none.
            shards: names or ids; empty: every shard.
            wait_s: how long to wait for another one that changes the tables now.

        Returns:
            the revisions that they have now.

        Raises:
            MigrationFailed, InvalidTopology, ShardUnavailable, CatalogUnavailable: as `apply`.
        """
        given = self._given()
        async with taken(self._catalog, self._jobs, wait_s=wait_s) as turn, Crew(given) as crew:
            target = await self._meant(crew, revision)
            topology = await self.topology()
            chosen = [topology.shard(name) for name in shards] or list(topology.shards)
            before = await self._revisions(topology)
            had = [shard.name for shard in topology.shards if before[shard.id] == target]
            todo = [shard for shard in chosen if shard.name not in had]
            await turn.begin(target)
            order = Order("stamp", revision)
            await _while_kept(turn, self._all_of(crew, turn, order, todo, had, topology, 1, None))
            found = await self._revisions(topology)
            done = tuple(shard.name for shard in topology.shards if found[shard.id] == target)
            if len(set(found.values())) == 1:
                await turn.end(done=done, failed=None, error=None)
            else:
                error = "the shards are at several revisions: stamp the others"
                await turn.at(done=done, failed=None, error=error)
        return target

    async def sql(self, revision: str = "heads") -> tuple[Script, ...]:
        """What `apply` would run, for each revision that shards are at. Nothing is changed.

        Raises:
            InvalidTopology: a shard is at several revisions at once, or the files are wrong.
            ShardUnavailable, CatalogUnavailable: no answer.
        """
        async with Crew(self._given()) as crew:
            target = await self._meant(crew, revision)
            topology = await self.topology()
            groups: dict[tuple[str, ...], list[str]] = {}
            for shard_id, found in (await self._revisions(topology)).items():
                groups.setdefault(found, []).append(topology.shard(shard_id).name)
            scripts = []
            for start, names in groups.items():
                if len(start) > 1:
                    raise InvalidTopology(
                        f"shard {names[0]!r} is at the revisions {', '.join(start)} at once, and SQL can be told from "
                        "one only",
                        "join the branches (`alembic merge`), or apply without looking",
                    )
                order = Order("sql", revision, start=start[0] if start else None)
                text = "" if start == target else _fine(await crew.ask(order)).sql
                scripts.append(Script(tuple(names), start, text))
            return tuple(scripts)

    async def status(self, *, metadata: MetaData | None = None) -> SchemaStatus:
        """The revision of each shard, and where the shards' tables differ. A shard that does not answer is told so.

        Args:
            metadata: compare the tables with it, too.

        Raises:
            CatalogUnavailable: no answer.
            InvalidTopology: the migration files are wrong.
        """
        topology = await self.topology()
        moving = [job for job in await asyncio.to_thread(self._jobs.all) if not job.status.over]
        heads: tuple[str, ...] = ()
        if self._has_config():
            async with Crew(self._given()) as crew:
                heads = await self._meant(crew, "heads")

        async def look(conn: AsyncConnection[Any]) -> tuple[tuple[str, ...], Structure]:
            return await read_revision(conn), await read_structure(conn, moving=bool(moving))

        answers = await each(topology.shards, look)
        shards, structures, left_out = [], dict[str, Structure](), list[str]()
        for shard in topology.shards:
            answer = answers[shard.id]
            if isinstance(answer, ShardlibError):
                shards.append(ShardRevision(shard.id, shard.name, error=str(answer)))
                continue
            revision, structure = answer
            shards.append(ShardRevision(shard.id, shard.name, revision, tables=bool(structure)))
            job = next((job for job in moving if shard.id in job.targets), None)
            if job is not None:
                left_out.append(f"shard {shard.name!r}: job {job.id} brings rows there")
            elif structure or shard.id in topology.ring.shard_ids:
                structures[shard.name] = structure
        return SchemaStatus(
            heads=heads,
            shards=tuple(shards),
            drift=tuple(differences(structures)),
            unlike_metadata=await _unlike(topology, structures, metadata),
            unknown=tuple(sorted(_unknown_in(topology, structures.values()))),
            not_compared=tuple(left_out),
            change=await asyncio.to_thread(change_of, self._catalog),
        )

    def _has_config(self) -> bool:
        return Path(self._config).is_file()

    def _given(self) -> str:
        if find_spec("alembic") is None:
            raise UnsupportedOperation("running migrations without Alembic", "install the extra `schema`")
        if not self._has_config():
            raise InvalidArgument("config", self._config, "the path of an alembic.ini; `alembic init` makes one")
        return self._config

    async def _meant(self, crew: Crew, revision: str) -> tuple[str, ...]:
        return _fine(await crew.ask(Order("heads", revision))).revisions

    async def _revisions(self, topology: Topology) -> dict[str, tuple[str, ...]]:
        """The revision of each shard, by id.

        Raises:
            ShardUnavailable: one does not answer.
        """
        found = {}
        for shard_id, answer in (await each(topology.shards, read_revision)).items():
            if isinstance(answer, ShardlibError):
                raise answer
            found[shard_id] = answer
        return found

    async def _refuse_unstamped(self, topology: Topology, before: dict[str, tuple[str, ...]]) -> None:
        """Tables that came without migrations would be made once more.

        Raises:
            InvalidTopology: a shard has such.
        """
        names = {table.fullname for table in topology.tables}
        for shard in topology.shards:
            if not before[shard.id] and (there := names & tables_in(await asked(shard, read_structure))):
                raise InvalidTopology(
                    f"shard {shard.name!r} has the tables {', '.join(sorted(there))}, and no revision",
                    "say which one they are at: `schema stamp REVISION`; or drop them if they are left over",
                )

    async def _register(self, metadata: MetaData | None) -> tuple[str, ...]:
        if metadata is None:
            return ()
        known = {table.fullname for table in (await self.topology()).tables}
        tables = records(metadata)
        after = await asyncio.to_thread(publish_change, self._catalog, lambda now: _with_tables(now, metadata))
        names = sorted(table.fullname for table in tables)
        return tuple(name for name in names if name not in known and after.table(name) is not None)

    async def _unknown(self, topology: Topology) -> tuple[str, ...]:
        found = await each(topology.shards, read_structure)
        return tuple(
            sorted(_unknown_in(topology, [one for one in found.values() if not isinstance(one, ShardlibError)]))
        )


def _with_tables(now: Topology, metadata: MetaData) -> Topology:
    after = record_tables(now, records(metadata), nonce=uuid4().hex)
    if after is not now and now.moves:
        raise InvalidTopology(
            f"the shards are changed, but job {now.moves[0].job} is moving rows, so that the cluster cannot be told of "
            "new tables",
            "run this again when the job is over: it tells the cluster then",
        )
    return after


def _unknown_in(topology: Topology, structures: Iterable[Structure]) -> set[str]:
    """Tables, not views, that the cluster does not know: it would not route to them, nor move their rows."""
    return {name for one in structures for name in real_tables(one) if topology.table(name) is None}


def _on(order: Order, shard: Shard) -> Order:
    return Order(
        order.do,
        order.target,
        shard=shard.name,
        dsn=shard.primary.reveal(),
        lock_timeout_s=order.lock_timeout_s,
        lock_wait_s=order.lock_wait_s,
    )


def _fine(answer: Answer) -> Answer:
    """An answer about the files.

    Raises:
        InvalidTopology: they are wrong.
    """
    if answer.error is not None:
        raise InvalidTopology(answer.error, answer.way_out or "mend the migration files")
    return answer


async def _while_kept(turn: Turn, work: Coroutine[Any, Any, T]) -> T:
    """The work, for as long as the turn is ours; what runs on a shard then is ended by the end of its process.

    Raises:
        InvalidTopology: it was lost.
    """
    doing, kept = asyncio.ensure_future(work), asyncio.ensure_future(turn.kept())
    try:
        await asyncio.wait([doing, kept], return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise InvalidTopology(
                "the lease of this change was lost: the catalog did not answer for too long",
                "run it again: it goes on where it was",
            )
        try:
            return doing.result()
        except Conflict:
            raise InvalidTopology("another process has taken this change over", "look at `schema status`") from None
    finally:
        for task in (doing, kept):
            task.cancel()
        await asyncio.wait([doing, kept])


async def _unlike(topology: Topology, structures: dict[str, Structure], metadata: MetaData | None) -> tuple[str, ...]:
    """Where the first shard that has tables is not as the metadata says; the others are compared with it."""
    if metadata is None:
        return ()
    name = next((name for name, structure in structures.items() if structure), None)
    if name is None:
        return tuple(f"table {table!r} is in the metadata and not on the shards" for table in metadata.tables)
    return tuple(await asyncio.to_thread(_compare, topology.shard(name), metadata))


def _compare(shard: Shard, metadata: MetaData) -> list[str]:
    conninfo = shard.primary.conninfo(connect_timeout=10, application_name="shardlib schema")
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            return unlike_metadata(connection, metadata)
    except OperationalError as error:
        raise unavailable(shard, error.orig or error) from None
    finally:
        engine.dispose()
