"""What has moved is deleted where it was, and nothing else is; nothing of a job stays behind: on real servers."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import psycopg
import pytest

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TokenRange
from shardlib_ops import LocalCluster
from shardlib_ops.reshard import control
from shardlib_ops.reshard.cleanup import leftovers, purge, retire
from shardlib_ops.reshard.connect import Runner, is_superseded
from shardlib_ops.reshard.guard import activate_guard, foreign_writers, install_guard
from shardlib_ops.reshard.world import Blocked
from tests.support.old_side import OldSide, old_side

Make = Callable[..., AbstractAsyncContextManager[OldSide]]


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalCluster]:
    with LocalCluster(shards=1) as cluster:
        yield cluster


@pytest.fixture
def make(servers: LocalCluster) -> Make:
    return partial(old_side, servers)


async def guarded(side: OldSide) -> None:
    await install_guard(side.conn, side.runner, side.shapes)
    await activate_guard(
        side.conn, side.runner, side.shapes, hash_function=side.link.hash_function, ranges=side.link.ranges
    )
    assert await foreign_writers(side.conn, side.shapes) == ()


async def test_what_has_moved_goes_while_others_write(make: Make) -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print(f"SEED={seed}")
    source = random.Random(seed)
    ddl = """
        CREATE TABLE purged (k text, id int, v int NOT NULL DEFAULT 0, pad text DEFAULT repeat('x', 150),
                             PRIMARY KEY (k, id));
        CREATE TABLE spared (k text PRIMARY KEY, note text);
        CREATE TABLE refers (k text, id int, PRIMARY KEY (k, id),
                             FOREIGN KEY (k, id) REFERENCES purged ON DELETE RESTRICT);
        CREATE TABLE seen (what text);
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO seen VALUES (OLD.k); RETURN OLD; END $$;
        CREATE TRIGGER see AFTER DELETE ON purged FOR EACH ROW EXECUTE FUNCTION see();
    """
    async with make(ddl, ("purged", ("k",)), ("spared", ("k",))) as side:
        moved, stays = side.some(True, 300), side.some(False, 300)
        rows = [(key, number) for key in (*moved, *stays) for number in range(20)]
        source.shuffle(rows)
        async with side.look.cursor() as cursor:
            async with cursor.copy("COPY purged (k, id) FROM STDIN") as copy:
                for row in rows:
                    await copy.write_row(row)
            await cursor.executemany("INSERT INTO spared VALUES (%s, 'x')", [(key,) for key in (*moved, *stays)])
        await side.look.execute("INSERT INTO refers SELECT k, id FROM purged")
        await side.know([(key,) for key in moved])
        await guarded(side)

        done = asyncio.Event()
        added = dict.fromkeys(stays, 0)

        async def write(number: int) -> int:
            count = 0
            async with side.client() as client:
                for key in itertools.cycle(stays[number::2]):
                    # Other rows move about in the table, and new ones come behind the pass.
                    await client.execute("UPDATE purged SET v = v + 1 WHERE k = %s AND id = %s", (key, count % 20))
                    await client.execute("INSERT INTO purged (k, id) VALUES (%s, %s)", (key, 100 + count))
                    added[key] += 1
                    count += 1
                    if done.is_set():
                        return count

            raise AssertionError("unreachable")

        writers = [asyncio.create_task(write(number)) for number in range(2)]
        told: list[int] = []
        deleted = await purge(side.link, side.shapes, rows_per_s=6000, on_progress=told.append)
        done.set()
        written = sum(await asyncio.gather(*writers))
        assert deleted == 300 * 20 + 300
        assert told == sorted(told)
        assert told[-1] == deleted
        assert len(told) > 3
        assert written > 20
        left = await side.fetch("SELECT k, count(*), sum(v) FROM purged GROUP BY k")
        assert {key: count for key, count, _ in left} == {key: 20 + added[key] for key in stays}
        assert sum(total for _, _, total in left) == written
        assert sorted(await side.fetch("SELECT k FROM spared")) == sorted((key,) for key in stays)
        assert await side.fetch("SELECT count(*) FROM seen") == [(0,)], "a trigger of the application has fired"
        assert await purge(side.link, side.shapes) == 0


async def test_the_rate_is_kept(make: Make) -> None:
    async with make("CREATE TABLE paced (k text PRIMARY KEY, pad text)", ("paced", ("k",))) as side:
        moved = side.some(True, 3000)
        async with side.look.cursor() as cursor:
            await cursor.executemany("INSERT INTO paced VALUES (%s, repeat('x', 200))", [(key,) for key in moved])
        await side.know([(key,) for key in moved])
        clock = asyncio.get_running_loop().time
        began, marks = clock(), []

        def mark(deleted: int) -> None:
            marks.append((clock() - began, deleted))

        assert await purge(side.link, side.shapes, rows_per_s=3000, blocks=4, on_progress=mark) == 3000
        # A batch holds about 130 rows, so at any time no more than that is ahead.
        assert all(deleted <= 3000 * at + 300 for at, deleted in marks)
        assert clock() - began < 40


COLUMNS = {
    "words": ('k text COLLATE "C"', ("k",)),
    "numbers": ("k bigint", ("k",)),
    "pairs": ("k text, more int", ("k", "more")),
    "triples": ('k uuid, more text COLLATE "POSIX", last bool', ("k", "more", "last")),
    "instants": ("k timestamptz", ("k",)),
    "bytestrings": ("k bytea", ("k",)),
}
SAMPLES = {
    "words": "SELECT 'wörd ' || n FROM generate_series(1, 2000) n",
    "numbers": "SELECT (n * n * n)::text FROM generate_series(-1000, 1000) n",
    "pairs": "SELECT 'ü' || n, (n * n)::text FROM generate_series(1, 2000) n",
    "triples": "SELECT md5(n::text)::uuid::text, repeat('é', n % 30), (n % 2 = 0)::text"
    " FROM generate_series(1, 2000) n",
    "instants": "SELECT to_char(timestamp '1970-01-01' + n * interval '7919 s', 'YYYY-MM-DD HH24:MI:SS') || '+00'"
    " FROM generate_series(1, 2000) n",
    "bytestrings": r"SELECT '\x' || md5(n::text) FROM generate_series(1, 2000) n",
}


@pytest.mark.parametrize("kind", list(COLUMNS))
async def test_keys_of_each_type(make: Make, kind: str) -> None:
    columns, key = COLUMNS[kind]
    async with make(f"CREATE TABLE {kind} ({columns}, PRIMARY KEY ({', '.join(key)}))", (kind, key)) as side:
        texts = [tuple(row) for row in await side.fetch(SAMPLES[kind])]
        if kind == "triples":
            texts = [(*row[:2], row[2][0]) for row in texts]
        typed = ", ".join(f"%s::{column.split()[1]}" for column in columns.split(", "))
        async with side.look.cursor() as cursor:
            await cursor.executemany(f"INSERT INTO {kind} VALUES ({typed})", texts)
        moved = [row for row in texts if side.link.moves("\0".join(row).encode())]
        await side.know(moved)
        await guarded(side)
        assert 0 < len(moved) < len(texts)
        assert await purge(side.link, side.shapes) == len(moved)
        assert await side.fetch(f"SELECT count(*) FROM {kind}") == [(len(texts) - len(moved),)]
        shown = ", ".join(f"{name}::text" for name in key)
        if kind in ("words", "numbers", "pairs", "bytestrings"):
            left = {tuple(row) for row in await side.fetch(f"SELECT {shown} FROM {kind}")}
            assert left == set(texts) - set(moved)


async def test_partitions_are_purged(make: Make) -> None:
    ddl = """
        CREATE TABLE leaves (k text, id int, PRIMARY KEY (k, id)) PARTITION BY RANGE (id);
        CREATE TABLE leaves_a PARTITION OF leaves FOR VALUES FROM (0) TO (5) PARTITION BY HASH (k);
        CREATE TABLE leaves_a0 PARTITION OF leaves_a FOR VALUES WITH (MODULUS 1, REMAINDER 0);
        CREATE TABLE leaves_b PARTITION OF leaves DEFAULT;
    """
    async with make(ddl, ("leaves", ("k",))) as side:
        moved, stays = side.some(True, 50), side.some(False, 50)
        async with side.look.cursor() as cursor:
            rows = [(key, number) for key in (*moved, *stays) for number in range(10)]
            await cursor.executemany("INSERT INTO leaves VALUES (%s, %s)", rows)
        await side.know([(key,) for key in moved])
        await guarded(side)
        assert await purge(side.link, side.shapes) == 500
        assert {key for (key,) in await side.fetch("SELECT DISTINCT k FROM leaves")} == set(stays)


async def test_it_goes_on_after_its_runner_was_killed(make: Make) -> None:
    async with make("CREATE TABLE halfway (k text PRIMARY KEY, pad text)", ("halfway", ("k",))) as side:
        moved, stays = side.some(True, 4000), side.some(False, 1000)
        async with side.look.cursor() as cursor:
            await cursor.executemany(
                "INSERT INTO halfway VALUES (%s, repeat('x', 200))", [(key,) for key in (*moved, *stays)]
            )
        await side.know([(key,) for key in moved])
        await guarded(side)
        some_gone = asyncio.Event()

        async def kill() -> None:
            await some_gone.wait()
            await side.look.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
                (side.runner.application("purge 1"),),
            )

        killer = asyncio.create_task(kill())

        async def breathe() -> None:
            await killer

        with pytest.raises(psycopg.OperationalError):
            await purge(
                side.link, side.shapes, blocks=4, on_progress=lambda n: some_gone.set() if n else None, pause=breathe
            )
        (left,) = (await side.fetch("SELECT count(*) FROM halfway"))[0]
        assert 1000 < left < 5000
        # The next runner takes the job; the one before is refused by the shard.
        await control.claim(side.conn, Runner(side.job, 2))
        with pytest.raises(psycopg.Error) as caught:
            await purge(side.link, side.shapes)
        assert is_superseded(caught.value)
        assert await purge(side.linked(2), side.shapes) == left - 1000
        assert await side.fetch("SELECT count(*) FROM halfway") == [(1000,)]


async def test_a_key_outside_the_ranges_stops_it_before_anything_is_deleted(make: Make) -> None:
    async with make("CREATE TABLE wary (k text PRIMARY KEY)", ("wary", ("k",))) as side:
        moved, stays = side.some(True, 30), side.some(False, 30)
        async with side.look.cursor() as cursor:
            await cursor.executemany("INSERT INTO wary VALUES (%s)", [(key,) for key in (*moved, *stays)])
        await side.know([(key,) for key in (*moved, stays[7])])
        with pytest.raises(InvalidTopology, match=f"{stays[7]}.*in none of the job's ranges; nothing was deleted"):
            await purge(side.link, side.shapes)
        assert await side.fetch("SELECT count(*) FROM wary") == [(60,)]
        # The key belongs to another leg of the same shard.
        everything = [TokenRange(0, (1 << 64) - 1)]
        assert await purge(side.link, side.shapes, ranges=everything) == 31
        with pytest.raises(InvalidArgument, match="rows_per_s=0"):
            await purge(side.link, side.shapes, rows_per_s=0)
        with pytest.raises(InvalidArgument, match="blocks=0"):
            await purge(side.link, side.shapes, blocks=0)


async def test_a_locked_row_is_waited_for_and_then_its_holder_named(make: Make) -> None:
    async with make("CREATE TABLE held (k text PRIMARY KEY)", ("held", ("k",))) as side:
        moved = side.some(True, 30)
        async with side.look.cursor() as cursor:
            await cursor.executemany("INSERT INTO held VALUES (%s)", [(key,) for key in moved])
        await side.know([(key,) for key in moved])
        async with side.client(application_name="forgotten") as client:
            await client.execute("BEGIN")
            await client.execute("SELECT * FROM held WHERE k = %s FOR UPDATE", (moved[3],))
            with pytest.raises(Blocked, match=rf"'held'.*process {client.info.backend_pid} .*forgotten"):
                await purge(side.link, side.shapes, lock_s=0.3)
        assert await purge(side.link, side.shapes) == 30


async def test_nothing_of_a_job_stays(make: Make) -> None:
    ddl = "CREATE TABLE retired (k text PRIMARY KEY);"
    ddl += "CREATE TABLE beside (k text, PRIMARY KEY (k)) PARTITION BY HASH (k);"
    ddl += "CREATE TABLE beside_0 PARTITION OF beside FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
    async with make(ddl, ("retired", ("k",)), ("beside", ("k",))) as side:
        tables = "retired", "beside", "beside_0"
        await guarded(side)
        await side.know([(side.some(True, 1)[0],)])
        name = control.publication(side.job)
        await side.look.execute(f"CREATE PUBLICATION {name} FOR TABLE retired")
        await side.look.execute("INSERT INTO shardlib.copied VALUES (%s, 1, 'retired', '0/1', 7)", (side.job,))
        slots = [control.slot(side.job, leg, "reverse") for leg in (1, 2)]
        for slot in slots:
            await side.look.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
        # Others: a job whose number begins alike, and what the application has.
        neighbour = Runner(side.job * 10, 1)
        await control.claim(side.conn, neighbour)
        await control.create_keys(side.conn, neighbour)
        left = await leftovers(side.conn, side.job)
        assert len(left) == 2 + 1 + 6 + 2 + 1 + 1 + 1, left
        for what in (slots[0], name, "~shardlib_job", f"job_{side.job}_guard_", f"job_{side.job}_keys", "copied"):
            assert any(what in line for line in left), (what, left)

        reader = await reading(side, slots[1], name)
        async with side.client(application_name="keeps a table") as client:
            await client.execute("BEGIN")
            await client.execute("SELECT * FROM retired")
            with pytest.raises(Blocked, match="keeps a table"):
                await retire(side.conn, side.runner, slots=slots, publication=name, budget_s=0.5)
        assert await leftovers(side.conn, side.job), "what is left is known"
        reader.close()
        for _ in range(2):
            await retire(side.conn, side.runner, slots=slots, publication=name)
        assert await leftovers(side.conn, side.job) == []
        for table in tables:
            assert await side.fetch(f"SELECT count(*) FROM pg_trigger WHERE tgrelid = '{table}'::regclass") == [(0,)]
        await side.look.execute("INSERT INTO retired VALUES (%s)", (side.some(True, 1)[0],))
        assert len(await leftovers(side.conn, neighbour.job)) == 1
        await retire(side.conn, neighbour, slots=(), publication=control.publication(neighbour.job))
        assert await leftovers(side.conn, neighbour.job) == []


async def reading(side: OldSide, slot: str, publication: str) -> psycopg.Connection[Any]:
    """Somebody who reads from a slot."""

    def start() -> psycopg.Connection[Any]:
        conn = psycopg.Connection.connect(side.dsn, replication="database", autocommit=True)
        result = conn.pgconn.exec_(
            f"START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '1', publication_names '{publication}')".encode()
        )
        assert result.status == psycopg.pq.ExecStatus.COPY_BOTH
        return conn

    return await asyncio.to_thread(start)


async def test_a_runner_that_lost_the_job_retires_nothing(make: Make) -> None:
    async with make("CREATE TABLE lost_job (k text PRIMARY KEY)", ("lost_job", ("k",))) as side:
        slot = control.slot(side.job, 1, "forward")
        await side.look.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
        await control.claim(side.conn, Runner(side.job, 2))
        with pytest.raises(psycopg.Error) as caught:
            await retire(side.conn, side.runner, slots=[slot], publication="x")
        assert is_superseded(caught.value)
        assert any(slot in line for line in await leftovers(side.conn, side.job))
        await retire(side.conn, Runner(side.job, 2), slots=[slot], publication="x")
        assert await leftovers(side.conn, side.job) == []


async def test_a_runner_that_slept_through_the_end_of_a_job_cannot_take_it_again(make: Make) -> None:
    async with make("CREATE TABLE over (k text PRIMARY KEY)", ("over", ("k",))) as side:
        later, name = Runner(side.job, 5), control.publication(side.job)
        await control.claim(side.conn, later)
        await retire(side.conn, later, slots=(), publication=name)
        assert await leftovers(side.conn, side.job) == []
        for slept in (side.runner, Runner(side.job, 4), later):
            with pytest.raises(psycopg.Error) as caught:
                await control.claim(side.conn, slept)
            assert is_superseded(caught.value)
        # Who follows the one that died before it could say that the job is over.
        await control.claim(side.conn, Runner(side.job, 6))
        await retire(side.conn, Runner(side.job, 6), slots=(), publication=name)
        assert await leftovers(side.conn, side.job) == []


class Watched:
    """A connection that does something before a statement is sent."""

    def __init__(self, conn: psycopg.AsyncConnection[Any], part: str, before: Callable[[], Awaitable[None]]) -> None:
        self._conn, self._part, self._before = conn, part, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    async def execute(self, query: Any, *rest: Any) -> Any:
        if self._part in str(query):
            await self._before()
        return await self._conn.execute(query, *rest)


async def test_a_later_runner_cannot_take_the_job_while_a_slot_is_dropped(make: Make) -> None:
    """It would make a slot of the same name, and that one would be dropped."""
    async with make("CREATE TABLE slots (k text PRIMARY KEY)", ("slots", ("k",))) as side:
        slot = control.slot(side.job, 1, "forward")
        await side.look.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
        tasks: list[asyncio.Task[None]] = []
        early: set[asyncio.Task[None]] = set()

        async def another() -> None:
            tasks.append(asyncio.create_task(control._take(side.look, Runner(side.job, 2))))
            done, _ = await asyncio.wait(tasks, timeout=1.0)
            early.update(done)

        conn: Any = Watched(side.conn, "pg_drop_replication_slot", another)
        with pytest.raises(psycopg.Error) as caught:
            await retire(conn, side.runner, slots=[slot], publication="x")
        assert is_superseded(caught.value)
        assert early == set(), "another runner held the job when the slot was dropped"
        await asyncio.wait_for(tasks[0], 20)
        assert not any(slot in line for line in await leftovers(side.conn, side.job))
        await retire(side.conn, Runner(side.job, 2), slots=[slot], publication="x")
        assert await leftovers(side.conn, side.job) == []
