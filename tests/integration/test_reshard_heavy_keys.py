"""Keys with very many rows: what was changed of them is compared row by row, and a difference is found all the same."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import pytest
from psycopg import AsyncConnection

from shardlib.fence import install
from shardlib.topology import Table
from shardlib_ops.reshard.copy import ExportedSnapshot, export_snapshot
from shardlib_ops.reshard.rows import read_shapes
from shardlib_ops.reshard.stream import Stream
from shardlib_ops.reshard.stream.recent import Recent
from shardlib_ops.reshard.validate import Tables, compare, compare_changed, compare_closed, compare_whole
from shardlib_ops.reshard.validate.heavy import weigh
from shardlib_ops.reshard.world import Mismatch
from tests.support.streaming import Rig
from tests.support.versions import PAIRS, TwoServers, two_servers

# Keys of a text, of a number and of two columns; a table without a primary key; one whose key has no index; one that is
# identified by a unique index.
DDL = """
    DROP TABLE IF EXISTS item, numbered, pairs, bag, loose, chosen;
    CREATE TABLE item (k text, id int, v numeric, note text, PRIMARY KEY (k, id));
    CREATE TABLE numbered (k text, n bigint, id uuid DEFAULT gen_random_uuid(), v int, PRIMARY KEY (n, k, id));
    CREATE TABLE pairs (a text, b int, id int, v int, PRIMARY KEY (a, b, id));
    CREATE TABLE bag (k text NOT NULL, v int); ALTER TABLE bag REPLICA IDENTITY FULL; CREATE INDEX ON bag (k);
    CREATE TABLE loose (id int PRIMARY KEY, k text NOT NULL, v int); ALTER TABLE loose REPLICA IDENTITY FULL;
    CREATE TABLE chosen (id int PRIMARY KEY, k text NOT NULL, name text NOT NULL, v int, UNIQUE (k, name));
    ALTER TABLE chosen REPLICA IDENTITY USING INDEX chosen_k_name_key;
