"""Rows of a leg arrive at its target as they were under one snapshot, each once: on real servers."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from shardlib.dsn import Dsn
from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib.ring import TokenRange
from shardlib.topology import Shard, Table
from shardlib_ops import LocalCluster
from shardlib_ops.reshard import control
from shardlib_ops.reshard.connect import Runner, is_lost, is_superseded
from shardlib_ops.reshard.copy import (
    Copied,
    ExportedSnapshot,
    collect_keys,
    copy_tables,
    empty_half_copied,
    export_snapshot,
    leg_keys,
)
from shardlib_ops.reshard.link import Link
from shardlib_ops.reshard.reader import find_psql
from shardlib_ops.reshard.rows import TableShape, read_shapes
from shardlib_ops.reshard.world import Blocked

_jobs = itertools.count(1)
STEP = (1 << 64) // 16
HALF = tuple(TokenRange(at * STEP, (at + 1) * STEP - 1) for at in range(0, 16, 2))


class Pair:
    """A leg between the two shards of a cluster, with tables of its own."""

    def __init__(self, link: Link, a: AsyncConnection[Any], b: AsyncConnection[Any]) -> None:
        self.link, self.a, self.b = link, a, b
        self.origin: tuple[TableShape, ...] = ()
        self.sink: tuple[TableShape, ...] = ()

    async def prepare(self) -> None:
        for conn in (self.a, self.b):
            await control.claim(conn, self.link.runner)
            await control.create_keys(conn, self.link.runner)
        self.origin = await read_shapes(self.a, self.link.tables)
        self.sink = await read_shapes(self.b, self.link.tables)

    async def snapshot(self) -> ExportedSnapshot:
        return await export_snapshot(self.link, slot=f"t{secrets.token_hex(6)}", temporary=True, timeout_s=20)

    async def copy(self, **more: Any) -> int:
        """The whole of it, as a runner does."""
        await empty_half_copied(self.link, self.sink)
        async with await self.snapshot() as snapshot:
            await collect_keys(self.link, self.origin, snapshot, use_psql=more.get("use_psql", True))
            return await copy_tables(self.link, self.origin, self.sink, snapshot, **more)

    async def rows(self, conn: AsyncConnection[Any], query: str) -> list[Any]:
        return list(await (await conn.execute(query.encode())).fetchall())

    async def texts(self, conn: AsyncConnection[Any], shape: TableShape) -> list[tuple[bool, str]]:
        """(whether it moves, its text by column name) of each row, sorted."""
        first, rest = shape.key_parts()
        names = ", ".join(
            sql.Identifier("t", column.name).as_string()
            for column in sorted(shape.columns, key=lambda column: column.name)
        )
        query = f"SELECT {first.as_string()}, {rest.as_string()}, ROW({names})::text FROM {shape.name.as_string()} AS t"
        found = await self.rows(conn, query)
        return sorted(
            (k is not None and self.link.moves("\0".join((k, *more)).encode()), text) for k, more, text in found
        )

    async def assert_exact(self, *, before: Sequence[Sequence[tuple[bool, str]]] | None = None) -> int:
        """What moves is at the sink as it is at the origin, beside what was there before; how many rows."""
        total = 0
        for number, (origin, sink) in enumerate(zip(self.origin, self.sink, strict=True)):
            ours = [row for row in await self.texts(self.a, origin) if row[0]]
            theirs = await self.texts(self.b, sink)
            assert theirs == sorted([*ours, *(before[number] if before else ())]), origin.table.fullname
            total += len(ours)
        return total

    async def copied(self) -> dict[str, int]:
        query = f"SELECT table_name, rows FROM shardlib.copied WHERE job = {self.link.runner.job}"
        return dict(await self.rows(self.b, query))


Make = Callable[..., Awaitable[Pair]]


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalCluster]:
    settings = {"max_prepared_transactions": "5", "max_replication_slots": "40", "max_wal_senders": "40"}
    with LocalCluster(shards=2, settings=settings) as cluster:
        yield cluster


@pytest.fixture
async def make(servers: LocalCluster) -> AsyncIterator[Make]:
    opened: list[AsyncConnection[Any]] = []

    async def make_pair(
        ddl: str, *tables: tuple[str, Sequence[str]], sink_ddl: str | None = None, hash_function: str = "murmur3"
    ) -> Pair:
        both = [await psycopg.AsyncConnection.connect(server.dsn, autocommit=True) for server in servers.servers]
        opened.extend(both)
        for conn, text in zip(both, (ddl, sink_ddl or ddl), strict=True):
            await conn.execute("SET datestyle = 'ISO, YMD'; SET timezone = 'UTC'; SET extra_float_digits = 1")
            await conn.execute(text.encode())
        shards = [Shard(f"s{n}", f"shard-{n:02d}", Dsn(server.dsn)) for n, server in enumerate(servers.servers, 1)]
        link = Link(
            runner=Runner(next(_jobs), 1), number=1, direction="forward", origin=shards[0], sink=shards[1],
            ranges=HALF, hash_function=hash_function, tables=tuple(Table(name, tuple(key)) for name, key in tables),
        )  # fmt: skip
        pair = Pair(link, *both)
        await pair.prepare()
        return pair

    yield make_pair
    for conn in opened:
        await conn.close()


KEY_TYPES = {
    "text": ("text", "'k' || i || CASE i % 7 WHEN 0 THEN E'\\t' WHEN 1 THEN E'\\\\N' WHEN 2 THEN 'é☃𝄞' ELSE '' END"),
    "int": ("int", "i - 100"),
    "uuid": ("uuid", "md5(i::text)::uuid"),
    "bytea": ("bytea", "decode(md5(i::text), 'hex')"),
    "timestamptz": ("timestamptz", "CASE i WHEN 1 THEN 'infinity' WHEN 2 THEN '-infinity' ELSE a_time + i * a_while END"
                    .replace("a_time", "timestamptz '0044-03-15 BC'").replace("a_while", "interval '9 years 1.5 s'")),
    "date": ("date", "CASE i WHEN 1 THEN 'infinity' ELSE date '0044-03-15 BC' + i * 3000 END"),
    "numeric": ("numeric(20,4)", "i * 1.25"),
    "boolean": ("boolean", "i % 2 = 0"),
    "varchar": ("varchar(20)", "'v' || i"),
}  # fmt: skip


@pytest.mark.parametrize("use_psql", [True, False], ids=["psql", "libpq"])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "filtered"])
async def test_keys_of_every_type(make: Make, monkeypatch: pytest.MonkeyPatch, listed: bool, use_psql: bool) -> None:
    assert find_psql() is not None, "without it half of these tests test the other half"
    if not listed:
        monkeypatch.setattr("shardlib_ops.reshard.copy.transfer.KEYS_MAX", 0)
    for hash_function in ("murmur3", "xxhash"):
        for stem, (kind, value) in KEY_TYPES.items():
            name = f"{stem}_{hash_function}_{listed}_{use_psql}".lower()
            pair = await make(
                f"CREATE TABLE {name} (id int, k {kind}, note text, PRIMARY KEY (k, id))",
                (name, ("k",)),
                hash_function=hash_function,
            )
            await pair.a.execute(
                f"INSERT INTO {name} SELECT i, {value}, nullif('note ' || i, 'note 5')"
                " FROM generate_series(1, 300) i".encode()
            )
            rows = await pair.copy(use_psql=use_psql, chunk_bytes=8192)
            assert rows == await pair.assert_exact()
            assert rows > 50 or stem == "boolean"
            keys = set(await leg_keys(pair.a, pair.link) or ())
            assert keys == set(await leg_keys(pair.b, pair.link) or ())
            texts = [str(text) for shape in pair.origin for _, text in await pair.texts(pair.a, shape)]
            assert len(texts) == 300
            assert await pair.copied() == {name: rows}


AWKWARD = """
    CREATE TYPE mood_{n} AS ENUM ('glad', 'sad, too');
    CREATE TABLE odd_{n} (
        gone int, "Key" text NOT NULL, id bigint GENERATED ALWAYS AS IDENTITY, b bytea, j jsonb, js json, arr text[],
        m mood_{n}, ms mood_{n}[], f float8, r real, num numeric, iv interval, tz timestamptz, tm time, u uuid,
        ip inet, bits bit(5), rng int4range, cents money, double_id bigint GENERATED ALWAYS AS (f2 * 2) STORED,
        f2 int, "odd""name,:x" text
    );
    ALTER TABLE odd_{n} DROP COLUMN gone;
