"""Both sides of a leg are compared: what differs by one row, value or key is found, and equal sides are equal."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from shardlib.fence import install
from shardlib.topology import Table
from shardlib_ops.reshard import control
from shardlib_ops.reshard.copy import ExportedSnapshot, export_snapshot
from shardlib_ops.reshard.rows import read_shapes
from shardlib_ops.reshard.stream import Stream
from shardlib_ops.reshard.validate import Equal, Tables, compare_changed, compare_closed, compare_whole
from shardlib_ops.reshard.world import Mismatch
from tests.support.streaming import Rig
from tests.support.versions import PAIRS, TwoServers, two_servers

# A table whose rows are hashed in their binary form, one whose user type forbids that, one without a primary key, and
# one with a composite key of awkward texts.
DDL = """
    DROP TABLE IF EXISTS plain, moody, bag, pairs;
    DROP TYPE IF EXISTS mood;
    CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE TABLE plain (k text, id int, v numeric, at timestamptz, note text, PRIMARY KEY (k, id));
    CREATE TABLE moody (k text PRIMARY KEY, feels mood, since mood[]);
    CREATE TABLE bag (k text NOT NULL, v int, w int); ALTER TABLE bag REPLICA IDENTITY FULL;
    CREATE TABLE pairs (a text, b int, v int, PRIMARY KEY (a, b));