"""
TABLES = [
    Table("item", ("k",)),
    Table("numbered", ("n",)),
    Table("pairs", ("a", "b")),
    Table("bag", ("k",)),
    Table("loose", ("k",)),
    Table("chosen", ("k",)),
]
ROWS: Final = 60
WHOLE: Final = 40
"""Rows of a table that are compared as rows of changed keys; the heavy keys have more than their share of it."""


@pytest.fixture(scope="module", params=PAIRS[::2])
def servers(request: pytest.FixtureRequest) -> Iterator[TwoServers]:
    with two_servers(request.param) as made:
        with made.servers[1].connect() as conn:
            install(conn, cluster_id="test", shard_id="s2")
        yield made


class Heavy(Rig):
    """A leg with two keys that have many rows, and two that have few."""

    async def fill(self) -> None:
        keys = self.keys(True)
        self.heavy, self.other, *self.light = itertools.islice(keys, 4)
        self.number = next(n for n in itertools.count(1) if self.link.moves(str(n).encode()))
        self.pair = next(n for n in itertools.count(1) if self.link.moves(f"{self.heavy}\0{n}".encode()))
        for key, rows in ((self.heavy, ROWS), (self.other, ROWS), *((key, 2) for key in self.light)):
            await self.a.execute("INSERT INTO item SELECT %s, g, 0, 'a' FROM generate_series(1, %s) g", (key, rows))
            await self.a.execute("INSERT INTO bag SELECT %s, g FROM generate_series(1, %s) g", (key, rows))
            await self.a.execute(
                "INSERT INTO loose SELECT g + (SELECT count(*) FROM loose), %s, 0 FROM generate_series(1, %s) g",
                (key, rows),
            )
            await self.a.execute(
                "INSERT INTO chosen SELECT g + (SELECT count(*) FROM chosen), %s, 'n' || g, 0"
                " FROM generate_series(1, %s) g",
                (key, rows),
            )
        await self.a.execute(
            "INSERT INTO numbered (k, n, v) SELECT g::text, %s, 0 FROM generate_series(1, %s) g", (self.number, ROWS)
        )
        await self.a.execute(
            "INSERT INTO pairs SELECT %s, %s, g, 0 FROM generate_series(1, %s) g", (self.heavy, self.pair, ROWS)
        )

    def export(self) -> Callable[[], AbstractAsyncContextManager[ExportedSnapshot]]:
        @asynccontextmanager
        async def export() -> AsyncIterator[ExportedSnapshot]:
            slot = f"{self.link.slot}_cmp"
            async with await export_snapshot(self.link, slot=slot, temporary=True, timeout_s=20) as snapshot:
                yield snapshot

        return export

    @property
    def sides(self) -> Tables:
        return Tables(self.shapes, self.sink_shapes)

    async def whole(self, stream: Stream) -> str:
        await self.drained(stream)
        return (await compare_whole(self.link, stream, self.sides, export=self.export())).lsn

    async def closed(self, stream: Stream, since: str) -> int:
        await self.drained(stream)
        async with await self.link.open_origin("a") as here, await self.link.open_sink("b") as there:
            return await compare_closed(
                self.link,
                self.sides,
                since=since,
                origin_conn=here,
                sink_conn=there,
                recent=stream.recent,
            )

    async def touch(self) -> None:
        """Each kind of change, of heavy and light keys, in each table."""
        for key in (self.heavy, self.other, self.light[0]):
            await self.a.execute("UPDATE item SET v = v + 1 WHERE k = %s AND id = 1", (key,))
            await self.a.execute("UPDATE bag SET v = v + 1000 WHERE k = %s AND v = 1", (key,))
            await self.a.execute("UPDATE loose SET v = 1 WHERE id = (SELECT min(id) FROM loose WHERE k = %s)", (key,))
            await self.a.execute("UPDATE chosen SET v = 1 WHERE k = %s AND name = 'n1'", (key,))
        await self.a.execute("DELETE FROM item WHERE k = %s AND id = 2", (self.heavy,))
        await self.a.execute("INSERT INTO item VALUES (%s, -1, 1.50, 'new'), (%s, -2, 0, '')", [self.heavy] * 2)
        await self.a.execute("UPDATE item SET id = -id WHERE k = %s AND id = 3", (self.heavy,))
        await self.a.execute("UPDATE item SET k = %s, id = -4 WHERE k = %s AND id = 4", (self.other, self.heavy))
        await self.a.execute("DELETE FROM chosen WHERE k = %s AND name = 'n2'", (self.heavy,))
        await self.a.execute("UPDATE chosen SET name = 'm3' WHERE k = %s AND name = 'n3'", (self.heavy,))
        await self.a.execute("UPDATE numbered SET v = 1 WHERE n = %s AND k = '1'", (self.number,))
        await self.a.execute("UPDATE pairs SET v = 1 WHERE a = %s AND b = %s AND id = 1", (self.heavy, self.pair))


@pytest.fixture
async def heavy(servers: TwoServers, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Heavy]:
    monkeypatch.setattr(compare, "_WHOLE_CLOSED", WHOLE)
    monkeypatch.setattr(compare, "_WHOLE_RUNNING", WHOLE)
    for name in ("_SMALL_BYTES", "_TINY_BYTES"):
        monkeypatch.setattr(f"shardlib_ops.reshard.validate.heavy.{name}", 0)
    rig = Heavy(servers, TABLES, DDL)
    await rig.open()
    async with await rig.link.open_sink("shapes") as conn:
        rig.sink_shapes = await read_shapes(conn, TABLES)
    await rig.fill()
    yield rig
    await rig.close()


async def test_equal_sides_are_equal(heavy: Heavy) -> None:
    stream = heavy.stream()
    async with heavy.running(stream):
        since = await heavy.whole(stream)
        await heavy.touch()
        keys = await heavy.closed(stream, since)
        assert keys == 5
        found = await compare_changed(heavy.link, stream, heavy.sides, since=since, export=heavy.export())
        assert found.keys == 5
        assert 20 < found.rows < 2 * ROWS + 60, "of the heavy keys, what was changed; of a bag the keys"
        assert found.left == 0
        assert await heavy.closed(stream, found.lsn) == 0


FAULTS = {
    "a changed row": "UPDATE item SET note = 'A' WHERE k = %(heavy)s AND id = 1",
    "a changed scale": "UPDATE item SET v = 1.5 WHERE k = %(heavy)s AND id = -1",
    "a lost update": "UPDATE item SET v = 0 WHERE k = %(heavy)s AND id = 1",
    "a lost row": "DELETE FROM item WHERE k = %(heavy)s AND id = -2",
    "a deleted row is there": "INSERT INTO item VALUES (%(heavy)s, 2, 0, 'a')",
    "a row with its former identity": "INSERT INTO item VALUES (%(heavy)s, 3, 0, 'a')",
    "a row with its former key": "INSERT INTO item VALUES (%(heavy)s, 4, 0, 'a')",
    "another row lost its new identity": "DELETE FROM item WHERE k = %(heavy)s AND id = -3",
    "of a key of few rows any row": "UPDATE item SET note = 'A' WHERE k = %(light)s AND id = 2",
    "of a bag any row of the key": "UPDATE bag SET v = 2000 WHERE k = %(heavy)s AND v = 30",
    "without an index of the key": "UPDATE loose SET v = 2 WHERE v = 1 AND k = %(heavy)s",
    "identified by a unique index": "UPDATE chosen SET v = 2 WHERE k = %(heavy)s AND name = 'n1'",
    "its former name": "INSERT INTO chosen VALUES (-1, %(heavy)s, 'n3', 0)",
    "a number as key": "UPDATE numbered SET v = 2 WHERE n = %(number)s AND v = 1",
    "two columns as key": "UPDATE pairs SET v = 2 WHERE a = %(heavy)s AND b = %(pair)s AND v = 1",
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_planted_difference_of_what_was_changed_is_found_and_its_key_named(heavy: Heavy, fault: str) -> None:
    stream = heavy.stream()
    async with heavy.running(stream):
        since = await heavy.whole(stream)
        await heavy.touch()
        await heavy.closed(stream, since)
        wanted = {"heavy": heavy.heavy, "light": heavy.light[0], "number": heavy.number, "pair": heavy.pair}
        done = await heavy.b.execute(FAULTS[fault].encode(), wanted)
        assert done.rowcount == 1
        named = next(str(wanted[name]) for name in ("light", "number", "heavy") if f"%({name})s" in FAULTS[fault])
        with pytest.raises(Mismatch, match=repr(named)):
            await heavy.closed(stream, since)
        with pytest.raises(Mismatch, match=repr(named)):
            await compare_changed(heavy.link, stream, heavy.sides, since=since, export=heavy.export())


async def test_of_a_heavy_key_no_more_is_read_than_was_changed(heavy: Heavy) -> None:
    # That nobody sees this difference here shows that the rest of the key is not read; the whole comparison sees it.
    stream = heavy.stream()
    async with heavy.running(stream):
        since = await heavy.whole(stream)
        await heavy.touch()
        await heavy.drained(stream)
        await heavy.b.execute("UPDATE item SET note = 'A' WHERE k = %s AND id = 50", (heavy.heavy,))
        assert await heavy.closed(stream, since) == 5
        with pytest.raises(Mismatch, match=repr(heavy.heavy)):
            await heavy.whole(stream)


@pytest.mark.parametrize("why", ["another run of the stream", "too many rows"])
async def test_what_the_stream_does_not_know_is_compared_whole(heavy: Heavy, why: str) -> None:
    stream = heavy.stream()
    async with heavy.running(stream):
        if why == "too many rows":
            stream.recent = Recent(limit=3)
        since = await heavy.whole(stream)
        await heavy.touch()
        await heavy.drained(stream)
        if why == "too many rows":
            assert stream.recent.after(0) is None
    if why != "too many rows":
        stream = heavy.stream()
    async with heavy.running(stream):
        await heavy.closed(stream, since)
        await heavy.b.execute("UPDATE item SET note = 'A' WHERE k = %s AND id = 50", (heavy.heavy,))
        with pytest.raises(Mismatch, match=repr(heavy.heavy)):
            await heavy.closed(stream, since)
        await heavy.b.execute("UPDATE item SET note = 'a' WHERE k = %s AND id = 50", (heavy.heavy,))
        # From the next comparison on it is known again.
        found = await compare_changed(heavy.link, stream, heavy.sides, since=since, export=heavy.export())
        assert found.rows > 4 * ROWS
        await heavy.a.execute("UPDATE item SET v = v + 1 WHERE k = %s AND id = 1", (heavy.heavy,))
        await heavy.closed(stream, found.lsn)
        await heavy.b.execute("UPDATE item SET v = 0 WHERE k = %s AND id = 1", (heavy.heavy,))
        with pytest.raises(Mismatch, match="changed lately.*" + repr(heavy.heavy)):
            await heavy.closed(stream, found.lsn)


async def test_an_emptied_table_is_compared_whole(heavy: Heavy) -> None:
    stream = heavy.stream()
    async with heavy.running(stream):
        since = await heavy.whole(stream)
        await heavy.a.execute("TRUNCATE item")
        await heavy.a.execute("INSERT INTO item SELECT %s, g, 0, 'a' FROM generate_series(1, 100) g", (heavy.heavy,))
        await heavy.closed(stream, since)
        await heavy.b.execute("INSERT INTO item VALUES (%s, 101, 0, 'a')", (heavy.heavy,))
        with pytest.raises(Mismatch, match=repr(heavy.heavy)):
            await heavy.closed(stream, since)


@pytest.mark.parametrize("restarted", [False, True])
async def test_emptying_a_table_changes_every_key(heavy: Heavy, restarted: bool) -> None:
    stream = heavy.stream()
    async with heavy.running(stream):
        since = await heavy.whole(stream)
        await heavy.a.execute("TRUNCATE item")
        await heavy.drained(stream)
    if restarted:
        stream = heavy.stream()
    async with heavy.running(stream):
        assert await heavy.closed(stream, since) == 6
        await heavy.b.execute("INSERT INTO item VALUES (%s, 1, 0, 'a')", (heavy.light[1],))
        with pytest.raises(Mismatch, match=repr(heavy.light[1])):
            await heavy.closed(stream, since)


async def tell_plans(conn: AsyncConnection[Any], log: list[str]) -> None:
    """Let the server tell the plan of each query that follows."""
    await conn.execute("LOAD 'auto_explain'")
    await conn.execute("SET auto_explain.log_min_duration = 0")
    await conn.execute("SET client_min_messages = log")
    conn.add_notice_handler(lambda notice: log.append(notice.message_primary or ""))


async def test_keys_and_rows_are_looked_up_by_an_index(heavy: Heavy) -> None:
    # Were it not so, each look would read all of the table while writers wait.
    stream = heavy.stream()
    async with heavy.running(stream):
        since = await heavy.whole(stream)
        await heavy.touch()
        await heavy.drained(stream)
        log: list[str] = []
        async with await heavy.link.open_origin("a") as here, await heavy.link.open_sink("b") as there:
            for conn in (here, there):
                await tell_plans(conn, log)
            await compare_closed(
                heavy.link, heavy.sides, since=since, origin_conn=here, sink_conn=there, recent=stream.recent
            )
        plans = "\n".join(log)
        assert "Index" in plans
        assert re.findall(r"Seq Scan on (?:public\.)?(item|numbered|pairs|bag|loose|chosen)\b", plans) == []


async def test_a_key_s_share_is_even(heavy: Heavy) -> None:
    stream = heavy.stream()
    async with heavy.running(stream):
        await heavy.drained(stream)
        keys = [(key, ()) for key in (heavy.heavy, heavy.other, *heavy.light)]
        shape = next(shape for shape in heavy.sink_shapes if shape.table.name == "item")
        for rows, count in ((4 * ROWS, 0), (4 * ROWS - 4, 2), (8, 2), (7, 4), (0, 4)):
            async with heavy.b.transaction():
                found = (await weigh(heavy.b, [shape], keys, rows=rows))["item"]
            assert found.indexed
            assert len(found.heavy) == count, rows