"""
OTHER_ORDER = """
    CREATE TYPE mood_{n} AS ENUM ('glad', 'sad, too');
    CREATE TABLE odd_{n} (
        "odd""name,:x" text, f2 int, ms mood_{n}[], m mood_{n}, j jsonb, js json, arr text[], b bytea, f float8, r real,
        gone2 int, gone3 text,
        num numeric, iv interval, tz timestamptz, tm time, u uuid, ip inet, bits bit(5), rng int4range, cents money,
        id bigint GENERATED ALWAYS AS IDENTITY, double_id bigint GENERATED ALWAYS AS (f2 * 2) STORED, "Key" text
    );
    ALTER TABLE odd_{n} DROP COLUMN gone2, DROP COLUMN gone3;
"""
ODD_ROWS = r"""
    INSERT INTO odd_{n} ("Key", b, j, js, arr, m, ms, f, r, num, iv, tz, tm, u, ip, bits, rng, cents, f2,
                         "odd""name,:x")
    SELECT 'k' || i / 2, decode('00ff5c0a09', 'hex'), '{{"a": "x\\n☃"}}', '{{"a" :  1}}',
           ARRAY['a,b', NULL, '"', '\', E'\n', '{{}}', ''], 'sad, too', ARRAY['glad', NULL, 'sad, too']::mood_{n}[],
           CASE i % 5 WHEN 0 THEN 'NaN' WHEN 1 THEN 'Infinity' WHEN 2 THEN -0.0::float8 ELSE i / 7.0::float8 END,
           i / 3.0::real,
           CASE i % 3 WHEN 0 THEN 'NaN' WHEN 1 THEN 12345678901234567890.1234567890 END, '1 mon -3 days 04:05:06.7',
           CASE i % 4 WHEN 0 THEN 'infinity' WHEN 1 THEN '-infinity' ELSE '2026-01-01 00:00:00.000001+05'
           END::timestamptz,
           '24:00', md5(i::text)::uuid, '10.0.0.1/8', B'10110', '[1,5)', 12.34, i,
           CASE i % 8 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN E'\\N' WHEN 3 THEN E'a\tb\nc\rd\\e' WHEN 4 THEN '\.'
                      WHEN 5 THEN E'\x01\x7f' WHEN 6 THEN repeat('long ', 5000) ELSE 'é☃𝄞' END
      FROM generate_series(1, 400) i
"""


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "filtered"])
async def test_awkward_values_and_columns(make: Make, monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    if not listed:
        monkeypatch.setattr("shardlib_ops.reshard.copy.transfer.KEYS_MAX", 0)
    number = int(listed)
    pair = await make(AWKWARD.format(n=number), (f"odd_{number}", ("Key",)), sink_ddl=OTHER_ORDER.format(n=number))
    await pair.a.execute(ODD_ROWS.format(n=number).encode())
    for use_psql in (True, False):
        assert await pair.copy(use_psql=use_psql, chunk_bytes=32768) == await pair.assert_exact() > 100
        await pair.b.execute(f"TRUNCATE odd_{number}; DELETE FROM shardlib.copied".encode())


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "filtered"])
@pytest.mark.parametrize("use_psql", [True, False], ids=["psql", "libpq"])
async def test_one_huge_row(make: Make, monkeypatch: pytest.MonkeyPatch, listed: bool, use_psql: bool) -> None:
    if not listed:
        monkeypatch.setattr("shardlib_ops.reshard.copy.transfer.KEYS_MAX", 0)
    name = f"huge_{listed}_{use_psql}".lower()
    pair = await make(f"CREATE TABLE {name} (id int, k text PRIMARY KEY, b bytea, t text)", (name, ("k",)))
    key = next(key for n in itertools.count() if pair.link.moves((key := f"k{n}").encode()))
    await pair.a.execute(
        f"INSERT INTO {name} VALUES (1, %s, decode(repeat('00ff5c0a', 6250000), 'hex'),"
        r" repeat(E'é\n', 8000000))".encode(),
        (key,),
    )
    assert await pair.copy(use_psql=use_psql) == 1
    digest = f"SELECT k, sha256(b), sha256(convert_to(t, 'UTF8')), length(b) FROM {name}"
    found = await pair.rows(pair.b, digest)
    assert found == await pair.rows(pair.a, digest)
    assert found[0][3] == 25_000_000


async def _several(make: Make, stem: str) -> Pair:
    """A table, one with a composite key, one without primary key, an empty one, a partitioned one."""
    ddl = f"""
        CREATE TABLE {stem}_one (k text, id int, v text, PRIMARY KEY (k, id));
        CREATE TABLE {stem}_two (v text, b int, a text, at timestamptz, PRIMARY KEY (a, b, at));
        CREATE TABLE {stem}_bag (v int, k text);
        CREATE TABLE {stem}_none (k text PRIMARY KEY);
        CREATE TABLE {stem}_parts (id int, k text, PRIMARY KEY (k, id)) PARTITION BY RANGE (id);
        CREATE TABLE {stem}_p1 PARTITION OF {stem}_parts FOR VALUES FROM (0) TO (500);
        CREATE TABLE {stem}_p2 (k text NOT NULL, id int NOT NULL);
        ALTER TABLE {stem}_parts ATTACH PARTITION {stem}_p2 FOR VALUES FROM (500) TO (100000);
    """
    pair = await make(
        ddl,
        (f"{stem}_one", ("k",)),
        (f"{stem}_two", ("a", "b", "at")),
        (f"{stem}_bag", ("k",)),
        (f"{stem}_none", ("k",)),
        (f"{stem}_parts", ("k",)),
    )
    await pair.a.execute(
        f"""
        INSERT INTO {stem}_one SELECT 'k' || i % 300, i, repeat('v', i % 50) FROM generate_series(1, 3000) i;
        INSERT INTO {stem}_two SELECT 'v', i % 5, E'a\\\\b\\t' || i % 100, timestamptz '2026-01-01' + i * interval '1 h'
                                 FROM generate_series(1, 1000) i;
        INSERT INTO {stem}_bag SELECT 1, 'k' || i % 400 FROM generate_series(1, 1500) i;
        INSERT INTO {stem}_bag VALUES (7, NULL);
        INSERT INTO {stem}_parts SELECT i, 'p' || i % 200 FROM generate_series(1, 1000) i;
        """.encode()
    )
    return pair


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "filtered"])
async def test_several_tables_and_nothing_else_is_touched(
    make: Make, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    if not listed:
        monkeypatch.setattr("shardlib_ops.reshard.copy.transfer.KEYS_MAX", 0)
    stem = f"many_{listed}".lower()
    pair = await _several(make, stem)
    stays = [key for n in range(300) if not pair.link.moves((key := f"k{n}").encode())]
    for key in stays[:40]:
        await pair.b.execute(f"INSERT INTO {stem}_one VALUES (%s, 1, 'its own')".encode(), (key,))
        await pair.b.execute(f"INSERT INTO {stem}_bag VALUES (2, %s), (2, %s)".encode(), (key, key))
    before = [await pair.texts(pair.b, shape) for shape in pair.sink]
    told: list[Copied] = []
    rows = await pair.copy(workers=3, chunk_bytes=16384, on_progress=told.append)
    assert rows == await pair.assert_exact(before=before) > 2000
    assert sum((await pair.copied()).values()) == rows
    for shape in pair.origin:
        steps = [step for step in told if step.table == shape.table.fullname]
        assert [step.fraction for step in steps] == sorted(step.fraction for step in steps)
        assert steps[-1].fraction == 1.0
        assert steps[-1].bytes > 0 or not steps[-1].rows
    assert any(0 < step.fraction < 1 for step in told)
    places = f"SELECT FROM shardlib.position WHERE job = {pair.link.runner.job}"
    assert await pair.rows(pair.b, places) == []
    assert await pair.copy() == 0, "what is written down as copied is copied again"


async def test_what_commits_after_the_snapshot_is_not_copied(make: Make) -> None:
    pair = await make("CREATE TABLE later (k text, id int, v int, PRIMARY KEY (k, id))", ("later", ("k",)))
    fill = "INSERT INTO later SELECT 'k' || i, {0}, 0 FROM generate_series(1, 2000) i"
    await pair.a.execute(fill.format(1).encode())
    before = await pair.texts(pair.a, pair.origin[0])
    async with await pair.snapshot() as snapshot:
        await pair.a.execute(fill.format(2).encode())
        await pair.a.execute("UPDATE later SET v = 1")
        await pair.a.execute("DELETE FROM later WHERE k < 'k5'")
        await pair.a.execute("INSERT INTO later SELECT 'new' || i, 1, 0 FROM generate_series(1, 500) i")
        found = await collect_keys(pair.link, pair.origin, snapshot)
        again = await collect_keys(pair.link, pair.origin, snapshot)
        rows = await copy_tables(pair.link, pair.origin, pair.sink, snapshot, chunk_bytes=8192)
    wanted = [row for row in before if row[0]]
    assert found == again == rows == len(wanted)
    assert await pair.texts(pair.b, pair.sink[0]) == wanted
    lsn = await pair.rows(pair.b, f"SELECT lsn::text FROM shardlib.copied WHERE job = {pair.link.runner.job}")
    assert lsn == [(snapshot.lsn,)]


@pytest.mark.parametrize("side", ["a", "b"])
async def test_a_killed_connection_surfaces_and_the_next_copy_is_exact(make: Make, side: str) -> None:
    stem = f"kill_{side}"
    pair = await _several(make, stem)
    # Rows of another leg of the same job, whose keys are in the same key table, stay.
    other = next(key for n in itertools.count() if not pair.link.moves((key := f"other{n}").encode()))
    await pair.b.execute(f"INSERT INTO {stem}_one VALUES (%s, 1, 'of another leg')".encode(), (other,))
    await pair.b.execute(
        f"INSERT INTO {control.keys_table(pair.link.runner.job).as_string()} (k) VALUES (%s)".encode(), (other,)
    )
    before = [await pair.texts(pair.b, shape) for shape in pair.sink]
    chunks = itertools.count()

    async def kill() -> None:
        if next(chunks) >= 5:  # again before each further chunk: a worker may have been about to log in
            await pair.rows(
                getattr(pair, side),
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                f" WHERE application_name LIKE 'shardlib job {pair.link.runner.job} 1 copy 1%'",
            )

    with pytest.raises(psycopg.Error) as raised:
        await pair.copy(chunk_bytes=8192, throttle=kill)
    assert is_lost(raised.value), repr(raised.value)
    await _nobody_is_left(pair)
    half = await pair.copied()
    assert len(half) < len(pair.sink)
    rows = await pair.copy()
    total = await pair.assert_exact(before=before)
    assert rows == total - sum(half.values()) > 0


async def _nobody_is_left(pair: Pair) -> None:
    query = f"SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'shardlib job {pair.link.runner.job} %'"
    async with asyncio.timeout(30):
        for conn in (pair.a, pair.b):
            while await pair.rows(conn, query):  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("use_psql", [True, False], ids=["psql", "libpq"])
async def test_cancelling_closes_everything(make: Make, use_psql: bool) -> None:
    stem = f"cancel_{use_psql}".lower()
    pair = await _several(make, stem)
    begun = asyncio.Event()
    task = asyncio.create_task(
        pair.copy(use_psql=use_psql, chunk_bytes=16384, bytes_per_s=20_000, on_progress=lambda _: begun.set())
    )
    async with asyncio.timeout(60):
        await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _nobody_is_left(pair)
    await pair.copy()
    await pair.assert_exact()


async def test_a_limit_of_bytes_is_kept(make: Make) -> None:
    pair = await make("CREATE TABLE slow (k text, id int, v text, PRIMARY KEY (k, id))", ("slow", ("k",)))
    await pair.a.execute("INSERT INTO slow SELECT 'k' || i, 1, repeat('v', 500) FROM generate_series(1, 2000) i")
    told: list[Copied] = []
    loop = asyncio.get_running_loop()
    began = loop.time()
    await pair.copy(chunk_bytes=65536, bytes_per_s=500_000, on_progress=told.append)
    # The last chunk's bytes are written without a wait after them.
    assert loop.time() - began > (told[-1].bytes - 70_000) / 500_000 > 0.5
    await pair.assert_exact()


async def test_a_superseded_runner_is_refused(make: Make) -> None:
    pair = await _several(make, "fenced")
    await pair.a.execute("UPDATE shardlib.job SET token = 2 WHERE id = %s", (pair.link.runner.job,))
    with pytest.raises(psycopg.Error) as raised:
        await pair.snapshot()
    assert is_superseded(raised.value)
    await pair.a.execute("UPDATE shardlib.job SET token = 1 WHERE id = %s", (pair.link.runner.job,))
    async with await pair.snapshot() as snapshot:
        await collect_keys(pair.link, pair.origin, snapshot)
        chunks = itertools.count()

        async def supersede() -> None:
            if next(chunks) == 3:
                await pair.b.execute("UPDATE shardlib.job SET token = 2 WHERE id = %s", (pair.link.runner.job,))

        with pytest.raises(psycopg.Error) as raised:
            await copy_tables(pair.link, pair.origin, pair.sink, snapshot, chunk_bytes=16384, throttle=supersede)
        assert is_superseded(raised.value)
        with pytest.raises(psycopg.Error) as raised:
            await collect_keys(pair.link, pair.origin, snapshot)
        assert is_superseded(raised.value)
    with pytest.raises(psycopg.Error) as raised:
        await empty_half_copied(pair.link, pair.sink)
    assert is_superseded(raised.value)
    later = Pair(replace(pair.link, runner=Runner(pair.link.runner.job, 3)), pair.a, pair.b)
    await later.prepare()
    await later.copy()
    await later.assert_exact()


async def test_a_guard_at_the_sink_lets_the_copy_pass(make: Make) -> None:
    """Of another job, which moves rows away from this leg's target."""
    pair = await make("CREATE TABLE guarded (k text PRIMARY KEY)", ("guarded", ("k",)))
    await pair.b.execute(
        """
        CREATE FUNCTION public.guard() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NOT EXISTS (SELECT FROM shardlib.position p WHERE p.xmin = pg_current_xact_id()::xid) THEN
                RAISE EXCEPTION 'guarded';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER guard BEFORE INSERT ON guarded FOR EACH ROW EXECUTE FUNCTION public.guard();
        ALTER TABLE guarded ENABLE ALWAYS TRIGGER guard;
        """
    )
    await pair.a.execute("INSERT INTO guarded SELECT 'k' || i FROM generate_series(1, 100) i")
    assert await pair.copy() == await pair.assert_exact() > 20


async def test_a_slot_that_waits_names_whom_it_waits_for(make: Make, servers: LocalCluster) -> None:
    pair = await make("CREATE TABLE blocked (k text PRIMARY KEY)", ("blocked", ("k",)))
    await pair.a.execute("INSERT INTO blocked VALUES ('x')")
    name = f"t{secrets.token_hex(6)}"
    slots = f"SELECT slot_name FROM pg_replication_slots WHERE slot_name = '{name}'"
    async with await psycopg.AsyncConnection.connect(servers.servers[0].dsn, application_name="report") as open_one:
        await open_one.execute("UPDATE blocked SET k = 'y'")
        with pytest.raises(Blocked, match=r"pid \d+ \(report, database .*idle in transaction") as raised:
            await export_snapshot(pair.link, slot=name, temporary=False, timeout_s=0.5)
        assert str(open_one.info.backend_pid) in str(raised.value)
        assert await pair.rows(pair.a, slots) == []
        await open_one.execute("PREPARE TRANSACTION 'left behind'")
    try:
        with pytest.raises(Blocked, match="prepared transaction 'left behind'"):
            await export_snapshot(pair.link, slot=name, temporary=False, timeout_s=0.5)
        assert await pair.rows(pair.a, slots) == []
    finally:
        await pair.a.execute("ROLLBACK PREPARED 'left behind'")
    await _nobody_is_left(pair)
    async with await export_snapshot(pair.link, slot=name, temporary=False, timeout_s=20):
        assert await pair.rows(pair.a, slots) == [(name,)]
        with pytest.raises(psycopg.errors.DuplicateObject):
            await export_snapshot(pair.link, slot=name, temporary=False, timeout_s=20)
    assert await pair.rows(pair.a, slots) == [(name,)]
    await pair.a.execute("SELECT pg_drop_replication_slot(%s)", (name,))


async def test_who_locks_a_table_is_waited_for_and_then_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = await make("CREATE TABLE locked (k text PRIMARY KEY)", ("locked", ("k",)))
    await pair.a.execute("INSERT INTO locked SELECT 'k' || i FROM generate_series(1, 100) i")
    for module in ("copy.keys", "copy.transfer", "reader"):
        monkeypatch.setattr(f"shardlib_ops.reshard.{module}.LOCK_MS", 200)
    async with await pair.snapshot() as snapshot:
        async with pair.a.transaction():
            await pair.a.execute("LOCK TABLE locked IN ACCESS EXCLUSIVE MODE")
            for use_psql in (True, False):
                with pytest.raises(Blocked, match="locked by somebody else"):
                    await collect_keys(pair.link, pair.origin, snapshot, use_psql=use_psql)
            with pytest.raises(Blocked, match="locked by somebody else"):
                await copy_tables(pair.link, pair.origin, pair.sink, snapshot)
        await collect_keys(pair.link, pair.origin, snapshot)
        rows = await copy_tables(pair.link, pair.origin, pair.sink, snapshot)
    assert rows == await pair.assert_exact() > 20


async def test_nobody_rewrites_a_table_while_it_is_copied(make: Make) -> None:
    pair = await _several(make, "held")
    tried = 0

    async def rewrite() -> None:
        nonlocal tried
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await pair.a.execute("SET lock_timeout = 50; TRUNCATE held_parts, held_one, held_two")
        tried += 1

    await pair.copy(workers=1, chunk_bytes=65536, throttle=rewrite)
    assert tried > 3
    await pair.assert_exact()


async def test_a_password_is_not_among_the_arguments_of_programs(make: Make) -> None:
    pair = await _several(make, "secret")
    for conn in (pair.a, pair.b):
        await conn.execute("CREATE ROLE mover SUPERUSER LOGIN PASSWORD 'hush-hush-7'")
    shards = [replace(s, primary=Dsn(s.primary.conninfo(user="mover", password="hush-hush-7"))) for s in
              (pair.link.origin, pair.link.sink)]  # fmt: skip
    other = Pair(replace(pair.link, origin=shards[0], sink=shards[1]), pair.a, pair.b)
    other.origin, other.sink = pair.origin, pair.sink
    seen: list[bytes] = []

    def look_at_all() -> None:
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(place.read_bytes())
            except OSError:
                continue  # it has ended meanwhile

    async def look() -> None:
        await asyncio.to_thread(look_at_all)

    await other.copy(throttle=look)
    await other.assert_exact()
    assert any(b"psql" in line and b"mover" in line for line in seen)
    assert not any(b"hush" in line for line in seen)


async def test_a_program_that_cannot_log_in_is_done_without(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "psql"
    program.write_text("#!/bin/sh\necho 'psql: error: invalid connection option' >&2\nexit 2\n")
    program.chmod(0o755)
    pair = await _several(make, "old")
    assert await pair.copy(psql=program) == await pair.assert_exact() > 0
    assert "invalid connection option" in caplog.text


async def test_refusals(make: Make) -> None:
    pair = await make(
        "CREATE TABLE lacks (k text PRIMARY KEY, v int)", ("lacks", ("k",)), sink_ddl="CREATE TABLE lacks (k text)"
    )
    await pair.a.execute("INSERT INTO lacks SELECT 'k' || i FROM generate_series(1, 100) i")
    with pytest.raises(InvalidTopology, match="'v'"):
        await pair.copy()
    for wrong in ({"workers": 0}, {"chunk_bytes": -1}, {"bytes_per_s": 0}):
        with pytest.raises(InvalidArgument):
            await pair.copy(**wrong)
    await _nobody_is_left(pair)
