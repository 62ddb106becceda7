"""Changes of moving rows flow to the other shard, each exactly once: on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest

from shardlib.errors import InvalidArgument, InvalidTopology, ShardlibError
from shardlib.topology import Table
from shardlib_ops import LocalCluster
from shardlib_ops.reshard import control
from shardlib_ops.reshard.connect import Runner, is_lost, is_superseded
from shardlib_ops.reshard.stream import (
    CannotFollow,
    Diverged,
    SchemaChanged,
    SlotBlocked,
    SlotLost,
    Stream,
    StreamStopped,
    create_publication,
    create_slot,
    drop_slot,
    lsn_number,
    lsn_text,
    slot_state,
)
from tests.support.streaming import Rig

Make = Callable[..., Awaitable[Rig]]


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalCluster]:
    settings = {"max_prepared_transactions": "10", "max_replication_slots": "40", "max_wal_senders": "40"}
    with LocalCluster(shards=2, settings=settings) as cluster:
        yield cluster


@pytest.fixture
async def make(servers: LocalCluster) -> AsyncIterator[Make]:
    made: list[Rig] = []

    async def make_rig(ddl: str, *tables: tuple[str, Sequence[str]]) -> Rig:
        rig = Rig(servers, [Table(name, tuple(key)) for name, key in tables], ddl)
        await rig.open()
        made.append(rig)
        return rig

    yield make_rig
    for rig in made:
        await rig.close()


def counters(name: str) -> tuple[str, tuple[str, tuple[str, ...]]]:
    columns = "k text, id int, v int NOT NULL, seen int[] NOT NULL DEFAULT '{}', PRIMARY KEY (k, id)"
    return f"CREATE TABLE {name} ({columns})", (name, ("k",))


async def test_rows_arrive_with_their_keys_and_only_those_that_move(make: Make) -> None:
    ddl, table = counters("plain")
    rig = await make(ddl, table)
    stream = rig.stream()
    moving, staying = rig.keys(True), rig.keys(False)
    async with rig.running(stream):
        for size in (1, 3, 60, 400):
            ours, others = list(itertools.islice(moving, size)), list(itertools.islice(staying, size))
            async with rig.a.transaction(), rig.a.cursor() as cursor:
                await cursor.executemany("INSERT INTO plain VALUES (%s, 1, 0)", [(key,) for key in ours + others])
            await rig.a.execute("UPDATE plain SET v = v + 1, seen = seen || v WHERE id = 1")
            await rig.a.execute("DELETE FROM plain WHERE k = %s", (ours[0],))
            await rig.drained(stream)
            assert await rig.assert_same("plain") or size == 1
        wanted = set(itertools.islice(rig.keys(True), 1 + 3 + 60 + 400))
        assert await rig.key_rows(rig.b) == await rig.key_rows(rig.a) == wanted
        assert sorted(k for k, _ in rig.new_keys) == sorted(wanted), "a key was handed over twice"
        assert stream.lag_bytes is not None
        assert stream.transactions_applied >= 12


async def test_kills_at_random_moments_apply_nothing_twice_and_lose_nothing(make: Make) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    ddl, table = counters("killed")
    bag = "; CREATE TABLE bag (k text NOT NULL, v int, w text); ALTER TABLE bag REPLICA IDENTITY FULL"
    rig = await make(ddl + bag, table, ("bag", ("k",)))
    keys = list(itertools.islice(rig.keys(True), 12)) + list(itertools.islice(rig.keys(False), 6))
    stream = rig.stream(batch_changes=7)
    stop = asyncio.Event()

    async def keep_running() -> None:
        while True:
            try:
                await stream.run()
            except Exception as error:
                if not is_lost(error):
                    raise

    async def write() -> int:
        done = 0
        conn = await rig.connect(0)
        while not stop.is_set():
            async with conn.transaction():
                for key in rng.choices(keys, k=rng.choice((1, 1, 2, 5, 30))):
                    await conn.execute(
                        "INSERT INTO killed AS c VALUES (%s, 1, 1, '{1}')"
                        " ON CONFLICT (k, id) DO UPDATE SET v = c.v + 1, seen = c.seen || c.v",
                        (key,),
                    )
                    await conn.execute("INSERT INTO bag VALUES (%s, %s, NULL)", (key, rng.randrange(3)))
                    if rng.random() < 0.3:
                        await conn.execute(
                            "DELETE FROM bag WHERE ctid = (SELECT ctid FROM bag WHERE k = %s LIMIT 1)", (key,)
                        )
                    done += 1
        await conn.close()
        return done

    runner, writer = asyncio.create_task(keep_running()), asyncio.create_task(write())
    try:
        for _ in range(25):
            await asyncio.sleep(rng.random() * 0.15)
            side, what = rng.choice([(rig.a, "stream"), (rig.a, "watch"), (rig.b, "apply")])
            await side.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s",
                (f"shardlib job {rig.job} % {what} 1",),
            )
        stop.set()
        assert await writer > 50
        end = await rig.end()
        async with asyncio.timeout(60):
            while stream.applied < end:
                with contextlib.suppress(StreamStopped, TimeoutError):
                    await stream.reached(end, timeout_s=1)
        await rig.assert_same("killed")
        await rig.assert_same("bag")
        assert await rig.key_rows(rig.a) == await rig.key_rows(rig.b)
    finally:
        stop.set()
        runner.cancel()
        await asyncio.gather(runner, writer, return_exceptions=True)


AWKWARD = """
    DO $$ BEGIN
        CREATE TYPE public.mood AS ENUM ('so', 'la la'); CREATE TYPE public.pair AS (x int, y text);
        CREATE DOMAIN public.short AS varchar(12) CHECK (value <> 'never');
    EXCEPTION WHEN duplicate_object THEN NULL; END $$;
    CREATE TABLE awkward (
        k text, id int, n numeric, m numeric(10, 3), j jsonb, js json, a int[], t text[], b bytea, z timestamptz,
        d date, i interval, f float8, r real, o boolean, e public.mood, p public.pair, s public.short, c char(5),
        u uuid, x int4range, q point, bits bit varying(9), l text, "Odd % ""name" text,
        g text GENERATED ALWAYS AS (k || '!') STORED, PRIMARY KEY (k, id))