"""
TABLES = [Table("plain", ("k",)), Table("moody", ("k",)), Table("bag", ("k",)), Table("pairs", ("a", "b"))]
AWKWARD = ["tab\there", "line\nhere", "back\\slash", 'quo"te', "{brace}", "a,b", "", "NULL", r"\N", "ключ"]


@pytest.fixture(scope="module", params=PAIRS)
def servers(request: pytest.FixtureRequest) -> Iterator[TwoServers]:
    with two_servers(request.param) as made:
        with made.servers[1].connect() as conn:
            install(conn, cluster_id="test", shard_id="s2")
        yield made


class Sides(Rig):
    """A leg whose rows are on both sides, and a stream that keeps them so."""

    async def fill(self) -> None:
        moving, staying = self.keys(True), self.keys(False)
        self.moving = list(itertools.islice(moving, 40))
        await self.insert([*self.moving, *itertools.islice(staying, 20)])
        pairs = [(text, number) for text in AWKWARD for number in range(6)]
        for pair in pairs:
            await self.a.execute("INSERT INTO pairs VALUES (%s, %s, 1)", pair)

    async def insert(self, keys: list[str]) -> None:
        for key in keys:
            for number in (1, 2):
                await self.a.execute(
                    "INSERT INTO plain VALUES (%s, %s, 1.50, '2026-03-01 02:03:04.5+00', 'some text')", (key, number)
                )
            await self.a.execute("INSERT INTO moody VALUES (%s, 'good', '{bad}')", (key,))
            await self.a.execute("INSERT INTO bag VALUES (%s, 1, 2), (%s, 1, 2), (%s, 2, 1)", (key, key, key))

    def export(self) -> Callable[[], AbstractAsyncContextManager[ExportedSnapshot]]:
        @asynccontextmanager
        async def export() -> AsyncIterator[ExportedSnapshot]:
            slot = f"{self.link.slot}_cmp"
            async with await export_snapshot(self.link, slot=slot, temporary=True, timeout_s=20) as snapshot:
                yield snapshot

        return export

    def sides(self, **more: bool) -> Tables:
        return Tables(self.shapes, self.sink_shapes, **more)

    async def whole(self, stream: Stream, **more: bool) -> Equal:
        return await compare_whole(self.link, stream, self.sides(**more), export=self.export())


@pytest.fixture
async def sides(servers: TwoServers) -> AsyncIterator[Sides]:
    rig = Sides(servers, TABLES, DDL)
    await rig.open()
    async with await rig.link.open_sink("shapes") as conn:
        rig.sink_shapes = await read_shapes(conn, TABLES)
    await rig.fill()
    yield rig
    await rig.close()


@pytest.mark.parametrize("shared", [False, True])
async def test_equal_sides_are_equal(sides: Sides, shared: bool) -> None:
    stream = sides.stream()
    async with sides.running(stream):
        await sides.drained(stream)
        found = await sides.whole(stream, shared_origin=shared, shared_sink=shared)
        pairs = [1 for text in AWKWARD for n in range(6) if sides.link.moves(f"{text}\0{n}".encode())]
        assert found.keys == 40 + len(pairs)
        assert found.rows == 40 * (2 + 1 + 3) + len(pairs)


FAULTS = {
    "a changed character": "UPDATE plain SET note = 'some tExt' WHERE k = %s AND id = 1",
    "a changed scale": "UPDATE plain SET v = 1.5 WHERE k = %s AND id = 1",
    "a microsecond": "UPDATE plain SET at = at + interval '1 us' WHERE k = %s AND id = 1",
    "null for empty": "UPDATE plain SET note = NULL WHERE k = %s AND id = 2",
    "a lost row": "DELETE FROM plain WHERE k = %s AND id = 2",
    "a row too many": "INSERT INTO plain VALUES (%s, 9, 0, now(), '')",
    "a row of a bag twice": "INSERT INTO bag VALUES (%s, 2, 1)",
    "one lost, another twice": "UPDATE bag SET v = 2, w = 1 WHERE ctid = (SELECT min(ctid) FROM bag WHERE k = %s)",
    "values swapped": "UPDATE bag SET v = w, w = v WHERE ctid = (SELECT min(ctid) FROM bag WHERE k = %s)",
    "an enum": "UPDATE moody SET feels = 'bad' WHERE k = %s",
    "an enum in an array": "UPDATE moody SET since = '{good}' WHERE k = %s",
    "every row lost": "DELETE FROM moody WHERE k = %s",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shared", [False, True])
async def test_a_planted_difference_is_found_and_its_key_named(sides: Sides, fault: str, shared: bool) -> None:
    stream = sides.stream()
    async with sides.running(stream):
        await sides.drained(stream)
        await sides.whole(stream)
        key = random.choice(sides.moving)
        print(key)
        await sides.b.execute(FAULTS[fault].encode(), (key,))
        with pytest.raises(Mismatch, match=repr(key)):
            await sides.whole(stream, shared_origin=shared, shared_sink=shared)


@pytest.mark.parametrize("shared", [False, True])
async def test_keys_that_the_copy_missed_are_found(sides: Sides, shared: bool) -> None:
    # Rows that neither key table knows: of a plain key, and of composite ones with texts that COPY escapes.
    stream = sides.stream()
    async with sides.running(stream):
        await sides.drained(stream)
        await sides.whole(stream, shared_origin=shared)
        await sides.b.execute("DELETE FROM plain WHERE k = %s", (sides.moving[1],))
        awkward = next((t, n) for t in AWKWARD for n in range(6) if sides.link.moves(f"{t}\0{n}".encode()))
        for conn in (sides.a, sides.b):
            name = control.keys_table(sides.job).as_string()
            await conn.execute(f"DELETE FROM {name} WHERE k = %s OR k = %s".encode(), (sides.moving[1], awkward[0]))
        with pytest.raises(Mismatch) as caught:
            await sides.whole(stream, shared_origin=shared)
        assert "'pairs'" in str(caught.value)
        assert repr(awkward[0]) in str(caught.value)
        assert "'plain'" in str(caught.value)


async def test_a_key_that_only_the_source_s_list_lacks_is_no_difference(sides: Sides) -> None:
    stream = sides.stream()
    async with sides.running(stream):
        await sides.drained(stream)
        before = await sides.whole(stream)
        await sides.a.execute(f"DELETE FROM {control.keys_table(sides.job).as_string()}".encode())
        assert (await sides.whole(stream)).rows == before.rows


async def test_rows_of_a_key_that_the_target_does_not_list_are_a_difference(sides: Sides) -> None:
    # They would not be hidden there.
    stream = sides.stream()
    async with sides.running(stream):
        await sides.drained(stream)
        name = control.keys_table(sides.job).as_string()
        await sides.b.execute(f"DELETE FROM {name} WHERE k = %s".encode(), (sides.moving[3],))
        with pytest.raises(Mismatch, match=repr(sides.moving[3])):
            await sides.whole(stream)


async def test_the_changed_and_the_closed_comparison_see_what_changed_since(sides: Sides) -> None:
    stream = sides.stream()
    async with sides.running(stream):
        await sides.drained(stream)
        since = (await sides.whole(stream)).lsn
        await sides.a.execute("UPDATE plain SET v = v + 1 WHERE k = ANY(%s)", (sides.moving[:5],))
        await sides.drained(stream)
        found = await compare_changed(sides.link, stream, sides.sides(), since=since, export=sides.export())
        assert 5 <= found.keys <= 10
        await sides.b.execute("UPDATE plain SET note = 'x' WHERE k = %s", (sides.moving[2],))
        with pytest.raises(Mismatch, match=repr(sides.moving[2])):
            await compare_changed(sides.link, stream, sides.sides(), since=since, export=sides.export())
        ends = {"origin_conn": sides.a, "sink_conn": sides.b}
        with pytest.raises(Mismatch, match=repr(sides.moving[2])):
            await compare_closed(sides.link, sides.sides(), since=since, **ends)
        await sides.b.execute("UPDATE plain SET note = 'some text' WHERE k = %s", (sides.moving[2],))
        assert await compare_closed(sides.link, sides.sides(), since=since, **ends) == found.keys


async def test_writers_do_not_make_a_difference(sides: Sides) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    stream = sides.stream()
    async with sides.running(stream):
        writer = await sides.connect(0)
        done = False

        async def write() -> int:
            count = 0
            while not done:
                async with writer.transaction():
                    for key in rng.sample(sides.moving, 3):
                        await writer.execute("UPDATE plain SET v = v + 1 WHERE k = %s", (key,))
                        await writer.execute("DELETE FROM bag WHERE k = %s", (key,))
                        await writer.execute("INSERT INTO bag VALUES (%s, %s, 0)", (key, count))
                count += 1
            return count

        async with writer, asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(write())
            try:
                for _ in range(12):
                    assert (await sides.whole(stream)).rows
            finally:
                done = True
        assert writing.result() > 12