"""
ROW = (
    "'-0.10e3', 1.5, '{\"a\": [1, null, \"x\\\\ty\"]}', '{\"b\":  1}', '{1,NULL,3}', ARRAY['a\"b', NULL, 'c,\\d', ''],"
    " '\\x00ff5c', '2024-03-31 01:59:59.5+02', '0044-03-15 BC', '1 mon -3 days 04:05:06.7', 0.1::float8 + 0.2, 1e-7,"
    " true, 'la la', ROW(NULL, E'q\"\\\\ \\t(')::public.pair, 'ok', 'ab', gen_random_uuid(), '[1,5)', '(1,2)', '1011',"
    " E'tab\\tline\\nback\\\\slash\\rN\\\\N é 漢', NULL"
)


@pytest.mark.parametrize("many", [False, True])
async def test_values_of_all_kinds_of_types_arrive_as_they_are(make: Make, many: bool) -> None:
    rig = await make("DROP TABLE IF EXISTS awkward;" + AWKWARD, ("awkward", ("k",)))
    keys = [*itertools.islice(rig.keys(True), 60 if many else 2), "moves not", "back\\slash", "ta\tb"]
    stream = rig.stream()
    async with rig.running(stream):
        async with rig.a.transaction():
            for key in keys:
                await rig.a.execute(f"INSERT INTO awkward SELECT %s, 1, {ROW.replace('%', '%%')}", (key,))
                await rig.a.execute("INSERT INTO awkward (k, id) VALUES (%s, 2)", (key,))
        await rig.drained(stream)
        assert len(await rig.assert_same("awkward")) >= 4
        for change in (
            "UPDATE awkward SET f = f * 3, l = l || l, t = array_append(t, 'z'), s = NULL",
            "UPDATE awkward SET id = id + 10, e = 'so' WHERE id = 1",
            "DELETE FROM awkward WHERE id = 2",
        ):
            await rig.a.execute(change.encode())
            await rig.drained(stream)
            await rig.assert_same("awkward")
    for conn in (rig.a, rig.b):
        await conn.execute("DROP TABLE awkward")


@pytest.mark.parametrize("rows", [3, 80])
async def test_values_out_of_line_stay_when_the_stream_does_not_carry_them(make: Make, rows: int) -> None:
    name = f"toast{rows}"
    ddl = f"CREATE TABLE {name} (k text, id int, v int, w int, big text, PRIMARY KEY (k, id));"
    ddl += f"ALTER TABLE {name} ALTER big SET STORAGE EXTERNAL"
    rig = await make(ddl, (name, ("k",)))
    keys = list(itertools.islice(rig.keys(True), rows))
    stream = rig.stream()
    async with rig.running(stream):
        async with rig.a.transaction():
            for key in keys:
                await rig.a.execute(f"INSERT INTO {name} VALUES (%s, 1, 0, 0, repeat(%s, 4000))".encode(), (key, key))
        await rig.drained(stream)
        for change in (
            "UPDATE {} SET v = v + 1",
            "UPDATE {} SET v = v + 1, big = 'short' WHERE k LIKE '%%1'",
            "UPDATE {} SET id = 2",
            "UPDATE {} SET id = 3, v = 9; UPDATE {} SET w = 5",
        ):
            await rig.a.execute(change.replace("{}", name).replace("%%", "%").encode())
            await rig.drained(stream)
            assert len(await rig.assert_same(name)) == rows
        async with rig.a.transaction():  # in one transaction: the insert's value fills what the update leaves out
            await rig.a.execute(f"DELETE FROM {name}".encode())
            for key in keys:
                await rig.a.execute(f"INSERT INTO {name} VALUES (%s, 1, 0, 0, repeat('y', 9000))".encode(), (key,))
                await rig.a.execute(f"UPDATE {name} SET v = 7 WHERE k = %s".encode(), (key,))
        await rig.drained(stream)
        assert len(await rig.assert_same(name)) == rows


async def test_rows_that_change_their_key_come_and_go(make: Make) -> None:
    ddl, table = counters("rekeyed")
    rig = await make(ddl, table)
    moving, staying = rig.keys(True), rig.keys(False)
    a, b, c, d = next(moving), next(moving), next(staying), next(staying)
    stream = rig.stream()
    async with rig.running(stream):
        for n, key in enumerate((a, b, c, d)):
            await rig.a.execute("INSERT INTO rekeyed VALUES (%s, %s, 1)", (key, n))
        for old, new in ((a, next(staying)), (c, next(moving)), (b, next(moving)), (d, next(staying))):
            await rig.a.execute("UPDATE rekeyed SET k = %s, v = v + 1 WHERE k = %s", (new, old))
        async with rig.a.transaction():
            await rig.a.execute("DELETE FROM rekeyed WHERE id = 1")
            await rig.a.execute("INSERT INTO rekeyed VALUES (%s, 1, 77)", (b,))
        await rig.drained(stream)
        assert len(await rig.assert_same("rekeyed")) == 2


async def test_a_row_that_comes_without_all_its_values_stops_the_stream(make: Make) -> None:
    ddl = "CREATE TABLE comes (k text PRIMARY KEY, v int, big text); ALTER TABLE comes ALTER big SET STORAGE EXTERNAL"
    rig = await make(ddl, ("comes", ("k",)))
    old, new = next(rig.keys(False)), next(rig.keys(True))
    await rig.a.execute("INSERT INTO comes VALUES (%s, 1, repeat('x', 9000))", (old,))
    await rig.a.execute("UPDATE comes SET k = %s", (new,))
    with pytest.raises(
        CannotFollow, match=r"table 'comes' gave a row .* 'big' is not in the stream; .*REPLICA IDENTITY"
    ):
        await asyncio.wait_for(rig.stream().run(), 20)


async def test_unique_values_that_change_hands(make: Make) -> None:
    ddl = "CREATE TABLE hands (k text, id int, u int, PRIMARY KEY (k, id), UNIQUE (k, u))"
    rig = await make(ddl, ("hands", ("k",)))
    key = next(rig.keys(True))
    stream = rig.stream()
    await rig.a.execute("INSERT INTO hands SELECT %s, n, n FROM generate_series(1, 50) n", (key,))
    async with rig.running(stream):
        await rig.drained(stream)
        async with rig.a.transaction():
            await rig.a.execute("UPDATE hands SET u = u + 1000")
            await rig.a.execute("UPDATE hands SET u = 1000 + 51 - (u - 1000) + 1000 WHERE u < 2000")
            await rig.a.execute("UPDATE hands SET u = u - 2000")
        await rig.drained(stream)
        assert len(await rig.assert_same("hands")) == 50
        async with rig.a.transaction():
            await rig.a.execute("DELETE FROM hands WHERE id = 1")
            await rig.a.execute("UPDATE hands SET u = 50 WHERE id = 2")
            await rig.a.execute("INSERT INTO hands SELECT %s, 100 + n, -n FROM generate_series(1, 60) n", (key,))
        await rig.drained(stream)
        await rig.assert_same("hands")


@pytest.mark.parametrize("rows", [4, 300])
async def test_a_bag_keeps_how_often_each_row_is_in_it(make: Make, rows: int, rng: random.Random) -> None:
    name = f"bagged{rows}"
    ddl = f"CREATE TABLE {name} (k text NOT NULL, n numeric, j json, w text); ALTER TABLE {name} REPLICA IDENTITY FULL"
    rig = await make(ddl, (name, ("k",)))
    key = next(rig.keys(True))
    stream = rig.stream()
    async with rig.running(stream):
        for _ in range(3):
            async with rig.a.transaction():
                for _ in range(rows):
                    value = rng.choice(["1.0", "1.00", "1", None])
                    await rig.a.execute(
                        f"INSERT INTO {name} VALUES (%s, %s, '{{\"a\": 1}}', %s)".encode(),
                        (key, value, rng.choice("ab")),
                    )
                for _ in range(rows // 3):
                    one = f"(SELECT ctid FROM {name} ORDER BY random() LIMIT 1)"
                    await rig.a.execute(f"DELETE FROM {name} WHERE ctid = {one}".encode())
                    await rig.a.execute(f"UPDATE {name} SET w = w || 'c', n = NULL WHERE ctid = {one}".encode())
            await rig.drained(stream)
            await rig.assert_same(name)
    assert len(await rig.assert_same(name)) == 3 * (rows - rows // 3)


async def test_composite_keys_and_other_schemas(servers: LocalCluster) -> None:
    ddl = (
        'CREATE SCHEMA IF NOT EXISTS "Other"; CREATE TABLE "Other"."T t" ("K" text, day date, id int'
        ' GENERATED ALWAYS AS IDENTITY, v int, PRIMARY KEY ("K", day, id))'
    )
    rig = Rig(servers, [Table("T t", ("K", "day"), "Other")], ddl)
    await rig.open()
    try:
        stream = rig.stream()
        async with rig.running(stream):
            await rig.a.execute(
                """INSERT INTO "Other"."T t" ("K", day, v)
                   SELECT 'q"' || n, date '2024-01-01' + n, n FROM generate_series(1, 100) n"""
            )
            await rig.a.execute("""UPDATE "Other"."T t" SET v = v + 1""")
            await rig.drained(stream)
        there = await rig.rows(rig.b, """SELECT "K", day::text, id, v FROM "Other"."T t" ORDER BY id""")
        every = await rig.rows(rig.a, """SELECT "K", day::text, id, v FROM "Other"."T t" ORDER BY id""")
        assert there == [row for row in every if rig.link.moves(f"{row[0]}\0{row[1]}".encode())]
        assert 20 < len(there) < 80
        name = control.keys_table(rig.job).as_string()
        keys = [await rig.rows(conn, f"SELECT k, more FROM {name} ORDER BY 1, 2") for conn in (rig.a, rig.b)]
        assert keys[0] == keys[1] == sorted((row[0], [row[1]]) for row in there)
    finally:
        await rig.close()


async def test_transactions_that_roll_back_in_part_are_large_or_are_prepared(make: Make) -> None:
    ddl, table = counters("parts")
    rig = await make(ddl, table)
    key = next(rig.keys(True))
    stream = rig.stream(batch_changes=100)
    async with rig.running(stream):
        async with rig.a.transaction():
            await rig.a.execute("INSERT INTO parts VALUES (%s, 1, 0)", (key,))
            await rig.a.execute("SAVEPOINT a; UPDATE parts SET v = 100; ROLLBACK TO a")
            await rig.a.execute("SAVEPOINT b; UPDATE parts SET v = v + 1; RELEASE b")
        other = await rig.connect(0)
        await other.execute("BEGIN")
        await other.execute("INSERT INTO parts VALUES (%s, 2, 0)", (key,))
        await other.execute("PREPARE TRANSACTION 'p1'")
        await rig.a.execute("INSERT INTO parts SELECT %s, 1000 + n, n FROM generate_series(1, 2500) n", (key,))
        await rig.a.execute("UPDATE parts SET v = v + 1 WHERE id >= 1000")
        await rig.drained(stream)
        assert len(await rig.moved(rig.b, "parts")) == 2501
        await other.execute("COMMIT PREPARED 'p1'")
        await other.close()
        await rig.drained(stream)
        assert len(await rig.assert_same("parts")) == 2502
        async with rig.a.transaction(force_rollback=True):
            await rig.a.execute("UPDATE parts SET v = -1")
        await rig.drained(stream)
        await rig.assert_same("parts")
    position = await control.position(rig.b, rig.job, 1, "forward")
    assert position is not None
    assert lsn_number(position) <= stream.applied


async def test_truncate_empties_the_legs_keys_and_no_others(make: Make) -> None:
    ddl, table = counters("emptied")
    rig = await make(ddl, table)
    moving, foreign = list(itertools.islice(rig.keys(True), 5)), next(rig.keys(False))
    name = control.keys_table(rig.job).as_string()
    # Another leg of the job has brought this one.
    await rig.b.execute("INSERT INTO emptied VALUES (%s, 1, 1)", (foreign,))
    await rig.b.execute(f"INSERT INTO {name} (k) VALUES (%s)".encode(), (foreign,))
    stream = rig.stream()
    async with rig.running(stream):
        for key in moving:
            await rig.a.execute("INSERT INTO emptied VALUES (%s, 1, 1)", (key,))
        async with rig.a.transaction():
            await rig.a.execute("INSERT INTO emptied VALUES (%s, 2, 1)", (moving[0],))
            await rig.a.execute("TRUNCATE emptied")
            await rig.a.execute("INSERT INTO emptied VALUES (%s, 3, 1)", (moving[1],))
        await rig.drained(stream)
        assert sorted(await rig.rows(rig.b, "SELECT k, id FROM emptied")) == sorted([(foreign, 1), (moving[1], 3)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ALTER TABLE {} ADD COLUMN extra int", "'extra' is in the stream and not in the table"),
        ("ALTER TABLE {} DROP COLUMN seen", "'seen' is there now and was not"),
        ("ALTER TABLE {} ALTER v TYPE bigint", "'v' has another type"),
        ("ALTER TABLE {} RENAME TO {}_renamed", "none of the job's tables"),
    ],
)
async def test_a_changed_table_stops_the_stream_with_what_changed(make: Make, change: str, told: str) -> None:
    name = "ddl" + str(abs(hash(change)) % 10**6)
    ddl, table = counters(name)
    rig = await make(ddl, table)
    key = next(rig.keys(True))
    stream = rig.stream()
    async with rig.running(stream) as task:
        await rig.a.execute(f"INSERT INTO {name} VALUES (%s, 1, 1)".encode(), (key,))
        await rig.drained(stream)
        await rig.a.execute(change.replace("{}", name).encode())
        after = f"{name}_renamed" if "RENAME" in change else name
        await rig.a.execute(f"INSERT INTO {after} (k, id, v) VALUES (%s, 2, 1)".encode(), (key,))
        with pytest.raises(StreamStopped) as stopped:
            await stream.reached(await rig.end(), timeout_s=20)
        assert isinstance(stopped.value.__cause__, SchemaChanged)
        with pytest.raises(SchemaChanged, match=told):
            await task
    assert len(await rig.moved(rig.b, name)) == 1
    if "RENAME" not in change:
        with pytest.raises(SchemaChanged, match="not those that the job started with"):
            await rig.stream().run()


async def test_a_later_runner_stops_the_earlier_one_and_goes_on(make: Make) -> None:
    ddl, table = counters("taken")
    rig = await make(ddl, table)
    keys = rig.keys(True)
    stream = rig.stream()
    async with rig.running(stream) as task:
        await rig.a.execute("INSERT INTO taken VALUES (%s, 1, 1)", (next(keys),))
        await rig.drained(stream)
        for conn in (rig.a, rig.b):
            await conn.execute("UPDATE shardlib.job SET token = 2 WHERE id = %s", (rig.job,))
        await rig.a.execute("INSERT INTO taken VALUES (%s, 1, 1)", (next(keys),))
        with pytest.raises(psycopg.Error) as refused:
            await asyncio.wait_for(task, 20)
        assert is_superseded(refused.value)
    assert len(await rig.moved(rig.b, "taken")) == 1
    with pytest.raises(psycopg.Error) as refused:
        await stream.run()
    assert is_superseded(refused.value)
    object.__setattr__(rig.link, "runner", Runner(rig.job, 2))
    stream = rig.stream()
    async with rig.running(stream):
        await rig.drained(stream)
        assert len(await rig.assert_same("taken")) == 2


async def test_keys_of_a_crash_before_the_handing_over_are_handed_over_again(make: Make) -> None:
    ddl, table = counters("crashed")
    rig = await make(ddl, table)
    key = next(rig.keys(True))

    async def crash(keys: Sequence[Any]) -> None:
        raise ConnectionAbortedError("the runner dies here")

    stream = rig.stream(on_new_keys=crash)
    async with rig.running(stream) as task:
        await rig.a.execute("INSERT INTO crashed VALUES (%s, 1, 1)", (key,))
        with pytest.raises(ConnectionAbortedError):
            await asyncio.wait_for(task, 20)
    assert len(await rig.moved(rig.b, "crashed")) == 1, "it was committed before"
    assert await rig.key_rows(rig.a) == set()
    state = await slot_state(rig.a, rig.link.slot)
    position = await control.position(rig.b, rig.job, 1, "forward")
    assert state is not None
    assert position is not None
    assert state.confirmed < lsn_number(position)
    stream = rig.stream()
    async with rig.running(stream):
        await rig.drained(stream)
        assert await rig.key_rows(rig.a) == {key}
        await rig.assert_same("crashed")


async def test_what_the_copy_holds_is_skipped_table_by_table(make: Make) -> None:
    one, two = counters("copied1"), counters("copied2")
    rig = await make(f"{one[0]}; {two[0]}", one[1], two[1])
    key = next(rig.keys(True))
    for table in ("copied1", "copied2"):
        await rig.a.execute(f"INSERT INTO {table} VALUES (%s, 1, 1)".encode(), (key,))
    point = await (await rig.a.execute(
        "SELECT lsn::text FROM pg_create_logical_replication_slot('t_copied', 'pgoutput', true)"
    )).fetchone()  # fmt: skip
    assert point is not None
    await rig.b.execute("INSERT INTO copied1 SELECT %s, 1, 1", (key,))
    await rig.b.execute("INSERT INTO shardlib.copied VALUES (%s, 1, 'copied1', %s, 1)", (rig.job, point[0]))
    await rig.a.execute("SELECT pg_drop_replication_slot('t_copied')")
    for table in ("copied1", "copied2"):
        await rig.a.execute(f"UPDATE {table} SET v = v + 1, seen = seen || v".encode())
    stream = rig.stream()
    async with rig.running(stream):
        await rig.drained(stream)
        await rig.assert_same("copied1")
        await rig.assert_same("copied2")


async def test_a_missing_row_is_no_secret(make: Make) -> None:
    ddl = "CREATE TABLE missing (k text NOT NULL, v int); ALTER TABLE missing REPLICA IDENTITY FULL"
    rig = await make(ddl, ("missing", ("k",)))
    stream = rig.stream()
    async with rig.running(stream) as task:
        await rig.a.execute("INSERT INTO missing VALUES (%s, 1)", (next(rig.keys(True)),))
        await rig.drained(stream)
        await rig.b.execute("DELETE FROM missing")
        await rig.a.execute("UPDATE missing SET v = 2")
        with pytest.raises(Diverged, match="found 0 rows on shard 'shard-02'"):
            await asyncio.wait_for(task, 20)


async def _load(rig: Rig, table: str, keys: Sequence[str], stop: asyncio.Event, written: list[str]) -> None:
    """Counters go up; what was acknowledged is noted down."""
    conn = await rig.connect(0)
    try:
        for n in itertools.count():
            if stop.is_set():
                return
            key = keys[n % len(keys)]
            async with conn.transaction():
                await conn.execute(
                    f"INSERT INTO {table} AS c VALUES (%s, %s, 1)"
                    " ON CONFLICT (k, id) DO UPDATE SET v = c.v + 1".encode(),
                    (key, n % 7),
                )
            written.append(key)
    finally:
        await conn.close()


@contextlib.asynccontextmanager
async def load(rig: Rig, table: str, writers: int = 3) -> AsyncIterator[list[str]]:
    stop, written = asyncio.Event(), []
    keys = list(itertools.islice(rig.keys(True), 30)) + list(itertools.islice(rig.keys(False), 10))
    async with asyncio.TaskGroup() as tasks:
        for _ in range(writers):
            tasks.create_task(_load(rig, table, keys, stop, written))
        try:
            yield written
        finally:
            stop.set()


async def test_standing_still_at_a_slots_point_both_sides_are_equal_under_load(make: Make) -> None:
    ddl, table = counters("still")
    rig = await make(ddl, table)
    stream = rig.stream()
    async with rig.running(stream), load(rig, "still"):
        for n in range(12):
            async with (
                stream.standstill(timeout_s=20) as still,
                await rig.link.open_origin("slot", replication=True) as other,
            ):
                made = await other.execute(
                    f"CREATE_REPLICATION_SLOT still_{rig.job}_{n} TEMPORARY LOGICAL pgoutput"
                    " (SNAPSHOT 'export')".encode()
                )
                row = await made.fetchone()
                assert row is not None
                point, snapshot = lsn_number(row[1]), row[2]
                await still.at(point, timeout_s=20)
                async with await rig.connect(0) as reader:
                    await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                    await reader.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'".encode())
                    left = await rig.moved(reader, "still")
                right = await rig.moved(rig.b, "still")
                assert left == right, f"at {lsn_text(point)}, round {n}"
                await asyncio.sleep(0.02)
                assert right == await rig.moved(rig.b, "still"), "it did not stand still"
        await rig.drained(stream)
        with pytest.raises(InvalidArgument, match="the stream is past it"):
            async with stream.held_at(point, timeout_s=20):
                pass
        ahead = await rig.end() + 20_000
        async with stream.held_at(ahead, timeout_s=20):
            assert stream.applied >= ahead - 20_000
    async with rig.running(stream):
        await rig.drained(stream)
        assert await rig.assert_same("still")


async def test_what_was_acknowledged_before_a_message_is_there_when_it_is_heard(make: Make) -> None:
    ddl, table = counters("barrier")
    gates = "".join(f"CREATE TABLE barrier_gate_{n} ();" for n in range(10))
    rig = await make(gates + ddl, table)
    key = next(rig.keys(True))
    stream = rig.stream()

    async def write_through(gate: int, number: int) -> int:
        """Until the gate is closed; how many were acknowledged."""
        async with await rig.connect(0) as conn:
            for done in itertools.count():
                try:
                    await conn.execute(f"BEGIN; LOCK TABLE barrier_gate_{gate} IN ACCESS SHARE MODE".encode())
                    await conn.execute(
                        "INSERT INTO barrier AS c VALUES (%s, %s, 1) ON CONFLICT (k, id) DO UPDATE SET v = c.v + 1",
                        (key, gate * 10 + number),
                    )
                    await conn.execute("COMMIT")
                except psycopg.errors.UndefinedTable:
                    return done
        raise AssertionError("it never ends")

    async with rig.running(stream):
        for gate in range(10):
            writers = [asyncio.create_task(write_through(gate, number)) for number in range(4)]
            await asyncio.sleep(0.05)
            async with rig.a.transaction():
                await rig.a.execute(f"DROP TABLE barrier_gate_{gate}".encode())
                await rig.a.execute("SELECT pg_logical_emit_message(true, 'shardlib', %s)", (f"{rig.job}/{gate}",))
            lsn = await stream.heard(f"{rig.job}/{gate}", timeout_s=20)
            there = dict(await rig.rows(rig.b, "SELECT id, v FROM barrier"))
            assert stream.applied >= lsn
            acknowledged = await asyncio.gather(*writers)
            assert [there.get(gate * 10 + number, 0) for number in range(4)] == acknowledged
        with pytest.raises(TimeoutError, match=r"the message 'no such' arrived not within 0\.2 s"):
            await stream.heard("no such", timeout_s=0.2)


async def test_the_reverse_stream_starts_where_it_is_told(make: Make) -> None:
    ddl, table = counters("back")
    rig = await make(ddl, table)
    key = next(rig.keys(True))
    stream = rig.stream()
    async with rig.running(stream):
        await rig.a.execute("INSERT INTO back VALUES (%s, 1, 1)", (key,))
        await rig.drained(stream)
    link = rig.link.reversed
    await create_publication(rig.b, link.runner, rig.tables)
    await create_slot(link, timeout_s=20)
    await rig.b.execute("UPDATE back SET v = v + 10")  # before the start: the other side has it
    await rig.a.execute("UPDATE back SET v = v + 10")
    start = await (await rig.b.execute("SELECT pg_current_wal_flush_lsn()::text")).fetchone()
    assert start is not None
    with pytest.raises(InvalidTopology, match="does not say where the stream"):
        await Stream(link, rig.shapes).run()
    await control.start_position(rig.a, link.runner, 1, "reverse", start[0])
    backward = Stream(link, rig.shapes)
    async with rig.running(backward):
        await rig.b.execute("UPDATE back SET v = v + 100, seen = seen || v")
        other = next(rig.keys(True, "new"))
        await rig.b.execute("INSERT INTO back VALUES (%s, 1, 5)", (other,))
        end = await (await rig.b.execute("SELECT pg_current_wal_flush_lsn()::text")).fetchone()
        assert end is not None
        await backward.reached(lsn_number(end[0]), timeout_s=20)
        assert await rig.rows(rig.a, "SELECT v FROM back ORDER BY v") == [(5,), (111,)]
        await rig.assert_same("back")
        assert other in await rig.key_rows(rig.a)
    await drop_slot(rig.b, link.slot)
    await drop_slot(rig.b, link.slot)
    assert await slot_state(rig.b, link.slot) is None


async def test_a_slot_that_waits_names_whom_it_waits_for(make: Make) -> None:
    ddl, table = counters("waits")
    rig = await make(ddl, table)
    await drop_slot(rig.a, rig.link.slot)
    async with await rig.connect(0) as prepared, await rig.connect(0) as idle:
        await prepared.execute("BEGIN; INSERT INTO waits VALUES ('x', 1, 1); PREPARE TRANSACTION 'left behind'")
        await idle.execute("SET application_name = 'sleeper'; BEGIN; INSERT INTO waits VALUES ('x', 2, 1)")
        await asyncio.sleep(0.6)
        with pytest.raises(SlotBlocked) as blocked:
            await create_slot(rig.link, timeout_s=0.5)
        assert "prepared transaction 'left behind'" in str(blocked.value)
        assert "(sleeper, database" in str(blocked.value)
        assert await slot_state(rig.a, rig.link.slot) is None
        await idle.rollback()
        await prepared.execute("ROLLBACK PREPARED 'left behind'")
    first = await create_slot(rig.link, timeout_s=20)
    assert await create_slot(rig.link, timeout_s=20) == first
    state = await slot_state(rig.a, rig.link.slot)
    assert state is not None
    assert (state.lost, state.active_pid, lsn_text(state.confirmed)) == (None, None, first)


async def test_a_slot_that_is_gone_or_ahead_of_the_sink_asks_for_a_new_copy(make: Make) -> None:
    ddl, table = counters("gone")
    rig = await make(ddl, table)
    stream = rig.stream()
    async with rig.running(stream) as task:
        await rig.a.execute("INSERT INTO gone VALUES (%s, 1, 1)", (next(rig.keys(True)),))
        await rig.drained(stream)
        await drop_slot(rig.a, rig.link.slot)
        with pytest.raises(ShardlibError) as ended:
            await asyncio.wait_for(task, 20)
        assert is_lost(ended.value)
    with pytest.raises(SlotLost, match="it is not there"):
        await stream.run()
    await control.start_position(rig.b, rig.link.runner, 1, "forward", "0/10")
    await create_slot(rig.link, timeout_s=20)
    with pytest.raises(SlotLost, match="lost transactions"):
        await stream.run()


async def test_a_publication_is_brought_to_the_tables(make: Make) -> None:
    one, two = counters("pub1"), counters("pub2")
    rig = await make(f"{one[0]}; {two[0]}", one[1])
    both = [*rig.tables, Table("pub2", ("k",))]
    name = control.publication(rig.job)
    await rig.a.execute(f"ALTER PUBLICATION {name} SET (publish = 'insert')".encode())
    for tables in (both, both, rig.tables):
        await create_publication(rig.a, rig.link.runner, tables)
        found = await rig.rows(
            rig.a, f"SELECT tablename FROM pg_publication_tables WHERE pubname = '{name}' ORDER BY 1"
        )
        assert [row[0] for row in found] == [table.name for table in tables]
    flags = await rig.rows(rig.a, f"SELECT pubdelete, pubtruncate FROM pg_publication WHERE pubname = '{name}'")
    assert flags == [(True, True)]


async def test_partitioned_tables_and_columns_the_server_fills(make: Make) -> None:
    ddl = (
        "CREATE TABLE part (k text, id int, no int GENERATED ALWAYS AS IDENTITY, v int, PRIMARY KEY (k, id))"
        " PARTITION BY LIST (id); CREATE TABLE part_1 PARTITION OF part FOR VALUES IN (1);"
        "CREATE TABLE part_2 PARTITION OF part DEFAULT"
    )
    rig = await make(ddl, ("part", ("k",)))
    stream = rig.stream()
    async with rig.running(stream):
        for keys in (list(itertools.islice(rig.keys(True, "a"), 2)), list(itertools.islice(rig.keys(True, "b"), 70))):
            async with rig.a.transaction():
                for key in keys:
                    await rig.a.execute("INSERT INTO part (k, id, v) VALUES (%s, 1, 0), (%s, 2, 0)", (key, key))
            await rig.a.execute("UPDATE part SET v = v + 1")
            await rig.a.execute("UPDATE part SET id = 3, v = v + 1 WHERE id = 1")
            await rig.a.execute("UPDATE part SET no = DEFAULT WHERE id = 3")
            await rig.drained(stream)
            await rig.assert_same("part")


@pytest.mark.parametrize("rows", [2, 60])
async def test_an_identity_by_the_server_and_a_value_that_is_not_carried(make: Make, rows: int) -> None:
    name = f"ident{rows}"
    ddl = f"CREATE TABLE {name} (k text, id int GENERATED ALWAYS AS IDENTITY, v int, big text, PRIMARY KEY (k, id));"
    rig = await make(ddl + f"ALTER TABLE {name} ALTER big SET STORAGE EXTERNAL", (name, ("k",)))
    stream = rig.stream()
    async with rig.running(stream):
        async with rig.a.transaction():
            for key in itertools.islice(rig.keys(True), rows):
                await rig.a.execute(
                    f"INSERT INTO {name} (k, v, big) VALUES (%s, 0, repeat('x', 9000))".encode(), (key,)
                )
        for change in ("v = v + 1", "v = v", "big = 'short'"):
            await rig.a.execute(f"UPDATE {name} SET {change}".encode())
            await rig.drained(stream)
            assert len(await rig.assert_same(name)) == rows


async def test_the_position_moves_when_nothing_concerns_the_leg(make: Make) -> None:
    ddl, table = counters("idle")
    rig = await make(ddl, table)
    now = [100.0]
    stream = rig.stream(clock=lambda: now[0])
    assert stream.lag_bytes is None
    assert stream.lag_s is None
    async with rig.running(stream):
        await rig.a.execute("INSERT INTO idle VALUES (%s, 1, 1)", (next(rig.keys(False)),))
        end = await rig.end()
        await stream.reached(end, timeout_s=20)
        now[0] += 60
        async with asyncio.timeout(20):
            confirmed = 0
            while confirmed < end:
                state = await slot_state(rig.a, rig.link.slot)
                assert state is not None
                confirmed = state.confirmed
                await asyncio.sleep(0.05)
        position = await control.position(rig.b, rig.job, 1, "forward")
        assert position is not None
        assert lsn_number(position) >= confirmed, "the slot was told of more than the sink has written down"
        async with stream.standstill(timeout_s=20):
            await rig.a.execute("INSERT INTO idle VALUES (%s, 1, 1)", (next(rig.keys(True)),))
            async with asyncio.timeout(20):
                while not stream.lag_s:
                    now[0] += 1
                    await asyncio.sleep(0.05)
            assert stream.lag_bytes
        await rig.drained(stream)
        async with asyncio.timeout(20):
            while stream.lag_s:  # noqa: ASYNC110 - a property of the stream
                await asyncio.sleep(0.05)
